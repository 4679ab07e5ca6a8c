"""The journal: one line a step, whatever interruptions there were."""

import json
from pathlib import Path

from pipelines.training.journal import Journal, read


def test_a_step_done_again_keeps_its_first_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with Journal(path) as journal:
        for step in (1, 2, 3):
            journal.append(step, {"train/loss": step / 10})
    first = path.read_bytes()
    with Journal(path) as journal:
        for step in (2, 3, 4):
            journal.append(step, {"train/loss": step / 10})
    assert path.read_bytes().startswith(first)
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4]


def test_a_torn_last_line_is_written_anew(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with Journal(path) as journal:
        journal.append(1, {"train/loss": 0.5})
        journal.append(2, {"train/loss": 0.25})
    content = path.read_bytes()
    for cut in range(content.index(b"\n") + 1, len(content)):
        path.write_bytes(content[:cut])
        with Journal(path) as journal:
            journal.append(2, {"train/loss": 0.25})
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 0.5), (2, 0.25)]
