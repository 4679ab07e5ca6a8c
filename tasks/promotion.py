"""Registration and promotion as a task."""

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from pipelines import checkpoints
from pipelines.config import EvaluationConfig
from tasks.progress import logged
from tasks.reporting import wait_until_heard
from tasks.retrying import unless_explained
from tasks.runs import flow_run_page
from tasks.values import CheckpointReference, EvaluationReference, HeldRun, Registration, ShardSetReference


# MLflow may be away for a moment; a version that is registered already is not registered again. The time is that of an
# evaluation: the champion is evaluated, too, where the test set is another one now.
@task(
    name="register",
    task_run_name="register {run.name}",
    retries=5,
    retry_delay_seconds=[2, 10, 30, 60, 120],
    retry_condition_fn=unless_explained,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def register(
    run: HeldRun,
    shard_set: ShardSetReference,
    checkpoint: CheckpointReference,
    evaluation: EvaluationReference,
    choice: EvaluationConfig,
) -> Registration:
    """Make the checkpoint a registered version, and the champion if it is better than the present one."""
    from pipelines import registration
    from pipelines.data.shard_set import ShardSet
    from pipelines.storage import sending

    with logged():
        result = registration.register(
            run.directory,
            checkpoints.open_checkpoint(checkpoint.path),
            ShardSet.open(shard_set.path),
            evaluation.metrics,
            evaluation.path,
            choice,
            flow_run_page(run.directory.root),
        )
        sending.bring_level(run.directory)
    wait_until_heard("The registration", run.directory)
    get_run_logger().info("Version %s is the %s. %s", result.version, result.alias, result.reason)
    return Registration(version=str(result.version), alias=result.alias, reason=result.reason)
