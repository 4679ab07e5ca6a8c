"""The journal as MLflow is to get it: whole lines, each step once, with the offset that was reached."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


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
    An `offset` that is not the end of a line (the journal is another one) counts as 0.
    """
    if not journal.is_file():
        return
    with journal.open("rb") as file:
        # MLflow must not know of points that a power cut can take back.
        os.fsync(file.fileno())
        file.seek(max(offset - 1, 0))
        if offset and file.read(1) != b"\n":
            offset = file.seek(0)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            offset += len(raw)
            line = _parse(raw, offset)
            if line is not None and line.step > after_step:
                after_step = line.step
                yield line


def _parse(raw: bytes, end: int) -> Line | None:
    try:
        entry = json.loads(raw)
        step, seconds = entry.pop("step"), entry.pop("time")
        figures = {key: float(value) for key, value in entry.items() if isinstance(value, int | float)}
        return Line(end, int(step), round(seconds * 1000), figures)
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError):
        return None


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
