"""Children that never outlive their parent, and run the code that it runs."""

import ctypes
import os
import signal
from pathlib import Path

PARENT_VARIABLE = "CODECMILL_PARENT_PID"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
"""Of linux/prctl.h."""


def die_with_parent() -> None:
    """Have the kernel SIGKILL this process when the thread that started it ends (Linux).

    The thread counts, not the process: start children from a thread that lives as long as they should. A parent that
    died before this call is noticed too, where `PARENT_VARIABLE` names it: a child may have imported for seconds before
    it gets here.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = os.environ.pop(PARENT_VARIABLE, None)  # it is not the parent of this process's children
    if parent is not None and os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Have what the children of this process leave behind become its own children, not those of process 1 (Linux)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def parent_environment() -> dict[str, str]:
    """What to add to a child's environment so that `die_with_parent` can tell that its parent is gone."""
    return {PARENT_VARIABLE: str(os.getpid())}


def with_our_sources() -> dict[str, str]:
    """What to add to a child's environment so that it imports these very sources, before all that it would find."""
    sources = str(Path(__file__).parents[1])
    # `python -m` would look in the working directory first, where somebody may have a tasks.py of their own.
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, (sources, os.environ.get("PYTHONPATH")))),
        "PYTHONSAFEPATH": "1",
    }
