"""Runs and shard sets in a store: sent behind the training, resumed elsewhere to the same bits, never half believed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import make
from object_store import Proxy, the_store
from test_training import PROJECT, begin, ranks_alive, result, steps_done, train, wait_for

from pipelines.run_directory import Root, RunDirectory
from pipelines.storage.keys import complete_steps

TRAIN = """
import sys
from pathlib import Path
from pipelines.run_directory import RunDirectory
from pipelines.storage.bringing import catch_up
from pipelines.training import launch
from pipelines.training.uploading import Uploading
directory = RunDirectory(Path(sys.argv[1]))
with directory.locked(wait=30) as lock:
    catch_up(directory)
    with Uploading(directory, warn=lambda text: print("WARNING", text, flush=True)):
        launch.train(directory, lock, on_line=lambda line: print(line, flush=True))
"""


def start(directory: RunDirectory) -> "subprocess.Popen[str]":
    """A training with its uploads in a process of its own, which can be killed."""
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(directory.path)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_killed_training_goes_on_elsewhere_with_nothing_but_the_address_to_the_same_bits(
    tiny: dict[str, Any], tmp_path: Path, proxy: Proxy
):
    long = {"steps": 400, "checkpoint_interval": 50, "validation_interval": 200}
    alone = begin(make(tiny, name="alone", training=long))
    train(alone)
    there = begin(make(tiny, training=long))
    process = start(there)
    wait_for(lambda: complete_steps(the_store(), "tiny") != [] and steps_done(there) > 100, 60)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not ranks_alive(there), 30)
    assert steps_done(there) < 400
    the_store_has_the_shards = list(the_store().list("shards/"))
    assert len(the_store_has_the_shards) > 3
    expected = result(alone)
    shutil.rmtree(tmp_path / "root")

    elsewhere = Root(tmp_path / "elsewhere").run("tiny")
    out, _ = start(elsewhere).communicate(timeout=120)
    assert "Resuming at step" in out and "WARNING" not in out
    assert result(elsewhere) == expected
