"""The servers that codecmill starts: they answer, they are gone when it is gone, and a flow's records arrive."""

import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import clean_environment, descendants, is_alive, listening_on, wait_for, wait_gone

from flows.cli.services import Service, free_port
from infra.services import supervision
from pipelines.errors import CodecmillError
from pipelines.run_directory import Root

SOURCES = str(Path(__file__).parents[1])


def environment(**more: str) -> dict[str, str]:
    return {**clean_environment(), "PYTHONPATH": SOURCES, **more}


TREE = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '100']); print(p.pid, flush=True); time.sleep(100)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + TREE


@pytest.mark.parametrize("program", [TREE, STUBBORN])
def test_a_keeper_ends_all_that_its_program_started_when_its_owner_is_gone(program: str):
    keeper = subprocess.Popen(
        [sys.executable, "-m", "flows.cli.keeper", "5", sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    with keeper.stdout, keeper.stdin:
        grandchild = int(keeper.stdout.readline())
        everyone = descendants(keeper.pid)
        assert grandchild in everyone
        assert len(everyone) == 2
        keeper.stdin.close()
        assert wait_gone(everyone, 10) == set()
        assert keeper.wait(10) == 128 + signal.SIGTERM


def test_a_keeper_hands_on_the_exit_code():
    command = [sys.executable, "-m", "flows.cli.keeper", "5", sys.executable, "-c", "raise SystemExit(7)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment()) as keeper:
        assert keeper.wait(20) == 7


def test_a_program_dies_with_a_killed_keeper():
    program = "import time; print(flush=True); time.sleep(100)"
    command = [sys.executable, "-m", "flows.cli.keeper", "5", sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as keeper:
        assert keeper.stdout is not None
        keeper.stdout.readline()
        below = descendants(keeper.pid)
        assert len(below) == 1
        keeper.kill()
        assert wait_gone(below, 5) == set()


def test_what_a_killed_program_of_a_killed_keeper_started_is_ended_by_the_service(tmp_path: Path):
    """As `pkill -9 mlflow` does, whose server has the port, and would answer for the next one."""
    log = tmp_path / "log"
    service = Service("a tree", [sys.executable, "-c", TREE], environment(), 0, lambda: log.stat().st_size > 0, log)
    service.wait_ready()
    service.check()
    everyone = descendants(service.process.pid)
    grandchild = int(log.read_text())
    assert len(everyone) == 2
    service.process.kill()
    for victim in everyone - {grandchild}:
        os.kill(victim, signal.SIGKILL)
    service.process.wait(5)
    assert is_alive(grandchild)
    service.close()
    assert wait_gone({grandchild}, 5) == set()


SPEAKS = """
print("RuntimeError: no database")
print("14:07:27.921 | INFO    | Task run 'train first' - training 2546/4000 steps  63 %  loss 0.0781", flush=True)
"""


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("raise SystemExit(3)", "ended with exit code 3. Its last line: RuntimeError: no database. All of its output"),
        ("import os; os.kill(os.getpid(), 9)", "ended with exit code 137. All of its output"),
    ],
)
def test_of_one_that_ended_its_own_last_words_are_told(end: str, said: str, tmp_path: Path):
    """Not how far a training is, which a worker passes on; nor anything of one that was killed."""
    service = Service(
        "the worker", [sys.executable, "-c", SPEAKS + end], environment(), 0, lambda: False, tmp_path / "log"
    )
    with pytest.raises(CodecmillError, match=re.escape(said)):
        service.wait_ready()
    service.close()


FLOW = """
import os
import signal
import sys
import time
from pathlib import Path
from flows.cli.display import shown_progress
from flows.cli.prefect_server import embedded_prefect
from pipelines.run_directory import Root

with shown_progress(), embedded_prefect(Root(Path(sys.argv[1]))) as server:
    from prefect import flow, get_run_logger, task

    @task(retries=1)
    def double(i):
        get_run_logger().info("said by a task")
        if i == 3 and not Path(sys.argv[1], "tried").exists():
            Path(sys.argv[1], "tried").touch()
            raise OSError("try again")
        return 2 * i

    @flow
    def doubles(n):
        if len(sys.argv) > 2:
            os.kill(server.pid, signal.SIGKILL)
            while server.restarts == 0:
                time.sleep(0.1)
        return sum(double(i) for i in range(n))

    server.wait_ready()
    print(doubles(10))
"""


def start_flow(root: Path, *kill_the_server: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FLOW, str(root), *kill_the_server],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


LISTENS = """
import socket, sys, time
port, needed = map(int, sys.argv[1:])
if needed:
    time.sleep(2)
    socket.create_connection(("127.0.0.1", needed)).close()
listening = socket.create_server(("127.0.0.1", port))
time.sleep(1000)
"""

SUPERVISED = f"""
import socket, sys
from pathlib import Path
from flows.cli.services import Service
from infra.services.supervision import Supervisor
folder, first, second = Path(sys.argv[1]), *map(int, sys.argv[2:])
def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
def starting(port, needed):
    command = [sys.executable, "-c", {LISTENS!r}, str(port), str(needed)]
    return lambda: Service(f"server {{port}}", command, {{}}, port, lambda: listens(port), folder / f"{{port}}.log")
with Supervisor() as supervisor:
    supervisor.start(starting(first, 0))
    supervisor.start(starting(second, first))
    print("ready", flush=True)
    supervisor.watch()
"""


def test_what_dies_while_another_that_needs_it_starts_again_is_started_too(tmp_path: Path):
    """As PostgreSQL under Prefect's server, where memory runs out."""
    first, second = str(free_port()), str(free_port())

    def started(port: str) -> set[int]:
        """Its processes, not their keepers."""
        words = [sys.executable, "-c", LISTENS, port]
        alive = (each for each in descendants(process.pid) if is_alive(each))
        return {each for each in alive if Path(f"/proc/{each}/cmdline").read_text().split("\0")[:4] == words}

    def serving(port: str) -> set[int]:
        return {each for each in started(port) if listening_on({each})}

    command = [sys.executable, "-c", SUPERVISED, str(tmp_path), first, second]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            (needed,), (needing,) = serving(first), serving(second)
            os.kill(needing, signal.SIGKILL)
            wait_for(lambda: bool(started(second) - {needing}))
            os.kill(needed, signal.SIGKILL)
            wait_for(lambda: process.poll() is not None or bool(serving(first) and serving(second)), 30)
            assert process.poll() is None
        finally:
            process.kill()


def test_the_fourth_start_of_one_that_always_dies_is_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(supervision, "PAUSE_SECONDS", 0.0)

    def dies() -> Service:
        return Service("it", [sys.executable, "-c", "exit(3)"], {}, 0, lambda: True, tmp_path / "log")

    why = r"^it ended with exit code 3\. .* These were 4 starts within 10 minutes, so all ends\.$"
    with supervision.Supervisor() as supervisor, pytest.raises(CodecmillError, match=why):
        supervisor.start(dies)
        supervisor.watch()
    assert capsys.readouterr().err.count("It is started again.") == 3


@pytest.mark.full
def test_two_flows_at_once_over_one_new_root_leave_their_records(tmp_path: Path):
    """Both make Prefect's database at the same moment, with a server each."""
    root = tmp_path / "root"
    flows = [start_flow(root), start_flow(root)]
    outputs = [flow.communicate(timeout=200) for flow in flows]
    assert [flow.returncode for flow in flows] == [0, 0], outputs
    assert [out for out, _ in outputs] == ["90\n", "90\n"]
    errors = "".join(error for _, error in outputs)
    assert len(errors.splitlines()) == 1
    assert "OSError('try again') - Retry 1/1 will start" in errors
    with sqlite3.connect(root / "prefect" / "prefect.db") as database:
        assert database.execute("select state_type, count(*) from flow_run group by 1").fetchall() == [("COMPLETED", 2)]
        assert database.execute("select state_type, count(*) from task_run group by 1").fetchall() == [
            ("COMPLETED", 20)
        ]
        said = database.execute("select count(*) from log where message = 'said by a task'").fetchone()
        assert said == (21,)
    assert list((root / "logs").iterdir()) == []


@pytest.mark.full
def test_a_server_that_dies_under_a_flow_is_started_again(tmp_path: Path):
    flow = start_flow(tmp_path / "root", "kill")
    output, errors = flow.communicate(timeout=200)
    assert (flow.returncode, output) == (0, "90\n"), errors
    with sqlite3.connect(tmp_path / "root" / "prefect" / "prefect.db") as database:
        assert database.execute("select state_type from flow_run").fetchall() == [("COMPLETED",)]


@contextmanager
def pages(root: Path, **more: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str], set[int]]]:
    """`codecmill ui`, once it has printed its addresses; also all processes below it."""
    root.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "flows", "ui", "--root", str(root)],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        try:
            lines = [process.stdout.readline(), process.stdout.readline()]
            addresses = {what: where.strip() for what, _, where in (line.partition(":") for line in lines)}
            assert set(addresses) == {"MLflow", "Prefect"}, process.stderr.read()
            yield process, addresses, descendants(process.pid)
        finally:
            process.kill()
            process.wait()


