"""The journal: one line a step, whatever interruptions there were."""

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

from conftest import make
from trainings import begin, train

from pipelines.durable_files import whole_lines
from pipelines.runs import start_or_continue
from pipelines.training.journal import Journal, read
from pipelines.training.optimization import learning_rate


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


def test_a_long_journal_is_not_held_in_memory(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    whole = b"".join(b'{"step": %d, "said": "%0300d"}\n' % (step, step) for step in range(1, 5001))
    path.write_bytes(whole + b"{" * 2**17)
    tracemalloc.start()
    try:
        with Journal(path, done=5000):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.read_bytes() == whole
    assert peak < len(whole) / 2
    for content, lines in (
        (b"", 0),
        (b"{", 0),
        (b"\n", 1),
        (b"a\n" + b"b" * 2**16, 2),
        (b"b" * (2**16 - 1) + b"\n", 2**16),
    ):
        path.write_bytes(content)
        assert whole_lines(path) == lines


def test_a_step_that_comes_out_otherwise_ends_what_was_said_of_it_and_of_those_after_it(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with Journal(path) as journal:
        for step in (1, 2, 3, 4):
            journal.append(step, {"samples": f"{step}", "train/loss": step / 10})
    first = path.read_bytes().splitlines(keepends=True)
    with Journal(path, done=1) as journal:
        journal.append(2, {"samples": "2", "train/loss": 0.2})
        journal.append(3, {"samples": "3", "train/loss": 0.5})
        assert path.read_bytes().startswith(b"".join(first[:2]))
        assert [(line["step"], line["train/loss"]) for line in read(path)] == [(1, 0.1), (2, 0.2), (3, 0.5)]
        journal.append(4, {"samples": "4", "train/loss": 0.6})
    assert [(line["step"], line["train/loss"]) for line in read(path)] == [(1, 0.1), (2, 0.2), (3, 0.5), (4, 0.6)]


def test_a_step_that_is_validated_when_it_is_done_again_has_the_figures_of_that(tmp_path: Path):
    """The interval may change with a resume."""
    path = tmp_path / "metrics.jsonl"
    figures = {"samples": "1", "train/loss": 0.5}
    with Journal(path) as journal:
        for step in (1, 2, 3):
            journal.append(step, figures)
    with Journal(path, done=1) as journal:
        journal.append(2, figures | {"validation/psnr": 30.0})
        journal.append(3, figures)
    assert [line.get("validation/psnr") for line in read(path)] == [None, 30.0, None]
    with Journal(path, done=1) as journal:
        journal.append(2, figures)
    assert [line.get("validation/psnr") for line in read(path)] == [None, 30.0, None], "what was known stays"


def test_what_goes_on_with_more_steps_says_of_those_done_again_what_they_are_now(tiny: dict[str, Any]):
    """Half a cosine over 12 steps, then over 20: the learning rate of steps 6 to 8 is another one."""
    run = begin(make(tiny))
    shutil.rmtree(train(run, until=8).path)  # as after a kill: back to step 5
    before = run.journal.read_bytes().splitlines(keepends=True)
    start_or_continue(make(tiny, training={"steps": 20}))
    train(run)
    training, lines = run.read_config().training, list(read(run.journal))
    assert run.journal.read_bytes().startswith(b"".join(before[:5]))
    assert [line["step"] for line in lines] == list(range(1, 21))
    rates = [line["train/learning_rate"] for line in lines]
    assert rates[5:] == [learning_rate(training, step) for step in range(5, 20)]
    assert rates[4] != learning_rate(training, 4), "of a step that was not done again"
