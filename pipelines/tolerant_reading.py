"""Reading files that may be damaged, or change meanwhile: what can be read of them, and never an error."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.config import MOST_STEPS

_TAIL = 65_536
"""Bytes at the journal's end in which the newest figures are looked for."""


def text(values: dict[str, Any], key: str) -> str | None:
    value = values.get(key)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def number(values: dict[str, Any], key: str) -> float | None:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or math.isnan(value):
        return None
    return float(value)


def last_figures(journal: Path) -> dict[str, Any]:
    """The newest value of each figure among the journal's last lines; a torn or damaged line is passed over."""
    figures: dict[str, Any] = {}
    for line in _read(journal, lambda size: max(0, size - _TAIL)).split(b"\n"):
        figures |= journal_entry(line) or {}
    return figures


def first_object(journal: Path) -> dict[str, Any]:
    return json_object(_read(journal, lambda _: 0).partition(b"\n")[0])


def _read(path: Path, offset: Callable[[int], int]) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset(os.fstat(file.fileno()).st_size))
            return file.read(_TAIL)
    except OSError:
        return b""


def json_object(line: bytes) -> dict[str, Any]:
    """The object that a line of JSON holds; empty where it holds none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def journal_entry(line: bytes) -> dict[str, Any] | None:
    """The object in a line of a journal, or None where it is none with the number of a step.

    A journal that has more than `training.steps` can be does not say the truth, and no database takes any integer.
    """
    entry = json_object(line)
    step = entry.get("step")
    is_step = isinstance(step, int) and not isinstance(step, bool) and 0 < step <= MOST_STEPS
    return entry if is_step else None


def is_file(path: Path) -> bool:
    """Whether a file is there; no, where the path is none that a file system takes."""
    return os.path.isfile(path)  # noqa: PTH113  # pathlib's raises on names that are too long


def exists(path: Path) -> bool:
    """Whether anything is there; as `is_file`."""
    return os.path.exists(path)  # noqa: PTH110


def is_dir(path: Path) -> bool:
    """Whether a folder is there; as `is_file`."""
    return os.path.isdir(path)  # noqa: PTH112


def modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder; what vanishes meanwhile counts as nothing."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(Path(parent) / name).st_size
            except FileNotFoundError:
                continue
    return total