@pytest.mark.full
def test_ui_serves_both_pages_and_leaves_no_process_however_it_ends(tmp_path: Path):
    with pages(tmp_path / "root") as (process, addresses, below):
        assert len(below) >= 5
        for address in addresses.values():
            with urllib.request.urlopen(address) as answer:  # noqa: S310  # 127.0.0.1
                assert b"<html" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert wait_gone(below, 1) == set()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", int(addresses["MLflow"].rpartition(":")[2])))
        taken.listen()
        with pages(tmp_path / "root") as (process, again, below):
            assert again["MLflow"] != addresses["MLflow"]
            process.kill()
            process.wait()
            assert wait_gone(below, 15) == set()


@pytest.mark.full
def test_ui_puts_the_address_of_a_database_on_no_command_line_says_which_server_died_and_ends_the_other(
    tmp_path: Path, empty_database: Path
):
    """It may have a password, which `ps` would show to everybody; SQLite has none, but other things after its path."""
    shutil.copy(empty_database, tmp_path / "other.db")
    served = f"sqlite:///{tmp_path}/other.db?timeout=1234"
    with pages(tmp_path / "root", MLFLOW_TRACKING_URI=served) as (process, addresses, below):
        with urllib.request.urlopen(addresses["MLflow"]) as answer:  # noqa: S310  # 127.0.0.1
            assert b"<html" in answer.read()
        said = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in {process.pid, *below}}
        assert any(b"mlflow" in line for line in said.values())
        assert [line for line in said.values() if b"timeout=1234" in line] == []
        given = f"MLFLOW_BACKEND_STORE_URI={served}".encode()
        assert any(given in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in below)

        server = [pid for pid, line in said.items() if b"prefect" in line and b"keeper" not in line]
        assert len(server) == 1
        os.kill(server[0], signal.SIGKILL)
        assert process.wait(30) == 1
        assert process.stderr is not None
        message = process.stderr.read()
        assert "codecmill: Prefect's server ended with exit code" in message
        assert wait_gone(below, 10) == set()


