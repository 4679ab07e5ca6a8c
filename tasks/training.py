"""Training as a task: torchrun's ranks, started and followed from here."""

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from pipelines import checkpoints
from tasks.checkpoints import record_shard_set, reference
from tasks.progress import logged
from tasks.reporting import wait_until_heard
from tasks.retrying import unless_explained
from tasks.values import CheckpointReference, HeldRun, ShardSetReference


# No timeout: a training takes as long as it takes. A retry is a resume, so it costs at most a checkpoint interval.
@task(
    name="train",
    task_run_name="train {run.name}",
    retries=2,
    retry_delay_seconds=10,
    retry_condition_fn=unless_explained,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def train(run: HeldRun, shard_set: ShardSetReference) -> CheckpointReference:
    """Train to the last step, from the latest checkpoint; what is reached goes to MLflow and the store meanwhile."""
    from pipelines.training import launch
    from pipelines.training.shipping import Shipping
    from pipelines.training.uploading import Uploading

    log = get_run_logger()
    record_shard_set(run, shard_set)
    with logged(), Shipping(run.directory, warn=log.warning), Uploading(run.directory, warn=log.warning):
        checkpoint = launch.train(run.directory, run.lock, on_line=log.info)
    wait_until_heard("Training", run.directory)
    return reference(checkpoints.best(run.directory) or checkpoint)
