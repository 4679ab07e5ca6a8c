"""A flow run whose worker is gone, and the server, too: it says so, and does not stay for long."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import PROJECT, clean_environment, wait_gone

from flows.cli.prefect_server import EmbeddedServer
from pipelines.run_directory import Root

FLOW_RUN = """
import sys, time
from pathlib import Path
import prefect.main  # sets up logging, as for a flow
from prefect.client.orchestration import get_client
from prefect.utilities.engine import capture_sigterm
from pipelines.event_log import events
from pipelines.run_directory import Root
from tasks import worker_lifetime

worker_lifetime.PATIENCE_SECONDS = 2.0
with get_client(sync_client=True) as prefect, capture_sigterm():
    prefect.read_flow_runs(limit=1)  # from now on it takes a server that does not answer for one that comes back
    try:
        with events(Root(Path(sys.argv[1])).run("first")):
            worker_lifetime.end_with_worker("the flow run")
            print("at work", flush=True)
            time.sleep(100)
    finally:
        prefect.read_flow_runs(limit=1)  # Prefect says how a flow run ended
"""

WORKER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {FLOW_RUN!r}, sys.argv[1]])"


@pytest.mark.full
def test_without_worker_and_server_it_says_what_it_waits_for_and_ends(used_root: Root):
    server = EmbeddedServer(used_root)
    server.wait_ready()
    variables = {"PREFECT__WORKER_NAME": "w", "PREFECT__FLOW_RUN_ID": "the flow run", "PREFECT_API_URL": server.api}
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, str(used_root.path)],
        env=clean_environment() | variables | {"PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as worker:
        assert worker.stdout is not None
        said = worker.stdout.readline()
        flow_run = int(Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text())
        server.close()
        worker.kill()
        killed = time.monotonic()
    assert said == b"at work\n"
    # Prefect's client alone asks six times, for more than a minute.
    left = wait_gone({flow_run}, 120)
    assert left == set()
    assert time.monotonic() - killed < 25
    warned, ended = [json.loads(line) for line in used_root.run("first").events.read_text().splitlines()]
    assert (warned["level"], ended["level"]) == ("warning", "error")
    assert f"Prefect at {server.api} does not answer" in warned["message"]
    assert "for a minute at most" in warned["message"]
    assert ended["message"] == "TerminationSignal: stopped from outside"
