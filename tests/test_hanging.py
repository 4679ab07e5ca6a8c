"""A rank that hangs: noticed from outside, named with where it was, killed, and the training goes on."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import make
from processes import PROJECT, wait_for
from trainings import Undisturbed, begin, last_rank, ranks_alive, result, steps_done

from pipelines.errors import RankFailure
from pipelines.run_directory import RunDirectory
from pipelines.training import heartbeat, launch
from pipelines.training.heartbeat import Watch

HUNG = r"Rank \d \(process (\d+), stopped\) gave no sign of life for [4-7] s, .* after it began .*It was killed"


class StopsOne:
    """Stops (SIGSTOP) one of the ranks once, when some steps are done."""

    def __init__(self, directory: RunDirectory):
        self._directory = directory
        self.lines: list[str] = []
        self.process: int | None = None
        self.at = 0.0

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        if "Starting at step" in line and self.process is None:
            wait_for(lambda: steps_done(self._directory) >= 12)
            self.process = last_rank(self._directory)
            os.kill(self.process, signal.SIGSTOP)
            self.at = time.monotonic()


@pytest.mark.full
def test_a_stopped_rank_is_named_and_the_ranks_are_started_again(tiny: dict[str, Any], undisturbed: Undisturbed):
    training = {"processes": 2, "steps": 300}
    patience = {"checkpoint_interval": 10, "hang_timeout": 4, "max_restarts": 1}
    directory = begin(make(tiny, name="hung", training=training | patience))
    stops = StopsOne(directory)
    with directory.locked(wait=5) as lock:
        launch.train(directory, lock, on_line=stops)
    found = [match for line in stops.lines if (match := re.search(HUNG, line))]
    assert [int(match[1]) for match in found] == [stops.process]
    assert any("Resuming at step" in line for line in stops.lines)
    assert any('"<no Python frame>"' in line or "most recent call first" in line for line in stops.lines), "no stacks"
    assert result(directory) == undisturbed(make(tiny, training=training))


BEATS = """
import sys
from pathlib import Path
from pipelines.training.heartbeat import open_heartbeat
beat = open_heartbeat(Path(sys.argv[1]), 0, 0, restart=int(sys.argv[2]))
print("beating", flush=True)
while True:
    beat(1, "a step")
"""


def test_who_looks_in_the_midst_of_a_sign_sees_a_rank_that_is_alive(tmp_path: Path):
    with subprocess.Popen(
        [sys.executable, "-c", BEATS, str(tmp_path), "1"], cwd=PROJECT, stdout=subprocess.PIPE
    ) as rank:
        try:
            assert rank.stdout and rank.stdout.readline()
            watch = Watch(tmp_path, timeout=60, compiles=False)
            end = time.monotonic() + 2
            while time.monotonic() < end:
                watch.look()
                assert watch.found == [] and rank.poll() is None
        finally:
            rank.kill()


def test_a_pause_of_the_whole_machine_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heartbeat, "DUMP_SECONDS", 0.1)
    with subprocess.Popen(
        [sys.executable, "-c", BEATS, str(tmp_path), "1"], cwd=PROJECT, stdout=subprocess.PIPE
    ) as rank:
        try:
            assert rank.stdout and rank.stdout.readline()
            watch = Watch(tmp_path, timeout=1, compiles=False)
            watch.look()
            rank.send_signal(signal.SIGSTOP)
            time.sleep(1.2)  # as who watches does, when all are paused
            watch.look()
            rank.send_signal(signal.SIGCONT)
            for _ in range(10):
                time.sleep(0.05)
                watch.look()
            assert watch.found == [] and rank.poll() is None
            rank.send_signal(signal.SIGSTOP)
            wait_for(lambda: watch.look() or rank.poll() == -signal.SIGKILL, 20)
            assert re.search(r"\(process \d+, stopped\) gave no sign of life for 1 s", watch.found[0])
            assert watch.restart == 1
            assert (watch.found_of(1), watch.found_of(2)) == (watch.found, []), "of ranks that were started anew"
        finally:
            rank.kill()


def test_without_a_restart_the_failure_says_which_rank_hung(tiny: dict[str, Any]):
    directory = begin(make(tiny, training={"processes": 2, "steps": 100_000, "hang_timeout": 4}))
    stops = StopsOne(directory)
    with directory.locked(wait=5) as lock, pytest.raises(RankFailure, match=HUNG):
        launch.train(directory, lock, on_line=stops)
    assert time.monotonic() - stops.at < 4 + 30
    assert not ranks_alive(directory)


def test_a_rank_that_is_stopped_before_it_has_found_the_others_is_noticed(tiny: dict[str, Any]):
    directory = begin(make(tiny, training={"processes": 2, "steps": 100_000, "hang_timeout": 4}))
    stopped: list[float] = []

    def stop_one() -> None:
        wait_for(lambda: [file.stat().st_size > 0 for file in directory.logs.glob("*/heartbeat_*")] == [True, True])
        os.kill(last_rank(directory), signal.SIGSTOP)
        stopped.append(time.monotonic())

    stopping = threading.Thread(target=stop_one)
    stopping.start()
    with directory.locked(wait=5) as lock, pytest.raises(RankFailure, match=HUNG + ".*") as caught:
        launch.train(directory, lock, on_line=print)
    stopping.join()
    assert time.monotonic() - stopped[0] < 4 + 20, "the other, who hears no SIGTERM, was waited for"
    assert "after it began to warm up" in str(caught.value)
    assert not steps_done(directory)
    assert not ranks_alive(directory)
