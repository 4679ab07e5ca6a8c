"""What keeps a root in order: all that checkpoints come from is read again, and what nobody needs is removed."""

from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import Field

from pipelines.config import RootPath, RunConfig
from pipelines.errors import InputError
from pipelines.run_directory import Root
from tasks.turns import turn
from tasks.upkeep import Cleaned, Verified, clean_up, verify_all

ROOT = RunConfig().root
Days = Annotated[float, Field(ge=0)]


@flow(name="verification", flow_run_name="verification of {root}")
def verification(root: RootPath = ROOT, sources: bool = False) -> Verified:
    """Read all that the checkpoints of all runs come from; fails with a list where a byte has changed.

    Args:
        root: the folder that holds the runs.
        sources: read the source images as well.
    """
    place = _existing(root)
    with turn(place) as ended:
        return ended or verify_all(place, sources)


@flow(name="clean-up", flow_run_name="clean-up of {root}")
def cleaning(root: RootPath = ROOT, days: Days = 30, runs: bool = False, dry_run: bool = False) -> Cleaned:
    """Remove shard sets that no run names, old copies of images, and old finished runs if they are to go as well.

    Args:
        root: the folder that holds them.
        days: how long ago they must have been written into last.
        runs: finished runs, too, but the champion's.
        dry_run: only say what would go.
    """
    place = _existing(root)
    with turn(place) as ended:
        return ended or clean_up(place, days, runs, dry_run)


def _existing(root: Path) -> Root:
    if not root.is_dir():  # else all would be well there, each week, while nobody looks where the runs are
        raise InputError(f"There is no root {root.absolute()}: name the folder that holds the runs.")
    return Root(root.absolute())
