"""A flow run ends with the worker that started it, saved: without one nobody could cancel it or see how it ends."""

import logging
import os
import signal
import threading
import time
from functools import partial

WORKER_VARIABLE = "PREFECT__WORKER_NAME"
"""Set by Prefect in what a worker starts, and in nothing else."""

LOOK_SECONDS = 1.0


def end_with_worker() -> None:
    """Watch the worker, where there is one, and ask this process to end (SIGTERM) as soon as it is gone.

    Not by `die_with_parent`: that follows the worker's thread, which is Prefect's to end, and would leave no time to
    save.
    """
    if WORKER_VARIABLE in os.environ:
        _drop_unread_lines()
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True, name="worker-watch").start()


def _drop_unread_lines() -> None:
    """Have Prefect's log go quiet once the worker does not read it any more, where rich would end the process."""
    from prefect.logging.handlers import PrefectConsoleHandler

    loggers = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    for handler in (handler for logger in loggers for handler in logger.handlers):
        if isinstance(handler, PrefectConsoleHandler):
            handler.console.on_broken_pipe = partial(setattr, handler.console, "quiet", True)


def _watch(worker: int) -> None:
    while os.getppid() == worker:
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
