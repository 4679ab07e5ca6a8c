"""The turns of a schedule: a flow run that it starts while its former one is still at work ends at once, cancelled.

Prefect's limit of a deployment does the same by a lease, which the flow run renews: where its server starts anew, or is
away for some minutes, that ends a training which is well under way.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from pipelines.errors import BusyError
from pipelines.locks import lock
from pipelines.run_directory import Root


@contextmanager
def turn(root: Root) -> Iterator[Any]:
    """Hold the turn of the deployment that this flow run is of, if it is free, for the duration.

    Yields the state for the flow to return at once, where a schedule has started it and another holds it; else None.
    """
    from prefect.context import FlowRunContext
    from prefect.states import Cancelled

    context = FlowRunContext.get()
    flow_run = context and context.flow_run
    ended = None
    with ExitStack() as stack:
        if flow_run and flow_run.deployment_id:
            root.attendance.mkdir(parents=True, exist_ok=True)
            file = root.attendance / f"{flow_run.deployment_id}.turn"
            try:
                stack.enter_context(lock(file, "The turn of this schedule", wait=0.0))
            except BusyError as error:
                if flow_run.auto_scheduled:  # others are wanted by somebody, now
                    ended = Cancelled(message=str(error))
        yield ended
