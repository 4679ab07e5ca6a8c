"""The journal as MLflow is to get it: whole lines, each step once, with the offset that was reached."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipelines.tolerant_reading import journal_entry, number

FIGURE = re.compile(r"[A-Za-z0-9_]+(/[A-Za-z0-9_]+)*")
"""What a figure is called. MLflow takes no name like `../x`, nor anything else that comes with it."""

_LONGEST = 65_536
"""Bytes of a line, as far as it is looked back."""

LATEST = 1e12
"""Seconds since 1970; milliseconds beyond it fit into no column of a database."""


@dataclass(frozen=True)
class Line:
    """One step of the journal.

    Attributes:
        end: offset of the byte after the line.
        milliseconds: when the step was done, since 1970.
    """

    end: int
    step: int
    milliseconds: int
    figures: dict[str, float]


def read_lines(journal: Path, offset: int = 0, after_step: int = 0) -> Iterator[Line]:
    """The lines from `offset` on whose steps come after `after_step`; what they say is durable.

    A last line without its newline is left for later; what is no JSON object with a step and a time is passed over.
    An `offset` that is not the end of a line, or of a line beyond `after_step`, counts as 0: the journal is another
    one, or was cut and written on.
    """
    if not journal.is_file():
        return
    with journal.open("rb") as file:
        # MLflow must not know of points that a power cut can take back.
        os.fsync(file.fileno())
        if not _is_reached(file, offset, after_step):
            offset = 0
        for line in _in_order(_parsed(file, offset), after_step if offset else 0):
            if line.step > after_step:
                yield line


def _parsed(file: BinaryIO, offset: int) -> Iterator[Line]:
    file.seek(offset)
    for raw in file:
        if not raw.endswith(b"\n"):
            return
        offset += len(raw)
        line = _parse(raw, offset)
        if line is not None:
            yield line


def _in_order(lines: Iterator[Line], reached: int) -> Iterator[Line]:
    """Lines whose steps grow, without those that a changed byte has put ahead of what comes after them."""
    line = next(lines, None)
    while line is not None:
        following = next(lines, None)
        is_ahead = following is not None and reached < following.step < line.step
        if line.step > reached and not is_ahead:
            reached = line.step
            yield line
        line = following


def _is_reached(file: BinaryIO, offset: int, step: int) -> bool:
    """Whether what comes before an offset are whole lines of steps up to this one, by the last of them."""
    begin = file.seek(max(0, offset - _LONGEST))
    before = file.read(offset - begin)
    last = journal_entry(before[:-1].rpartition(b"\n")[2])
    return before.endswith(b"\n") and (last is None or last["step"] <= step)


def _parse(raw: bytes, end: int) -> Line | None:
    entry = journal_entry(raw) or {}
    seconds = number(entry, "time")
    if seconds is None or not 0 <= seconds < LATEST:
        return None
    values = {key: number(entry, key) for key in entry if key not in ("step", "time") and FIGURE.fullmatch(key)}
    figures = {key: value for key, value in values.items() if value is not None}
    return Line(end, entry["step"], round(seconds * 1000), figures)


def in_batches(lines: Iterator[Line], most: int) -> Iterator[list[Line]]:
    """Lines in groups of at most `most` figures together; a line that has more stands alone."""
    group: list[Line] = []
    size = 0
    for line in lines:
        if group and size + len(line.figures) > most:
            yield group
            group, size = [], 0
        group.append(line)
        size += len(line.figures)
    if group:
        yield group


def first_point(journal: Path) -> str | None:
    """What tells a journal from one of a former run in a folder of the same name: its first step and time."""
    line = next(read_lines(journal), None)
    return f"step {line.step} at {line.milliseconds}" if line else None
