"""torchrun's c10d rendezvous with an eye on who is gone, in an agent's process: torchrun's backend 'codecmill'.

Three things are done otherwise. An agent whose ranks wait for a host that was cut off would wait with them, for as
long as TCP does: this one looks whether all hosts of its round are still there. One that is cut off itself would hang
in a call to the store: here a thread ends agent and ranks when nothing was heard from it. And an agent that has lost
the rendezvous would close it for all others if it came back in that moment: here only one whose ranks have ended does.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
    Token,
)

from pipelines.training.following import LOST
from pipelines.training.rendezvous import parse

BACKEND = "codecmill"

BEAT_SECONDS, BEATS_MISSED = 2, 5
"""A host that is silent for so many beats is gone. The clocks of the hosts may differ by less than that."""

SILENCE_SECONDS = 15.0
"""Without a word from the store an agent ends its ranks and itself. A little longer than `BEAT_SECONDS * BEATS_MISSED`:
where a host that was lost has come back, the others are to have noticed."""

LAST_CALL_SECONDS = 5
"""How long the first host waits for others, where not all are there."""

STORE_SECONDS = 10
"""How long an answer of the store may take."""


class _Backend(C10dRendezvousBackend):
    """The state of the rendezvous in the store, and when that was heard from last."""

    heard = 0.0

    @property
    def name(self) -> str:
        return BACKEND

    def get_state(self) -> tuple[bytes, Token] | None:
        found = super().get_state()
        self.heard = time.monotonic()
        return found

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        found = super().set_state(state, token)
        self.heard = time.monotonic()
        return found


class Membership(DynamicRendezvousHandler):
    """A rendezvous that counts hosts which are gone like such that want to join: either way the ranks start anew."""

    _round = -1
    _hosts = 0

    def next_rendezvous(self) -> RendezvousInfo:
        found = super().next_rendezvous()
        self._round, self._hosts = self._state_holder.state.round, found.world_size
        return found

    def num_nodes_waiting(self) -> int:
        waiting = super().num_nodes_waiting()
        state = self._state_holder.state
        is_mine = state.round == self._round and self._this_node in state.participants
        gone = self._hosts - len(state.participants) if is_mine else self._hosts
        if gone > 0:
            print(f"{gone} of {self._hosts} hosts are gone; those that are here go on", flush=True)
            _kill_ranks()  # asked to save, they would wait for the others
        return waiting + max(0, gone)

    def shutdown(self) -> bool:
        """Close it for all, unless this host alone has lost it."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ChildFailedError):
            self._stop_heartbeats()
            return False
        return super().shutdown()


def create(parameters: RendezvousParameters) -> Membership:
    """The rendezvous of a training: of its rounds since it last ended, as the store counts."""
    meeting = parse(parameters.endpoint)
    store = TCPStore(
        meeting.host,
        meeting.port,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=STORE_SECONDS),
    )
    counter = f"codecmill/{parameters.run_id}"
    while True:
        ended = store.add(counter, 0)
        backend = _Backend(store, f"{parameters.run_id}.{ended}")
        membership = Membership.from_backend(
            run_id=f"{parameters.run_id}.{ended}",
            store=store,
            backend=backend,
            min_nodes=parameters.min_nodes,
            max_nodes=parameters.max_nodes,
            local_addr=parameters.local_addr,
            timeout=RendezvousTimeout(last_call=timedelta(seconds=LAST_CALL_SECONDS), close=timedelta(seconds=5)),
            keep_alive_interval=BEAT_SECONDS,
            keep_alive_max_attempt=BEATS_MISSED,
        )
        if not membership.is_closed():
            break
        store.compare_set(counter, str(ended), str(ended + 1))  # of many that find it closed, one counts it
    threading.Thread(target=_watch, args=(backend,), name="watch on the store", daemon=True).start()
    return membership


def register() -> None:
    """Make it known to torchrun."""
    rendezvous_handler_registry.register(BACKEND, create)


def _watch(backend: _Backend) -> None:
    """End the ranks and this process once the store is silent."""
    while (silence := time.monotonic() - backend.heard) < SILENCE_SECONDS:
        time.sleep(min(1.0, SILENCE_SECONDS - silence))
    _kill_ranks()
    print(f"The rendezvous was not heard from for {silence:.0f} s: the ranks of this host are ended", flush=True)
    os._exit(LOST)  # the main thread may be in a call to the store that never returns


def _kill_ranks() -> None:
    for children in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)
