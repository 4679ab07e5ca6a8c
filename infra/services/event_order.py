"""The order in which Prefect's automations see what becomes of flow runs: PREFECT_SERVER_EVENTS_CAUSAL_ORDERING.

Prefect 3.8 holds a change of state back until it has seen the one before, for a quarter of an hour at most. Its
scheduler makes runs without telling that they are scheduled. So all that becomes of a run which starts within five
minutes of that, as after a deployment, would reach automations a quarter of an hour late: too late for a retry, and a
run that has ended well would be taken for dead meanwhile.

What was told is remembered in memory alone. A server that was started again in mid-training would therefore hear of
the crash of a run, and hold it back for the state before, which the server before it was told.
"""

import time

from prefect.server.events.ordering import memory
from prefect.server.events.schemas.events import ReceivedEvent

BY_THE_SCHEDULER = "prefect.tag.auto-scheduled"
_START_MS = time.time_ns() // 1_000_000
"""Of this server, in ms since 1970."""
_VERSION_WITH_TIME = 7


class CausalOrdering(memory.CausalOrdering):
    """Prefect's own, which does not wait for what is never told."""

    async def wait_for_leader(self, event: ReceivedEvent) -> None:
        if not _is_first_of_schedule(event) and not _was_led_before(event, _START_MS):
            await super().wait_for_leader(event)


def _is_first_of_schedule(event: ReceivedEvent) -> bool:
    """Whether it is the first change of state of a run that the scheduler made."""
    before = event.payload.get("initial_state") or {}
    return before.get("name") == "Scheduled" and any(each.id == BY_THE_SCHEDULER for each in event.related)


def _was_led_before(event: ReceivedEvent, start_ms: int) -> bool:
    """Whether the change of state before was told to an earlier server, as far as it was told at all.

    Its id is the state's, which the server makes: a UUID of version 7, whose first 48 bits are a time in ms (RFC 9562).
    Nothing is asked of the table of events, for a server that is killed loses those of its last seconds.
    """
    leader = event.follows
    return leader is not None and leader.version == _VERSION_WITH_TIME and leader.int >> 80 < start_ms
