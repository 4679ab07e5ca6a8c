"""A flow run ends with the worker that started it, saved: without one nobody could cancel it or see how it ends."""

import logging
import os
import signal
import threading
import time
from functools import cache, partial

from pipelines.event_log import LOGGER

WORKER_VARIABLE = "PREFECT__WORKER_NAME"
FLOW_RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"
"""Set by Prefect's worker in what it starts, whose own children inherit both: the flow run's id tells them apart."""

LOOK_SECONDS = 1.0
PATIENCE_SECONDS = 25.0
"""How long the flow run of a worker that is gone waits for a server that does not answer: another may start meanwhile.
Then the pause of Prefect's client that is under way is its last, half a minute at most. The next command, or an
automation, finds an unheard run dead."""

_PARENT = os.getppid()
"""As early as can be: a worker that dies before this is imported is not missed."""


@cache  # once a process: the second of two signals would cut short the saving that the first began
def end_with_worker(flow_run: str) -> None:
    """Watch the worker, where one has started this flow run, and ask this process to end (SIGTERM) once it is gone.

    Not by `die_with_parent`: that follows the worker's thread, which is Prefect's to end, and would leave no time to
    save. Nor would a worker that is stopped in order: it kills its flow runs before it goes.
    """
    if WORKER_VARIABLE in os.environ and os.environ.get(FLOW_RUN_VARIABLE) == flow_run:
        _drop_unread_lines()
        threading.Thread(target=_watch, daemon=True, name="worker-watch").start()


def _drop_unread_lines() -> None:
    """Have Prefect's log go quiet once the worker does not read it any more, where rich would end the process."""
    from prefect.logging.handlers import PrefectConsoleHandler

    loggers = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    for handler in (handler for logger in loggers for handler in logger.handlers):
        if isinstance(handler, PrefectConsoleHandler):
            handler.console.on_broken_pipe = partial(setattr, handler.console, "quiet", True)


def _watch() -> None:
    from prefect.settings import PREFECT_API_URL

    from tasks.reporting import silence

    while os.getppid() == _PARENT:
        time.sleep(LOOK_SECONDS)
    api = PREFECT_API_URL.value()
    if api is not None and silence(api) is not None:
        # Before the signal, and to the run's events: nobody reads what this process prints any more.
        logging.getLogger(LOGGER).warning(
            "The worker of this flow run is gone, and Prefect at %s does not answer. "
            "It saves, asks for a minute at most to report its end, and then ends unreported.",
            api,
        )
    os.kill(os.getpid(), signal.SIGTERM)
    if api is not None:
        _give_up_on(api)


def _give_up_on(api: str) -> None:
    """For the rest of this process: where the server does not answer for `PATIENCE_SECONDS`, have it end without it."""
    from tasks.reporting import give_up, silence

    heard = time.monotonic()
    while time.monotonic() - heard < PATIENCE_SECONDS:
        time.sleep(LOOK_SECONDS)
        if silence(api) is None:
            heard = time.monotonic()
    give_up()