def test_ui_only_names_servers_that_the_environment_names(tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-m", "flows", "ui", "--root", str(tmp_path)],
        env=environment(MLFLOW_TRACKING_URI="http://me:secret@host:5000/", PREFECT_API_URL="http://other:4200/api"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == (
        "MLflow:  http://me:***@host:5000 (your server; nothing was started)\n"
        "Prefect: http://other:4200 (your server; nothing was started)\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_sigterm_while_waiting_is_143(used_root: Root):
    with pages(used_root.path) as (process, _, below):
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
        assert wait_gone(below, 1) == set()


def test_automations_go_to_a_server_that_is_named_and_answers_or_nowhere(tmp_path: Path):
    def applied(**more: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "infra.services.automations", "--root", str(tmp_path)]
        settings = environment(PREFECT_HOME=str(tmp_path / "prefect"), **more)
        done = subprocess.run(command, cwd=SOURCES, env=settings, capture_output=True, text=True)
        assert done.stdout == ""
        return done.returncode, done.stderr

    for more in ({}, {"PREFECT_API_URL": ""}):
        code, said = applied(**more)
        assert code == 2, said
        assert re.fullmatch(r"automations: There is no server .* and /.*services\.env names none\. .* --root\.\n", said)
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/api"
        code, said = applied(PREFECT_API_URL=address)
    assert code == 1, said
    assert re.fullmatch(rf"automations: Prefect's server at {address} does not answer: .* Start it, or .*\n", said)
