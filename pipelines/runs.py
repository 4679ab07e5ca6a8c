"""Starting a run, going on with one, and what may change in between."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.config import LAMBDA_STEP_SQUARED, LARGEST_STEP, SMALLEST_STEP, EvaluationConfig, RunConfig
from pipelines.config.dotted import flat, nested
from pipelines.data.sources import check_images
from pipelines.errors import InputError, first_fault
from pipelines.run_directory import Root, RunDirectory
from pipelines.training import rendezvous

CHANGEABLE = {
    "training.nodes",
    "training.processes",
    "training.parallel",
    "training.device",
    "training.checkpoint_interval",
    "training.validation_interval",
    "training.replica_check_interval",
    "training.keep_latest",
    "training.max_restarts",
    "training.hang_timeout",
    "data.workers",
    "data.decoded_cache",
    "data.task_runner",
    "evaluation.images",
    "evaluation.tile_size",
    "evaluation.pictures",
    "evaluation.curve_images",
    "evaluation.promotion_metric",
    "evaluation.promotion_margin",
}
"""What does not touch the trained bits (but for the order of sums over other processes, or otherwise shared out)."""

INEXACT = {"training.precision", "training.compile", "training.threads"}
"""What another machine may not have as it was, and rounds otherwise: may change where somebody says so."""


def may_change(field: str, inexact: bool = True) -> bool:
    """Whether a run may go on with another value of a choice: of `training.steps` with a higher one.

    Its folder may be renamed and moved, too.

    Args:
        inexact: also what changes only where somebody says so.
    """
    return field in CHANGEABLE | {"training.steps", "root", "name"} or (inexact and field in INEXACT)


def start_or_continue(config: RunConfig) -> RunDirectory:
    """The run directory for a config: made, with every `auto` resolved, or found and updated.

    Must be called by the holder of the run's lock.

    Raises:
        InputError: the run exists with settings that cannot change any more; names each with old and new value. Or it
            is a new one that can never be champion by its own metric.
    """
    directory = Root(config.root.absolute()).run(config.name)
    if directory.config_file.is_file():
        old = directory.read_config()
        go_on_with(directory, merge(old, config))
    else:
        from pipelines.training.machine import resolve

        config.must_suit_a_new_run()
        directory.write_config(resolve(with_own_steps(config)))
    return directory


def check_inputs(config: RunConfig) -> None:
    """Say what is not there before anything is started, not hours after; sources are for the first stage to look for.

    Raises:
        InputError: no images to evaluate, no weights to start from, or no address at which hosts meet.
    """
    if config.training.nodes > 1:
        rendezvous.named()
    check_evaluation_images(config)
    run = Root(config.root.absolute()).run(config.name)
    source = config.training.start_from
    begun = run.start_weights.is_dir() or any(run.checkpoints.glob("step_*"))
    if source and not begun and not source.startswith(("runs:/", "models:/")):
        _check_weights(Path(source))


def _check_weights(source: Path) -> None:
    if not source.exists():
        raise InputError(f"training.start_from '{source}' is no file or folder (looked from {Path.cwd()}).")
    if source.is_dir() and not (source / "checkpoint.json").is_file():
        raise InputError(
            f"training.start_from '{source}' is no checkpoint: name a run's, such as "
            "RUN/checkpoints/step_00002000, or a file of weights."
        )


def check_evaluation_images(config: RunConfig) -> None:
    """See that the images that a config names to evaluate are there.

    Raises:
        InputError: there are none.
    """
    if config.evaluation.images is not None:
        check_images(config.evaluation.images, "evaluation.images", Root(config.root))


def with_own_steps(config: RunConfig) -> RunConfig:
    """A codec of one lambda has one step, that which is best for it, unless others are named."""
    model, weight = config.model, config.loss.lambda_
    if weight is None or model.entropy == "none" or (model.finest_step or model.coarsest_step):
        return config
    step = min(max((LAMBDA_STEP_SQUARED / weight) ** 0.5, SMALLEST_STEP), LARGEST_STEP)
    update = {"finest_step": step, "coarsest_step": step}
    return config.model_copy(update={"model": model.model_copy(update=update)})


def go_on_with(directory: RunDirectory, config: RunConfig) -> None:
    """Write the config that a run goes on with.

    Must be called by the holder of the run's lock.

    Raises:
        InputError: it asks for what this machine has not.
    """
    if config.training.device == "cuda" or config.training.compile is True:
        from pipelines.training.machine import check

        check(config.training)
    if config != directory.read_config():
        directory.write_config(config)


def merge(old: RunConfig, new: RunConfig, allow_inexact: bool = False) -> RunConfig:
    """The config that a run goes on with when it is started again as `new`.

    Args:
        allow_inexact: let `INEXACT` change, too.

    Raises:
        InputError: something else differs than may change, or what changes does not go together with the rest.
    """
    before, after = (flat(each.model_dump(mode="json")) for each in (old, with_own_steps(new)))
    refused = []
    for field, value in after.items():
        former = before[field]
        if value == former or (value == "auto" and field.startswith("training.")):
            after[field] = former
        elif field == "training.steps" and value < former:
            refused.append(f"{field} was {former} and cannot go down to {value}")
        elif not may_change(field, allow_inexact):
            way_out = " without resume --allow-inexact" if field in INEXACT else ""
            refused.append(f"{field} was {former!r} and cannot become {value!r}{way_out}")
    if refused:
        raise InputError(
            f"Run '{old.name}' was started with other settings: {'; '.join(refused)}. "
            "Start a new run with --name, or leave these as they were."
        )
    return _put_together(old, nested(after))


def evaluation_of(run: RunDirectory, given: EvaluationConfig) -> EvaluationConfig:
    """How a run is evaluated: by the choices that are given, and for the others by its own.

    Raises:
        InputError: the two do not go together.
    """
    own = run.read_config()
    chosen = own.evaluation.model_dump() | given.model_dump(include=given.model_fields_set)
    return _put_together(own, own.model_dump() | {"evaluation": chosen}).evaluation


def _put_together(old: RunConfig, values: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(
            f"Run '{old.name}' cannot go on with these settings beside those that it was started with: "
            f"{first_fault(error)}."
        ) from error


def shaped_otherwise(here: RunConfig, there: RunConfig) -> list[str]:
    """In which settings two configs differ that decide on the weights of a run; each as text, with both values."""
    ours, theirs = flat(here.model_dump(mode="json")), flat(there.model_dump(mode="json"))
    return [
        f"{field} {ours[field]!r} here, {theirs[field]!r} there"
        for field in ours
        if not may_change(field) and ours[field] != theirs[field]
    ]
