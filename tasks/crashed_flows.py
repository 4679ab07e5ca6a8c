"""What Prefect says of flow runs whose process was killed, put right; a program, since importing Prefect takes seconds.

`python -m tasks.crashed_flows FLOW_RUN:RUN_COUNT...`, with PREFECT_API_URL in the environment, or PREFECT_HOME alone.
Over a home, whose server has died with the flow, Prefect's server is asked inside this process: it takes 3 s less.
"""

import asyncio
import sys
from collections.abc import Sequence
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    TaskRunFilter,
    TaskRunFilterFlowRunId,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import TERMINAL_STATES, StateType
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Crashed

from pipelines.process_lifetime import die_with_parent

MESSAGE = "Its process was killed. What it had saved is on disk: codecmill resume goes on from there."
_UNDER_WAY = [StateType.RUNNING, StateType.CANCELLING]


async def mark_crashed(client: PrefectClient, flow_run: UUID, run_count: int) -> None:
    """Set a flow run that is said to run, and its tasks, to Crashed; not one that was started again or has ended."""
    try:
        known = await client.read_flow_run(flow_run)
    except ObjectNotFound:
        return
    if known.run_count != run_count:
        return
    await _mark_tasks_crashed(client, flow_run)
    if known.state is not None and known.state.type in _UNDER_WAY:
        await client.set_flow_run_state(flow_run, Crashed(message=MESSAGE), force=True)


async def _mark_tasks_crashed(client: PrefectClient, flow_run: UUID) -> None:
    """Those that have not ended, also those that were about to begin, or to retry."""
    not_ended = [each for each in StateType if each not in TERMINAL_STATES]
    tasks = TaskRunFilter(
        flow_run_id=TaskRunFilterFlowRunId(any_=[flow_run]),
        state=TaskRunFilterState(type=TaskRunFilterStateType(any_=not_ended)),
    )
    for task in await client.read_task_runs(task_run_filter=tasks):
        await client.set_task_run_state(task.id, Crashed(message=MESSAGE), force=True)


async def main(flow_runs: Sequence[str]) -> None:
    async with _client() as client:
        for each in flow_runs:
            id, _, run_count = each.partition(":")
            await mark_crashed(client, UUID(id), int(run_count))


def _client() -> PrefectClient:
    if PREFECT_API_URL.value():
        return get_client()
    from prefect.server.api.server import create_app

    return PrefectClient(create_app(ephemeral=True))


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(main(sys.argv[1:]))
