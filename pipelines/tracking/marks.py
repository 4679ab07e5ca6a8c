"""What MLflow has of a run: `mlflow_run.json`, written only after MLflow has taken it."""

import logging
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError

from pipelines.checkpoint_format import read_manifest, weights_sha256
from pipelines.checkpoints import folder_of, steps_on_disk
from pipelines.config import Section
from pipelines.durable_files import read_json, write_json
from pipelines.errors import CodecmillError
from pipelines.run_directory import RunDirectory

log = logging.getLogger("codecmill.tracking")

MOST_UNSENT = 10
"""Checkpoints that are kept for an MLflow that is away, beyond what the run keeps: a disk has an end."""


class Marks(Section):
    """Which MLflow run is this run's, and how much of the run has reached it."""

    run_id: str
    experiment_id: str
    tracking_uri: str
    """Without a password; for people, as the run is looked for wherever MLflow is now."""
    journal_offset: int = 0
    """Bytes of the journal that were sent: the end of a line."""
    journal_step: int = 0
    """The last step that was sent."""
    pictures: tuple[str, ...] = ()
    """File names that were sent."""
    checkpoints: dict[str, str] = Field(default_factory=dict)
    """Folders of MLflow that checkpoints were sent to, with the sha256 of their weights: see `sent_as`."""
    evaluations: dict[str, float] = Field(default_factory=dict)
    """Names of their folders that were sent, and when they were made, in seconds since 1970."""
    load_report: bool = False
    """Whether what `training.start_from` took was sent."""


def read_marks(run: RunDirectory) -> Marks | None:
    """The marks, or None where there are none or they are damaged: MLflow is asked then, and takes a re-send."""
    if not run.mlflow_file.is_file():
        return None
    try:
        return Marks.model_validate(read_json(run.mlflow_file))
    except (CodecmillError, ValidationError) as error:
        log.warning("%s is damaged and is made anew: %s", run.mlflow_file, str(error).partition("\n")[0])
        return None


def unsent_checkpoints(run: RunDirectory) -> set[int]:
    """Steps of the checkpoints on disk that MLflow is still to get, the newest `MOST_UNSENT` at most."""
    marks = read_marks(run)
    sent = marks.checkpoints if marks else {}
    unsent = [step for step in steps_on_disk(run) if sent_as(folder_of(run, step), sent) is None]
    return set(unsent[-MOST_UNSENT:])


def sent_as(folder: Path, sent: Mapping[str, str]) -> str | None:
    """The name of the folder in MLflow that has a checkpoint; None where none has.

    A step that was trained again, to other bits, goes beside what was sent of it before, for versions and addresses
    name that. Of a damaged checkpoint the newest is taken for it.
    """
    try:
        weights = weights_sha256(read_manifest(folder))
    except CodecmillError:
        weights = None
    of_step = (name for name in sorted(sent, reverse=True) if name.partition(".")[0] == folder.name)
    return next((name for name in of_step if weights in (None, sent[name])), None)


def write_marks(run: RunDirectory, marks: Marks) -> None:
    write_json(run.mlflow_file, marks.model_dump(mode="json"))
