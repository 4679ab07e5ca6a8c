"""The journal, `metrics.jsonl`: one line of figures a step, the truth that MLflow's charts are a view of."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self


class Journal:
    """Appends one object a step; a step that is done again after an interruption keeps its first line."""

    def __init__(self, path: Path):
        self._last_step = _cut_torn_line(path)
        self._file = path.open("ab")

    def append(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of a step, unless the journal has that step already."""
        if step <= self._last_step:
            return
        line = json.dumps({"step": step, "time": round(time.time(), 3), **figures}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self._last_step = step

    def sync(self) -> None:
        """Make what was appended durable."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cut_torn_line(path: Path) -> int:
    """Drop a last line that a kill left unfinished; returns the last step that is written."""
    path.touch()
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    last = 0
    for line in read(path):
        last = max(last, line["step"])
    return last


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal, in order; what is no JSON object with a step is passed over."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                yield entry
