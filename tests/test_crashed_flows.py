"""What the tasks of a flow run are said to be after its process was killed, on Prefect's own server."""

import asyncio
import base64
import threading
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from uuid import uuid4

import pytest
from conftest import copy_prefect_database

from pipelines.attendance import Entry, FlowRun
from pipelines.run_directory import Root
from tasks.dead_runs import put_right


def tasks_of_a_killed_flow() -> dict[str, str]:
    """States of tasks, by what they were before."""
    return asyncio.run(_tasks_of_a_killed_flow())


async def _tasks_of_a_killed_flow() -> dict[str, str]:
    from prefect import flow, task
    from prefect.client.orchestration import PrefectClient
    from prefect.server.api.server import create_app
    from prefect.states import AwaitingRetry, Completed, Failed, Pending, Running

    from tasks.crashed_flows import mark_crashed

    @flow
    def shards() -> None: ...

    @task
    def encode() -> None: ...

    async with PrefectClient(create_app(ephemeral=True)) as client:
        killed = await client.create_flow_run(shards, state=Running())
        before = [Pending(), Running(), AwaitingRetry(), Completed(), Failed()]
        runs = [
            await client.create_task_run(encode, flow_run_id=killed.id, dynamic_key=str(state.name), state=state)
            for state in before
        ]
        await mark_crashed(client, killed.id, killed.run_count)
        after = [(await client.read_task_run(run.id)).state_name for run in runs]
    return dict(zip([str(state.name) for state in before], map(str, after), strict=True))


def test_of_a_killed_flow_all_tasks_that_had_not_ended_are_crashed(
    tmp_path: Path, empty_prefect_database: Path, monkeypatch: pytest.MonkeyPatch
):
    copy_prefect_database(empty_prefect_database, tmp_path / "home")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    # Prefect reads its settings once, when it is imported.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        states = fresh.submit(tasks_of_a_killed_flow).result()
    assert states == {
        "Pending": "Crashed",
        "Running": "Crashed",
        "AwaitingRetry": "Crashed",
        "Completed": "Completed",
        "Failed": "Failed",
    }


@pytest.mark.parametrize("is_ours", [True, False])
def test_only_the_server_that_the_environment_names_is_sent_its_password(
    is_ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sent: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent.append(self.headers.get("Authorization"))
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        place = f"http://127.0.0.1:{server.server_port}/api"
        monkeypatch.setenv("PREFECT_API_URL", place if is_ours else "http://127.0.0.1:9/api")
        monkeypatch.setenv("PREFECT_API_AUTH_STRING", "me:secret")
        flow_run = FlowRun(id=str(uuid4()), run_count=1, api=place, home=tmp_path)
        dead = Entry(id="dead", process=1, flow_run=flow_run)
        root = Root(tmp_path)
        root.attendance.mkdir()
        (root.attendance / "dead.json").write_text(dead.model_dump_json())
        try:
            assert put_right(root) == []
        finally:
            server.shutdown()
            thread.join()
    expected = f"Basic {base64.b64encode(b'me:secret').decode()}" if is_ours else None
    assert sent
    assert set(sent) == {expected}
