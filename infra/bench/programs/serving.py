"""How a program that is measured talks with the benchmark: a line in asks for a round, a line of JSON out answers.

The standard library only, beside what the program itself needs.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.bench.process_tree import Stretch

Parameters = dict[str, Any]
Measure = Callable[[int], dict[str, Any]]
"""From the number of a round, from 0, to its figures."""


def serve(prepare: Callable[[Parameters], Measure]) -> None:
    """Prepare with the JSON of the first argument, then answer each number on standard input with a line of JSON.

    What libraries print goes to standard error, so that nothing comes between these lines.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    measure = prepare(json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        print(json.dumps(measure(int(line))), file=answers)


def figures(stretch: Stretch, count: int, **more: Any) -> dict[str, Any]:
    """A round's figures: how many things were done in a stretch, and what else there is to say."""
    return {"seconds": stretch.seconds, "cpu_seconds": stretch.cpu_seconds, "count": count, **more}


@contextmanager
def empty_folder(path: str) -> Iterator[Path]:
    """A folder that is empty at the beginning, and gone at the end."""
    folder = Path(path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def bytes_below(folder: Path) -> int:
    """Size of all files in a folder and below it, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
