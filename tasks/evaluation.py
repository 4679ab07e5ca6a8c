"""Evaluation as a task, with the report as a Prefect artifact."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Thread

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from pipelines import checkpoints
from pipelines.config import EvaluationConfig
from tasks.progress import logged
from tasks.reporting import wait_until_heard
from tasks.retrying import unless_explained
from tasks.values import CheckpointReference, EvaluationReference, HeldRun, ShardSetReference


@contextmanager
def loaded_meanwhile() -> Iterator[None]:
    """Load what `evaluate` needs while something else is waited for: torch takes seconds."""
    thread = Thread(target=import_module, args=("pipelines.evaluation.stage",), daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


# A retry helps where a process was killed for want of memory; what is evaluated already is not evaluated again. As long
# as it takes: the more images, the longer, and with a limit a large test split would never be evaluated.
@task(
    name="evaluate",
    task_run_name="evaluate {run.name} at step {checkpoint.step}",
    retries=1,
    retry_delay_seconds=10,
    retry_condition_fn=unless_explained,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def evaluate(
    run: HeldRun, shard_set: ShardSetReference, checkpoint: CheckpointReference, choice: EvaluationConfig
) -> EvaluationReference:
    """Reconstruct the test split (or the images that are named) and write figures, pictures and the report."""
    from pipelines.data.shard_set import ShardSet
    from pipelines.evaluation.stage import evaluate_run
    from pipelines.evaluation.summary import summary
    from pipelines.storage import sending

    opened = checkpoints.open_checkpoint(checkpoint.path)
    with logged():
        evaluation = evaluate_run(run.directory, opened, ShardSet.open(shard_set.path), choice)
        sending.bring_level(run.directory)
    if choice.images is not None:  # the test split's goes with the registration
        _show_in_mlflow(run)
    wait_until_heard("The evaluation", run.directory)
    text = summary(evaluation, _links(run, evaluation.folder))
    create_markdown_artifact(text, key="evaluation", description=f"Evaluation of {run.name}")
    return EvaluationReference(path=evaluation.folder, images=len(evaluation.images), metrics=evaluation.means)


def _links(run: HeldRun, folder: Path) -> str:
    """To MLflow's pages, where a server has them."""
    from pipelines import tracking
    from pipelines.evaluation.contents import REPORT

    known = tracking.tracked(run.directory)
    if known is None or known.url() is None:
        return ""
    report = known.url(f"{tracking.EVALUATION}/{folder.name}/{REPORT}")
    return f"In MLflow: [the run]({known.url()}), [this report]({report})"


def _show_in_mlflow(run: HeldRun) -> None:
    from pipelines import tracking

    try:
        tracking.bring_level(run.directory)
    except tracking.TrackingUnavailable as error:
        get_run_logger().warning("The report is on disk only, for codecmill sync to send: %s", error)
