"""What the tasks of a flow run are said to be after its process was killed, on Prefect's own server."""

import asyncio
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest


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


def test_of_a_killed_flow_all_tasks_that_had_not_ended_are_crashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
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
