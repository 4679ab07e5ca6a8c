"""Why a training ended, told from what ranks and torchrun leave behind: the first cause, and no consequence of it."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make
from processes import PROJECT
from trainings import begin

from flows.cli.services import free_port
from pipelines.durable_files import write_json
from pipelines.errors import CodecmillError, RankFailure
from pipelines.runs import start_or_continue
from pipelines.training import worker
from pipelines.training.following import Ending, StepProgress, failure

ENDED = Ending(code=1, hung=(), spoken=())


def fail(
    attempt: Path,
    rank: int,
    seconds_ago: float,
    message: str,
    explained: bool,
    restart: int = 0,
    may_pass: bool = False,
) -> None:
    about = {"rank": rank, "restart": restart, "monotonic": time.monotonic() - seconds_ago, "explained": explained}
    about |= {"exit_code": 3 if may_pass else 1, "may_pass": may_pass}
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


def test_what_was_said_before_a_restart_is_no_cause_of_what_ended_the_ranks_after_it(tmp_path: Path):
    fail(tmp_path, 0, 7200, "The disk is full.", explained=True)
    write_json(tmp_path / "exit_codes.json", {"1": -9})
    error = failure(tmp_path, Ending(code=1, hung=(), spoken=(), restart=1))
    assert isinstance(error, RankFailure)
    assert str(error).startswith("Rank 1 was killed by SIGKILL, for want of memory perhaps.")


@pytest.mark.parametrize("may_pass", [True, False])
def test_whether_it_may_pass_is_said_with_what_a_rank_explained(tmp_path: Path, may_pass: bool):
    fail(tmp_path, 0, 5, "The store does not answer.", explained=True, may_pass=may_pass)
    error = failure(tmp_path, ENDED)
    assert (error.may_pass, error.exit_code) == (may_pass, 3 if may_pass else 1)


WITHOUT_ROOM = """
import sys
from pathlib import Path
import torch
from pipelines.model.autoencoder import Decoder
from pipelines.training import worker
def full(self, latents):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79 GiB of which ...")
Decoder.forward = full
worker.main(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.full
def test_a_rank_whose_gpu_has_no_room_for_a_step_says_so_in_a_sentence(tiny: dict[str, Any], tmp_path: Path):
    """What this machine's processor cannot run out of is raised in the model of a rank that is one otherwise."""
    directory = begin(make(tiny))
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", WITHOUT_ROOM, str(directory.path), str(tmp_path)]
    assert subprocess.run(command, env={**os.environ, **place, **meeting}, check=False).returncode == 1
    assert str(failure(tmp_path, ENDED)) == (
        "The GPU has no room for a step of training.batch_size 4 and training.crop_size 16 on training.processes 1 "
        "(CUDA out of memory. Tried to allocate 20.00 GiB): go on with more processes, or share the weights out, too, "
        "with --training.parallel fsdp, or begin a run with a smaller batch or crop, or with training.virtual_ranks, "
        "which take their parts of the batch one after the other."
    )


def test_a_full_gpu_is_put_in_words_and_any_other_error_stays(tiny: dict[str, Any]):
    directory = start_or_continue(make(tiny, training={"parallel": "fsdp"}))
    full, other = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has"), ValueError("x")
    found = worker._in_words(full, directory)
    assert isinstance(found, CodecmillError) and found.__cause__ is full
    assert "(CUDA out of memory. Tried to allocate 2.00 MiB): go on with more processes, or begin a run" in str(found)
    assert worker._in_words(other, directory) is other


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"{}\n", b"[1]\n", b'{"step": "x"}\n'])
def test_a_damaged_line_does_not_end_the_training_that_is_followed(tmp_path: Path, damage: bytes):
    journal = tmp_path / "metrics.jsonl"
    journal.write_bytes(b'{"step": 1}\n' + damage + b'{"step": 2}\n')
    progress = StepProgress(journal, 3)
    progress.report("")
    assert progress.done == 2
