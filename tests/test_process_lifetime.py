"""Children that end with their parent, also one that died before they could ask for it."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from processes import wait_gone
from test_services import environment

from pipelines.process_lifetime import with_our_sources

CHILD = """
import os, time
from pipelines.process_lifetime import die_with_parent
print(os.getpid(), flush=True)
time.sleep(1)  # as for what it imports
die_with_parent()
time.sleep(100)
"""

PARENT = """
import os, subprocess, sys
from pipelines.process_lifetime import parent_environment
subprocess.run([sys.executable, "-c", sys.argv[1]], env=os.environ | parent_environment())
"""


def test_a_child_whose_parent_died_while_it_began_ends():
    program = [sys.executable, "-c", PARENT, CHILD]
    parent = subprocess.Popen(program, env=environment(), stdout=subprocess.PIPE, text=True)
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


@pytest.mark.parametrize("module", ["pipelines.data.encoding_worker", "tasks.dead_runs", "flows.cli.keeper 5"])
def test_a_child_takes_no_file_of_the_working_directory_for_ours(module: str, tmp_path: Path):
    for name in ("flows", "pipelines", "tasks"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('somebody else')\n")
    found = subprocess.run(
        [sys.executable, "-m", *module.split()],
        env=os.environ | with_our_sources(),
        cwd=tmp_path,
        input="",
        capture_output=True,
    )
    assert b"somebody else" not in found.stderr
    assert b"No module named" not in found.stderr
