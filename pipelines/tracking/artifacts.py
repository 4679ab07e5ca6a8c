"""Files of a run that MLflow keeps: pictures that its image grid shows by step, checkpoints and reports."""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import checkpoint_format
from pipelines.evaluation.contents import RESULT, made_at
from pipelines.run_directory import RunDirectory
from pipelines.tracking.connection import connected, patience_for
from pipelines.tracking.marks import sent_as, write_marks
from pipelines.tracking.runs import opened

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("codecmill.tracking")

CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation"
_PICTURE = re.compile(r"step_(\d+)_([A-Za-z0-9_.-]+)\.png")


def log_pictures(run: RunDirectory) -> int:
    """Send the pictures `step_<step>_<what>.png` that MLflow does not have yet; returns how many.

    MLflow's image grid has one row for each <what>, growing by step.
    """
    from PIL import Image

    sent = 0
    with connected(run.root) as client:
        marks = opened(run)
        names = sorted(path.name for path in run.pictures.glob("step_*.png")) if run.pictures.is_dir() else []
        pending = [name for name in names if name not in marks.pictures]
        known = _pictures_known(client, marks.run_id) if pending else set()
        for name in pending:
            match = _PICTURE.fullmatch(name)
            if match is None:
                continue
            step, what = int(match[1]), match[2]
            if (what, step) not in known:
                path = run.pictures / name
                try:
                    with Image.open(path) as file:
                        picture = file.copy()
                except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three of damaged bytes
                    log.warning("%s is not sent to MLflow: %s", path, error)
                    continue
                made = path.stat().st_mtime_ns // 1_000_000
                client.log_image(marks.run_id, picture, key=what, step=step, timestamp=made, synchronous=True)
                sent += 1
            marks = marks.model_copy(update={"pictures": (*marks.pictures, name)})
            write_marks(run, marks)
    return sent


def _pictures_known(client: "MlflowClient", run_id: str) -> set[tuple[str, int]]:
    """Key and step of every picture that MLflow has whole: `log_image` writes the compressed twin last."""
    pattern = re.compile(r"images/(.+)\+step\+(\d+)\+timestamp\+\d+\+[^+]+\+compressed\.webp")
    matches = (pattern.fullmatch(file.path) for file in client.list_artifacts(run_id, "images"))
    return {(match[1], int(match[2])) for match in matches if match}


def log_checkpoint(run: RunDirectory, folder: Path) -> str:
    """Send a checkpoint unless MLflow has it; returns its `runs:/` address.

    Its manifest goes last, so that a checkpoint that was cut off on the way is never taken for one.
    """
    with connected(run.root) as client:
        marks = opened(run)
        manifest = checkpoint_format.read_manifest(folder)
        name = sent_as(folder, marks.checkpoints)
        if name is None:
            sha256 = str(checkpoint_format.weights_sha256(manifest))
            name = f"{folder.name}.{sha256[:8]}" if folder.name in marks.checkpoints else folder.name
            for file in (*manifest.files, checkpoint_format.MANIFEST):
                with patience_for((folder / file).stat().st_size):
                    client.log_artifact(marks.run_id, str(folder / file), f"{CHECKPOINTS}/{name}")
            write_marks(run, marks.model_copy(update={"checkpoints": marks.checkpoints | {name: sha256}}))
        return f"runs:/{marks.run_id}/{CHECKPOINTS}/{name}"


def log_load_report(run: RunDirectory) -> None:
    """Send what a run took from `training.start_from` and what it left, unless MLflow has it or there is none."""
    if not run.load_report.is_file():
        return
    with connected(run.root) as client:
        marks = opened(run)
        if not marks.load_report:
            client.log_artifact(marks.run_id, str(run.load_report), run.start_weights.name)
            write_marks(run, marks.model_copy(update={"load_report": True}))


def log_evaluation(run: RunDirectory, folder: Path) -> None:
    """Send the report of an evaluation and all that it shows, unless MLflow has it."""
    made = made_at(folder)
    with connected(run.root) as client:
        marks = opened(run)
        if marks.evaluations.get(folder.name) == made:
            return
        largest = max((path.stat().st_size for path in folder.rglob("*") if path.is_file()), default=0)
        with patience_for(largest):
            client.log_artifacts(marks.run_id, str(folder), f"{EVALUATION}/{folder.name}")
        write_marks(run, marks.model_copy(update={"evaluations": marks.evaluations | {folder.name: made}}))


def log_evaluations(run: RunDirectory) -> None:
    """Send each evaluation that is on disk and that MLflow does not have."""
    for result in sorted(run.evaluations.glob(f"step_*/{RESULT}")):
        log_evaluation(run, result.parent)
