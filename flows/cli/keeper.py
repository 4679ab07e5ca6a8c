"""Runs a program and ends it, with everything that it started, when the program that wanted it is gone.

`python -m flows.cli.keeper SECONDS PROGRAM ARGUMENT...`: so long it may take to end by itself. Its standard input is a
pipe that nobody else holds open: the kernel closes it when its owner ends, however it ends. PR_SET_PDEATHSIG would
reach the program alone, and not the workers that MLflow's server starts.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

from pipelines.process_lifetime import die_with_parent, parent_environment


def main(grace: float, command: list[str]) -> int:
    """Run `command` in a process group of its own; returns its exit code, 128 + N where signal N has ended it.

    Args:
        grace: seconds that it may take to end by itself.
    """
    # The program inherits that, and has to: at a SIGTERM, Prefect's worker sends itself a SIGINT, and at that it would
    # kill its flow runs; they save where it is gone without a word.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    os.environ.update(parent_environment())
    # Should the keeper itself be killed, at least the program goes with it.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent)
    threading.Thread(target=_watch_owner, daemon=True).start()
    try:
        code = process.wait()
        return code if code >= 0 else 128 - code
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_group(process, grace)


def _watch_owner() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
