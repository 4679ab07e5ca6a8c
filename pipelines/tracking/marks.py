"""What MLflow has of a run: `mlflow_run.json`, written only after MLflow has taken it."""

import logging

from pydantic import Field, ValidationError

from pipelines.config import Section
from pipelines.errors import CodecmillError
from pipelines.run_directory import RunDirectory, read_json, write_json

log = logging.getLogger("codecmill.tracking")


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
    """Folder names that were sent, with the sha256 of their weights."""


def read_marks(run: RunDirectory) -> Marks | None:
    """The marks, or None where there are none or they are damaged: MLflow is asked then, and takes a re-send."""
    if not run.mlflow_file.is_file():
        return None
    try:
        return Marks.model_validate(read_json(run.mlflow_file))
    except (CodecmillError, ValidationError) as error:
        log.warning("%s is damaged and is made anew: %s", run.mlflow_file, str(error).partition("\n")[0])
        return None


def write_marks(run: RunDirectory, marks: Marks) -> None:
    write_json(run.mlflow_file, marks.model_dump(mode="json"))
