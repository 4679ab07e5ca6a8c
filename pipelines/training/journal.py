"""The journal, `metrics.jsonl`: one line of figures a step, the truth that MLflow's charts are a view of."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from pipelines.durable_files import room_for, whole_lines
from pipelines.errors import CodecmillError
from pipelines.tolerant_reading import journal_entry

COMPUTED = ("train/loss", "train/gradient_norm", "train/learning_rate")
"""Figures that come out the same, to the last bit, where a step is done again as it was done before."""


class _Former(NamedTuple):
    """What the journal says already of a step that is about to be done again; where its line begins, in bytes."""

    offset: int
    line: Mapping[str, Any]
    is_validated: bool

    def is_as(self, figures: Mapping[str, Any]) -> bool:
        """The same figures, and of a validation where there is one now: the interval may be another one."""
        is_known = self.is_validated or not _is_validated(figures)
        return is_known and all(self.line.get(name) == figures.get(name) for name in COMPUTED)


class Journal:
    """Appends one object a step; a step that is done again after an interruption keeps its first line.

    Unless it comes out otherwise, as in a run that goes on with more steps, and so at another learning rate, or in
    another precision: from there on the lines are of a training that this run has not gone through, and are cut off.

    Args:
        done: steps that the training has done; those in the journal beyond it are about to be done again.
    """

    def __init__(self, path: Path, done: int = 0):
        _cut_torn_line(path)
        self._path = path
        self._last_step = done
        self._to_be_redone: dict[int, _Former] = {}
        offset = 0
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = journal_entry(raw)
                # No step can come so far ahead of its line: a byte has changed.
                if line and done < line["step"] <= done + number:
                    kept = {name: line.get(name) for name in ("samples", *COMPUTED)}
                    self._to_be_redone[line["step"]] = _Former(offset, kept, _is_validated(line))
                offset += len(raw)
        self._file = path.open("ab")

    def append(self, step: int, figures: Mapping[str, Any]) -> None:
        """Write the figures of a step, unless the journal has them already.

        Raises:
            CodecmillError: it has that step with other samples.
        """
        former = self._to_be_redone.pop(step, None)
        if former is not None:
            before = former.line["samples"]
            if before is not None and before != figures.get("samples"):
                raise CodecmillError(
                    f"Step {step} was done again with other samples than {self._path} says it had. The shard set or "
                    "the journal is not what it was: see codecmill verify."
                )
            if former.is_as(figures):
                self._last_step = max(self._last_step, step)
                return
            self._file.truncate(former.offset)
            self._to_be_redone.clear()
        if step <= self._last_step:
            return
        line = json.dumps({"step": step, "time": round(time.time(), 3), **figures}, allow_nan=False).encode() + b"\n"
        with room_for(self._path.parent, f"the line of step {step} in {self._path.name}", len(line)):
            self._file.write(line)
            self._file.flush()
        self._last_step = step

    def sync(self) -> None:
        """Make what was appended durable."""
        with room_for(self._path.parent, self._path.name, 0):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_validated(figures: Mapping[str, Any]) -> bool:
    return any(name.startswith("validation/") for name in figures)


def _cut_torn_line(path: Path) -> None:
    """Drop a last line that a kill left unfinished."""
    path.touch()
    whole = whole_lines(path)
    if whole < path.stat().st_size:
        os.truncate(path, whole)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal, in order; what is no JSON object with a step is passed over."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        yield from filter(None, map(journal_entry, file))
