"""What is on disk, shown: all runs as a table, one run stage by stage, and where a finished run's things are."""

import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.run_directory import Root
from pipelines.status import RunStatus, State

if TYPE_CHECKING:
    from pipelines.codec.files import Written

_STYLES: dict[State, str] = {
    "done": "green",
    "running": "cyan",
    "interrupted": "yellow",
    "missing": "dim",
    "damaged": "red",
}
_MARKS: dict[State, str] = {"done": "✓", "running": "▶", "interrupted": "‖", "missing": "·", "damaged": "✗"}

_FIRST_TO_GO = ("size", "shards", "started", "PSNR dB", "steps")
"""Columns of the list that are left out, in this order, where they would leave no room for the names."""


class _Output(Console):
    """A console that leaves it to who uses it what follows where nobody reads on; rich's ends the program with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def output() -> Console:
    """Standard output, as wide as need be where it is no terminal."""
    console = _Output(highlight=False)
    return console if console.is_terminal else _Output(highlight=False, width=200)


def print_json(value: BaseModel | Sequence[BaseModel]) -> None:
    """One JSON document on standard output."""
    content = (
        value.model_dump(mode="json")
        if isinstance(value, BaseModel)
        else [each.model_dump(mode="json") for each in value]
    )
    print(json.dumps(content, indent=2))


def print_list(runs: Sequence[RunStatus], root: Path) -> None:
    """A line for each run, newest last."""
    console = output()
    if not runs:
        console.print(f"No runs in {root.absolute()} yet. Start with: codecmill demo", soft_wrap=True, markup=False)
        return
    columns = {
        "run": [Text(run.name) for run in runs],
        "state": [Text(run.state, _STYLES[run.state]) for run in runs],
        "steps": [Text(f"{run.step}/{run.steps if run.steps is not None else '?'}") for run in runs],
        "PSNR dB": [Text(f"{run.psnr:.2f} {run.psnr_of}" if run.psnr is not None else "") for run in runs],
        "shards": [Text((run.fingerprint or "")[:8]) for run in runs],
        "started": [Text(f"{run.started.astimezone():%Y-%m-%d %H:%M}") for run in runs],
        "size": [Text(readable_size(run.size)) for run in runs],
    }
    for name in _FIRST_TO_GO:
        if sum(max(map(len, [Text(title), *cells])) + 2 for title, cells in columns.items()) - 2 > console.width:
            del columns[name]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in columns:
        table.add_column(
            title, justify="right" if title in ("steps", "size") else "left", overflow="fold", no_wrap=title != "run"
        )
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    console.print(table)


def print_status(run: RunStatus) -> None:
    """A run stage by stage, its newest checkpoint, what is damaged, and what to type next."""
    console = output()
    owner = f" (process {run.owner})" if run.owner else ""
    console.print(Text.assemble(("Run ", ""), (run.name, "bold"), " is ", (run.state, _STYLES[run.state]), owner))
    for stage in run.stages:
        mark = Text(f"  {_MARKS[stage.state]} ", _STYLES[stage.state])
        console.print(mark + Text(f"{stage.name:13}{stage.state:12} {stage.detail}"), soft_wrap=True)
    if run.checkpoint:
        console.print(f"Latest checkpoint: {run.checkpoint}", soft_wrap=True, markup=False)
    for problem in run.problems:
        console.print(Text(f"Damaged: {problem}", "red"), soft_wrap=True)
    console.print(f"Next: {run.next_command}{Root(run.path.parent.parent).flag()}", soft_wrap=True, markup=False)


def print_summary(run: RunStatus) -> None:
    """Where the things of a run are, and how to look further."""
    console = output()
    flag = Root(run.path.parent.parent).flag()
    version = f"codecmill version {run.registered_version}, {run.alias}" if run.registered_version else None
    places = {
        "Shard set": run.shard_set,
        "Run": run.path,
        "Checkpoint": run.checkpoint,
        "MLflow run": run.mlflow_run,
        "Registered": version,
        "Report": run.report,
    }
    if run.psnr is not None:
        of_best = f", the best in validation is step {run.best_step}" if run.best_step != run.step else ""
        console.print(Text(f"PSNR {run.psnr:.2f} dB ({run.psnr_of}) after {run.step} steps{of_best}", "bold"))
    for what, where in places.items():
        if where is not None:
            console.print(f"  {what:12}{where}", soft_wrap=True, markup=False)
    console.print("To look further:")
    commands = {
        f"codecmill ui{flag}": "MLflow's and Prefect's pages",
        f"codecmill evaluate {run.name} --evaluation.images FOLDER{flag}": "try the model on other images",
        f"codecmill status {run.name}{flag}": "what is done and what is missing",
    }
    for command, what in commands.items():
        console.print(f"  {command}   # {what}", soft_wrap=True, markup=False)


def readable_size(count: float) -> str:
    """Bytes as people read them, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def tell_written(files: "Sequence[Written]", as_json: bool) -> None:
    """A line for each coded or decoded file, or all as JSON."""
    if as_json:
        print_json(files)
        return
    for file in files:
        print(f"{file.path}  {file.width} x {file.height}  {file.bits_per_pixel:.3f} bpp")
        if file.remark:
            print(f"codecmill: {file.source}: {file.remark}.", file=sys.stderr)
