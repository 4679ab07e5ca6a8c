"""Who is at work under a root, and who was killed there: entries that are locked for as long as their owner lives."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from processes import PROJECT

from pipelines.attendance import Entry, anyone_dead, claimed, present, sign_in, sign_out
from pipelines.run_directory import Root

WORKER = """
import os, sys, time
from pathlib import Path
from pipelines.attendance import Entry, sign_in
from pipelines.run_directory import Root
print("here", flush=True)
sign_in(Root(Path(sys.argv[1])), Entry(id=sys.argv[2], process=os.getpid(), run="some"))
print("signed in", flush=True)
time.sleep(100)
"""


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "root")


@contextmanager
def worker(root: Root, id: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", WORKER, str(root.path), id]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        try:
            yield process
        finally:
            process.kill()


def signed_in(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "signed in\n"


def killed(root: Root, id: str) -> int:
    """Leave the entry of a process that was killed; returns its id."""
    with worker(root, id) as process:
        signed_in(process)
        process.kill()
        process.wait()
        return process.pid


def ids_claimed(root: Root) -> list[str]:
    with claimed(root) as claims:
        return [claim.entry.id for claim in claims]


def test_nobody_is_dead_where_nobody_ever_was(root: Root):
    assert not anyone_dead(root)
    assert ids_claimed(root) == []
    assert not root.path.exists(), "looking changes nothing"


@pytest.mark.timeout(30)
def test_who_signs_in_again_does_not_wait_for_himself(root: Root):
    """As where Prefect retries a flow run in the process in which it failed."""
    for run in ("first", "second"):
        sign_in(root, Entry(id="retried", process=os.getpid(), run=run))
    assert '"second"' in (root.attendance / "retried.json").read_text()
    sign_out(root, "retried")
    assert list(root.attendance.iterdir()) == []


def test_a_killed_process_is_told_from_one_at_work(root: Root):
    with worker(root, "alive") as process:
        signed_in(process)
        assert not anyone_dead(root)
        assert ids_claimed(root) == []
        pid = killed(root, "dead")
        assert anyone_dead(root)
        with claimed(root) as claims:
            assert [(claim.entry.id, claim.entry.process, claim.entry.run) for claim in claims] == [
                ("dead", pid, "some")
            ]
            assert not anyone_dead(root), "it is in good hands"
        assert anyone_dead(root), "and not any more, since it was not settled"
        with claimed(root) as claims:
            claims[0].settle()
        assert not anyone_dead(root)
        assert [file.name for file in root.attendance.iterdir()] == ["alive.json"]


@pytest.mark.usefixtures("nfs_locks")
def test_a_killed_process_is_found_also_on_nfs(root: Root):
    killed(root, "dead")
    assert ids_claimed(root) == ["dead"]


def test_who_leaves_in_peace_leaves_nothing(root: Root):
    with present(root, Entry(id="here", process=os.getpid())):
        assert json.loads((root.attendance / "here.json").read_text())["process"] == os.getpid()
        assert not anyone_dead(root)
    assert list(root.attendance.iterdir()) == []
    sign_out(root, "never was here")


def test_a_retry_takes_over_the_entry_of_its_dead_self(root: Root):
    killed(root, "retried")
    sign_in(root, Entry(id="retried", process=os.getpid()))
    try:
        assert not anyone_dead(root)
        assert ids_claimed(root) == []
        assert json.loads((root.attendance / "retried.json").read_text())["process"] == os.getpid()
    finally:
        sign_out(root, "retried")


def test_a_retry_waits_while_its_dead_self_is_put_right(root: Root):
    dead = killed(root, "retried")
    with ExitStack() as workers:
        with claimed(root) as claims:
            process = workers.enter_context(worker(root, "retried"))
            time.sleep(0.5)
            assert json.loads((root.attendance / "retried.json").read_text())["process"] == dead, "it did not wait"
            claims[0].settle()
        signed_in(process)
        assert json.loads((root.attendance / "retried.json").read_text())["process"] == process.pid
        assert not anyone_dead(root)


def test_an_entry_that_was_never_written_is_removed(root: Root):
    root.attendance.mkdir(parents=True)
    (root.attendance / "cut.json").write_text("")
    assert ids_claimed(root) == []
    assert list(root.attendance.iterdir()) == []
