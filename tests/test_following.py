"""Why a training ended, told from what ranks and torchrun leave behind: the first cause, and no consequence of it."""

import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.durable_files import write_json
from pipelines.errors import CodecmillError, RankFailure
from pipelines.training.following import Ending, StepProgress, failure

ENDED = Ending(code=1, hung=(), spoken=())


def fail(attempt: Path, rank: int, seconds_ago: float, message: str, explained: bool, restart: int = 0) -> None:
    about = {"rank": rank, "restart": restart, "monotonic": time.monotonic() - seconds_ago, "explained": explained}
    content: dict[str, Any] = about | {"message": message, "traceback": f"Traceback of {message}"}
    write_json(attempt / f"failure_{restart}_rank_{rank}.json", content)


def test_what_a_rank_explained_comes_before_the_kill_of_a_peer_that_waited(tmp_path: Path):
    fail(tmp_path, 0, 40, "The sample is damaged.", explained=True)
    write_json(tmp_path / "exit_codes.json", {"0": 1, "1": -9})
    error = failure(tmp_path, ENDED)
    assert (type(error), str(error)) == (CodecmillError, "The sample is damaged.")


def test_a_traceback_comes_before_the_kill_of_a_peer_that_would_not_end(tmp_path: Path):
    fail(tmp_path, 0, 40, "ZeroDivisionError", explained=False)
    write_json(tmp_path / "exit_codes.json", {"0": 1, "1": -9})
    assert str(failure(tmp_path, ENDED)).startswith("Rank 0 failed:\nTraceback of ZeroDivisionError\n")


def test_a_kill_comes_before_what_its_peers_raised(tmp_path: Path):
    fail(tmp_path, 0, 1, "Connection closed by peer", explained=False)
    write_json(tmp_path / "exit_codes.json", {"0": 1, "1": -9})
    error = failure(tmp_path, ENDED)
    assert isinstance(error, RankFailure)
    assert str(error).startswith("Rank 1 was killed by SIGKILL, for want of memory perhaps.")


def test_after_a_restart_only_its_own_cause_counts(tmp_path: Path):
    fail(tmp_path, 1, 100, "Connection closed by peer", explained=False)
    fail(tmp_path, 0, 5, "The loss is not finite.", explained=True, restart=1)
    error = failure(tmp_path, Ending(code=1, hung=("Rank 1 gave no sign of life.",), spoken=()))
    assert str(error) == "The loss is not finite."


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"{}\n", b"[1]\n", b'{"step": "x"}\n'])
def test_a_damaged_line_does_not_end_the_training_that_is_followed(tmp_path: Path, damage: bytes):
    journal = tmp_path / "metrics.jsonl"
    journal.write_bytes(b'{"step": 1}\n' + damage + b'{"step": 2}\n')
    progress = StepProgress(journal, 3)
    progress.report("")
    assert progress.done == 2
