"""What tests do with processes: start codecmill, wait, and see who is there still."""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from flows.__main__ import main
from infra.environment import without_servers
from pipelines.storage import STORE

PROJECT = Path(__file__).parent.parent
USERS_OWN = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME", "CODECMILL_STORE", "CODECMILL_RENDEZVOUS")
"""What a shell may have set for the user's own trainings, and what is tried or measured must not use."""


def clean_environment() -> dict[str, str]:
    """This process's environment, less the servers that it names. A store is there where the test was given one."""
    return without_servers() | {name: value for name, value in os.environ.items() if name == STORE}


def codecmill(*typed: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`codecmill TYPED` in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "flows", *typed],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "COLUMNS": "80", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def codecmill_here(*typed: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`codecmill TYPED` in a folder, carried out in this process: for what is soon done, of which the start is most."""
    output, errors = StringIO(), StringIO()
    threshold = gc.get_threshold()  # a command sets it for itself; what tests leave behind is looked at as usual
    with chdir(cwd), redirect_stdout(output), redirect_stderr(errors):
        try:
            code = main(typed)
        except SystemExit as end:  # as argparse ends after --help
            code = int(end.code or 0)
        finally:
            gc.set_threshold(*threshold)
    return subprocess.CompletedProcess(typed, code, output.getvalue(), errors.getvalue())


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.01)


def wait_gone(pids: set[int], seconds: float) -> set[int]:
    """Those of the processes that are there still when the seconds are over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(is_alive, pids)):
        time.sleep(0.05)
    return set(filter(is_alive, pids))


def is_alive(pid: int) -> bool:
    """Whether a process is there, and more than an entry that its parent has not read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may go while it is read
        return False


def descendants(pid: int) -> set[int]:
    """All that a process, and what it started, has started, as far as they are there."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return set()
    return {int(child) for child in children}.union(*(descendants(int(child)) for child in children))


def _sockets(process: int) -> set[str]:
    """The sockets that a process holds, as `socket:[number]`."""
    try:
        held = [str(each.readlink()) for each in Path(f"/proc/{process}/fd").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return set()
    return {each for each in held if each.startswith("socket:")}


def listening_on(processes: set[int]) -> list[str]:
    """Addresses that processes listen on, as in /proc/net."""
    held = set().union(*map(_sockets, processes))
    lines = [
        line.split()
        for table in ("tcp", "tcp6", "udp", "udp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    is_open = {"0A": "a TCP socket that listens", "07": "a UDP socket"}
    return [line[1].partition(":")[0] for line in lines if line[3] in is_open and f"socket:[{line[9]}]" in held]
