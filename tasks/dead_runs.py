"""Runs whose processes were all killed: what MLflow and Prefect say of them is put right by whoever comes next.

A program as well: `python -m tasks.dead_runs ROOT`. It is started beside a command, ends within two minutes, and asks
MLflow and Prefect in processes of their own, both at once, so that it takes some 5 s and the command none.
"""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path

from pipelines.attendance import Claim, FlowRun, anyone_dead, claimed
from pipelines.errors import BusyError
from pipelines.locks import lock
from pipelines.process_lifetime import parent_environment, with_our_sources
from pipelines.run_directory import Root
from pipelines.service_addresses import prefect_at

LONGEST_SECONDS = 120
_QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    # The tables are there, and two who migrate them at once break them.
    "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": "false",
}


def put_right_beside(root: Root, servers: Mapping[str, str] | None = None) -> None:
    """Start the program for a root where somebody was killed; takes a millisecond where nobody was.

    Args:
        servers: variables that name the servers and let it in, where this process's environment does not.
    """
    if not anyone_dead(root):
        return
    process = subprocess.Popen(
        [sys.executable, "-m", "tasks.dead_runs", str(root.path.absolute())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | with_our_sources() | dict(servers or {}),
        start_new_session=True,
    )
    threading.Thread(target=process.wait, daemon=True).start()


def put_right(root: Root) -> list[str]:
    """Mark all who were killed: KILLED in MLflow, Crashed in Prefect; returns what could not be done, for the log.

    What could not be done is tried again by the next command.
    """
    faults: list[str] = []
    with claimed(root) as claims:
        asked = [(_ask_mlflow(root, claims), [each for each in claims if each.entry.run])] if claims else []
        places: dict[str, list[Claim]] = {}
        for each in claims:
            if each.entry.flow_run is not None:
                places.setdefault(_place(root, each.entry.flow_run), []).append(each)
        asked += [(_ask_prefect(place, known), known) for place, known in places.items()]
        unsettled: set[Path] = set()
        for process, concerned in asked:
            _, said = process.communicate()
            if process.returncode != 0:
                unsettled |= {each.file for each in concerned}
                faults.append(said.strip())
        for each in claims:
            if each.file not in unsettled:
                each.settle()
    return faults


def _ask_mlflow(root: Root, claims: list[Claim]) -> "subprocess.Popen[str]":
    names = sorted({each.entry.run for each in claims if each.entry.run})
    return _start(["pipelines.tracking.killed", str(root.path), *names], {})


def _ask_prefect(place: str, claims: list[Claim]) -> "subprocess.Popen[str]":
    runs = [each.entry.flow_run for each in claims if each.entry.flow_run is not None]
    is_server = place.startswith(("http://", "https://"))
    named = [f"{run.id}:{run.run_count}" for run in runs]
    settings = ({"PREFECT_API_URL": place} if is_server else prefect_at(Path(place))) | _QUIET
    if is_server and os.environ.get("PREFECT_API_URL", place) != place:
        # The environment speaks of another server, whose password is none of this one's business.
        settings |= dict.fromkeys(("PREFECT_API_AUTH_STRING", "PREFECT_API_KEY"), "")
    return _start(["tasks.crashed_flows", *named], settings)


def _start(module: list[str], settings: dict[str, str]) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    return subprocess.Popen(
        [sys.executable, "-m", *module],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment | settings | with_our_sources() | parent_environment(),
        text=True,
    )


def _place(root: Root, flow_run: FlowRun) -> str:
    """Where a flow run is known: Prefect's home under the root, whose server died with its flow, or a server."""
    if _knows(root.prefect_home, flow_run.id):
        return str(root.prefect_home)
    return flow_run.api or str(flow_run.home)


def _knows(home: Path, flow_run: str) -> bool:
    database = home / "prefect.db"
    if not database.is_file():
        return False
    address = f"{database.absolute().as_uri()}?mode=ro"
    with suppress(sqlite3.Error), closing(sqlite3.connect(address, uri=True)) as opened:
        return bool(opened.execute("SELECT 1 FROM flow_run WHERE id = ?", (flow_run,)).fetchall())
    return False


def main(root: Root) -> None:
    signal.alarm(LONGEST_SECONDS)  # a server that neither answers nor refuses
    with suppress(BusyError), lock(root.attendance / ".lock", "What the killed have left", wait=30):
        faults = put_right(root)
        if faults:
            logs = root.path / "logs"
            logs.mkdir(exist_ok=True)
            with (logs / "dead-runs.log").open("a", encoding="utf-8") as log:
                log.writelines(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC {fault}\n" for fault in faults)


if __name__ == "__main__":
    main(Root(Path(sys.argv[1])))
