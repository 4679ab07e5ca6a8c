"""Children that end with their parent, also one that died before they could ask for it."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from processes import wait_gone
from test_services import environment

POOL = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from pipelines.process_lifetime import die_with_parent


def begin():
    print(os.getpid(), flush=True)
    time.sleep(1)  # as for what it imports
    die_with_parent()


if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn"), begin) as pool:
        pool.submit(abs, 1).result()
        time.sleep(100)
"""


def test_a_process_of_a_pool_whose_parent_died_while_it_began_ends(tmp_path: Path):
    program = tmp_path / "pool.py"
    program.write_text(POOL)
    parent = subprocess.Popen([sys.executable, str(program)], env=environment(), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    try:
        assert wait_gone({child}, 10) == set()
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
