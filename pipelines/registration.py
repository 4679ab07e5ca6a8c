"""A finished run's model in the registry, and whether it is the champion now."""

import tempfile
from contextlib import suppress
from pathlib import Path

from pipelines import checkpoints, progress, tracking
from pipelines.config import EvaluationConfig, Section
from pipelines.data.shard_set import ShardSet
from pipelines.durable_files import write_json
from pipelines.errors import CodecmillError, InputError
from pipelines.evaluation.contents import REPORT, made_at
from pipelines.evaluation.curve_images import bounded
from pipelines.evaluation.results import read_evaluation
from pipelines.locks import lock
from pipelines.progress import Progress
from pipelines.promotion import BD_RATES, Decision, Scores, decide
from pipelines.provenance.locating import all_with_weights
from pipelines.run_directory import Root, RunDirectory


class Registered(Section):
    """`promotion.json`: the version, the alias that it was given, and why."""

    version: int
    alias: str
    reason: str
    checkpoint_sha256: str


def register(
    run: RunDirectory,
    checkpoint: checkpoints.Checkpoint,
    shard_set: ShardSet,
    metrics: dict[str, float],
    report: Path,
    choice: EvaluationConfig,
    flow_run: str | None = None,
) -> Registered:
    """Register a checkpoint with its test metrics, compare it with the champion, and keep the decision.

    Args:
        metrics: means over the test split: `psnr` in dB, `ms_ssim`.
        report: the folder of the evaluation, which MLflow gets too.
        choice: how it was evaluated, and by which metric and margin the champion must be beaten.
        flow_run: the page of the flow run that this is part of, for MLflow's page of the run.

    Raises:
        TrackingUnavailable: MLflow cannot be reached; the same again later does the rest.
    """
    choice = bounded(choice, ((each.width, each.height) for each in shard_set.sources("test")))
    _tell(0, "sending the report to MLflow")
    tracking.bring_level(run)  # with the report; it may have been away while the run was trained
    test_metrics = {f"test/{name}": value for name, value in metrics.items()}
    tracking.log_metrics(run, checkpoint.step, test_metrics, made_at(report))
    _tell(1, "making a version of the model")
    version = tracking.register_model(
        run,
        checkpoint.path,
        checkpoint.sha256,
        shard_set.fingerprint,
        metrics,
        shard_set.test_set_sha256,
        choice.curve_images,
    )
    _tell(2, "comparing it with the champion")
    candidate = Scores(version, metrics, shard_set.test_set_sha256, choice.curve_images)
    decision = _promoted(run, candidate, shard_set, choice)
    _describe(run, checkpoint.step, report, version, decision, flow_run)
    result = Registered(
        version=version, alias=decision.alias, reason=decision.reason, checkpoint_sha256=checkpoint.sha256
    )
    write_json(run.promotion_file, result.model_dump(mode="json"))
    _tell(3, f"version {version} is the {decision.alias}")
    return result


def _describe(
    run: RunDirectory, step: int, report: Path, version: int, decision: Decision, flow_run: str | None
) -> None:
    from pipelines.evaluation.summary import worst_pictures

    evaluation = read_evaluation(report)
    if evaluation is None:
        return
    picture = next((shown for _, shown in worst_pictures(evaluation, 1)), None)
    found = f"{evaluation.in_a_line()}, at step {step:,}. {decision.alias.capitalize()}: {decision.reason}"
    tracking.describe(run, version, found, f"{tracking.EVALUATION}/{report.name}/{REPORT}", picture, flow_run)


def _tell(done: int, message: str) -> None:
    progress.report(Progress("registration", done, 3, "parts", message))


def _promoted(run: RunDirectory, candidate: Scores, shard_set: ShardSet, choice: EvaluationConfig) -> Decision:
    """Compare a version with the champion of the moment, and give it its alias.

    What takes long, to evaluate the champion on a new test set, is done in between, and then the champion looked at
    anew.
    """
    scored: Scores | None = None
    while isinstance(found := _compared(run, candidate, scored, choice), tracking.Version):
        scored = _scored(found, run, shard_set, choice)
    return found


def _compared(
    run: RunDirectory, candidate: Scores, scored: Scores | None, choice: EvaluationConfig
) -> Decision | tracking.Version:
    """Promote a version or not; or return the champion, where that is to be evaluated on its test set first.

    Two runs that end at once must not both find themselves better than the same former champion: those of a root take
    turns, and on other machines there are milliseconds between the look and the alias.
    """
    with lock(run.root.path / ".promotion.lock", "The choice of the champion", wait=600):
        champion = tracking.champion(run.root)
        known = champion and champion.scores
        if known and scored and scored.version == known.version:
            known = scored  # whatever another machine has noted of it meanwhile
        is_known = known and known.are_of(candidate.test_set_sha256, choice.promotion_metric, choice.curve_images)
        if champion and not is_known:
            return champion
        decision = decide(candidate, known, choice.promotion_metric, choice.promotion_margin)
        tracking.promote(run, candidate.version, decision)
        return decision


def _scored(champion: tracking.Version, run: RunDirectory, shard_set: ShardSet, choice: EvaluationConfig) -> Scores:
    """Evaluate the champion on the test split of a shard set, and note it in the registry."""
    from pipelines.evaluation.stage import score_on_test_split

    with tempfile.TemporaryDirectory(prefix="codecmill-") as folder:
        checkpoint = _checkpoint_of(champion, run.root, Path(folder))
        metrics = score_on_test_split(run, checkpoint, shard_set, choice)
    curve_images = choice.curve_images if choice.promotion_metric in BD_RATES else 0  # otherwise no curves are measured
    tracking.record_evaluation(run.root, champion.number, metrics, shard_set.test_set_sha256, curve_images)
    return Scores(champion.number, metrics, shard_set.test_set_sha256, curve_images)


def _checkpoint_of(champion: tracking.Version, root: Root, scratch: Path) -> checkpoints.Checkpoint:
    """As it lies under the root, or as MLflow has it: what MLflow was sent may have been deleted there for room."""
    for own in all_with_weights(champion.checkpoint_sha256, root):
        with suppress(CodecmillError):  # damaged
            return checkpoints.open_checkpoint(own)
    try:
        address = f"models:/{tracking.MODEL}/{champion.number}"
        return checkpoints.open_checkpoint(tracking.fetch_checkpoint(address, root, scratch))
    except InputError as error:
        raise InputError(
            f"Champion version {champion.number} is to be evaluated on the new test set and cannot be had: {error} "
            f"Give the alias '{tracking.CHAMPION}' to another version in MLflow, or delete the alias."
        ) from error
