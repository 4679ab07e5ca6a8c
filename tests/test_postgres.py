"""PostgreSQL's cluster is opened again after whatever end its server had, and never under one that serves it."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import wait_for

from flows.cli.services import free_port
from infra.services.postgres import SYSTEM_USER, Cluster, cluster
from pipelines.errors import CodecmillError

pytestmark = [pytest.mark.full, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def databases() -> Iterator[Cluster]:
    """Where PostgreSQL's user can get to, as it cannot below pytest's own temporary folder."""
    path = Path(tempfile.mkdtemp(prefix="codecmill-"))
    path.chmod(0o711)
    made = cluster(path / "postgres")
    made.make()
    yield made
    shutil.rmtree(path)


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """As PostgreSQL's user, whose processes alone PostgreSQL takes for its server."""
    user = SYSTEM_USER if os.geteuid() == 0 else None
    return subprocess.Popen(command, cwd="/", user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("is_dead", [True, False], ids=["dead and not waited for", "another program's number"])
def test_the_note_of_a_server_that_is_gone_stops_nobody(databases: Cluster, is_dead: bool):
    other = start(["sleep", "100"])
    if is_dead:
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    note = databases.folder / "postmaster.pid"
    note.write_text(f"{other.pid}\n{databases.folder}\n0\n5432\n\n127.0.0.1\n")
    try:
        databases.set_password("new")
    finally:
        other.kill()
        other.wait()
    assert not note.exists()


def test_a_server_at_work_is_left_alone(databases: Cluster):
    port = free_port()
    server = subprocess.Popen(databases.command(port), cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: databases.is_ready(port), 60)
        with pytest.raises(CodecmillError, match=f"PID {server.pid}"):
            databases.set_password("new")
        assert databases.is_ready(port)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
