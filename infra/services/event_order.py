"""The order in which Prefect's automations see what becomes of flow runs: PREFECT_SERVER_EVENTS_CAUSAL_ORDERING.

Prefect 3.8 holds a change of state back until it has seen the one before, for a quarter of an hour at most. Its
scheduler makes runs without telling that they are scheduled. So all that becomes of a run which starts within five
minutes of that, as after a deployment, would reach automations a quarter of an hour late: too late for a retry, and a
run that has ended well would be taken for dead meanwhile.
"""

from prefect.server.events.ordering import memory
from prefect.server.events.schemas.events import ReceivedEvent

BY_THE_SCHEDULER = "prefect.tag.auto-scheduled"


class CausalOrdering(memory.CausalOrdering):
    """Prefect's own, which does not wait for what is never told."""

    async def wait_for_leader(self, event: ReceivedEvent) -> None:
        if not _is_first_of_schedule(event):
            await super().wait_for_leader(event)


def _is_first_of_schedule(event: ReceivedEvent) -> bool:
    """Whether it is the first change of state of a run that the scheduler made."""
    before = event.payload.get("initial_state") or {}
    return before.get("name") == "Scheduled" and any(each.id == BY_THE_SCHEDULER for each in event.related)
