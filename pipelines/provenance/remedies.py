"""The way out of each kind of damage: which copy to take, or which command makes the file again."""

import shlex
from pathlib import Path

from pipelines.checkpoint_format import WEIGHTS
from pipelines.durable_files import read_json
from pipelines.errors import CodecmillError
from pipelines.provenance.chain import Chain
from pipelines.provenance.locating import with_weights
from pipelines.run_directory import Root, RunDirectory
from pipelines.tracking.marks import sent_as


def of_checkpoint(folder: Path, run: RunDirectory | None) -> str:
    copy = _copy_in_mlflow(folder, run) if run else None
    return f"Restore it from a copy{f' (MLflow has {copy})' if copy else ''}; no training goes on from it as it is."


def of_parent(sha256: str, root: Root) -> str:
    found = with_weights(sha256, root)
    if found and (found / WEIGHTS).is_file():
        return f"Copy {found / WEIGHTS} there."
    if found:
        return f"Restore it from a copy; its tensors lie sharded in {found}."
    return "Restore it from a copy of the parent checkpoint."


def of_config(folder: Path) -> str:
    return f"Restore it; what it said is in: codecmill explain {shlex.quote(str(folder))} --json"


def of_pointer(run: RunDirectory) -> str:
    return f"Delete it and run: {run.command('resume')}"


def of_shards(chain: Chain) -> str:
    """The same images make the same bytes again."""
    if chain.run is None:
        return "Delete it and run codecmill shards with the images and choices that the set was made of."
    return f"Delete it and run: {_shards(chain.run)}"


def of_missing_set(chain: Chain) -> str:
    if chain.run is None:
        return "Name the folder that holds it with --root."
    return f"Name the folder that holds it with --root, or run: {_shards(chain.run)}"


def of_source() -> str:
    return "Restore it from a copy; what was trained on is still in the shards."


def _shards(run: RunDirectory) -> str:
    return f"codecmill shards --config {shlex.quote(str(run.config_file))}{run.root.flag()}"


def _copy_in_mlflow(folder: Path, run: RunDirectory) -> str | None:
    try:
        marks = read_json(run.mlflow_file)
    except CodecmillError:
        return None
    sent = marks.get("checkpoints") if isinstance(marks, dict) else None
    name = sent_as(folder, sent) if isinstance(sent, dict) else None
    return f"runs:/{marks.get('run_id')}/checkpoints/{name}" if name else None
