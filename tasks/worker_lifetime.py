"""A flow run ends with the worker that started it, saved: without one nobody could cancel it or see how it ends."""

import logging
import os
import signal
import threading
import time
from functools import cache, partial

WORKER_VARIABLE = "PREFECT__WORKER_NAME"
FLOW_RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"
"""Set by Prefect's worker in what it starts, whose own children inherit both: the flow run's id tells them apart."""

LOOK_SECONDS = 1.0

_PARENT = os.getppid()
"""As early as can be: a worker that dies before this is imported is not missed."""


@cache  # once a process: the second of two signals would cut short the saving that the first began
def end_with_worker(flow_run: str) -> None:
    """Watch the worker, where one has started this flow run, and ask this process to end (SIGTERM) once it is gone.

    Not by `die_with_parent`: that follows the worker's thread, which is Prefect's to end, and would leave no time to
    save. A worker that is stopped in order ends its flow runs before it goes.
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
    while os.getppid() == _PARENT:
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
