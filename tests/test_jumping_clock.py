"""The machine's clock is set while a training runs: nothing of ours that waits, measures or compares goes by it.

The clock is that of the test's processes alone: each loads a `sitecustomize` that adds to `time.time` what a file says.
libfaketime 0.9.10 cannot do it: where it leaves the monotonic clock alone, Python's `time.sleep` fails with EINVAL.
"""

import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import make
from processes import PROJECT, wait_for
from trainings import TRAIN, Undisturbed, begin, result, steps_done

from pipelines.durable_files import write_json
from pipelines.evaluation.stage import _training_seconds
from pipelines.training.following import Ending, failure
from pipelines.training.journal import read

JUMPS = {50: -7200, 120: 3 * 86400, 200: -40 * 86400}
"""After which step the clock is set, to how many seconds from the true time."""

CLOCK = """
import os, time
from pathlib import Path
_true, _true_ns, _file = time.time, time.time_ns, Path(os.environ["CODECMILL_TEST_CLOCK"])
time.time = lambda: _true() + int(_file.read_text())
time.time_ns = lambda: _true_ns() + 10**9 * int(_file.read_text())
"""


def set_clock(folder: Path, offset: int) -> None:
    write_json(folder / "offset", offset)  # whole at any moment


def python(folder: Path, offset: int, code: str, *arguments: str, **environment: str) -> "subprocess.Popen[bytes]":
    """Run code in a process, and all that it starts, whose clock is as far off as the file `<folder>/offset` says."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(CLOCK)
    set_clock(folder, offset)
    faked = {"PYTHONPATH": str(folder), "CODECMILL_TEST_CLOCK": str(folder / "offset")}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=PROJECT, env=os.environ | faked | environment)


@pytest.mark.full
def test_a_training_whose_clock_jumps_goes_on_to_the_same_bits_and_its_figures_stay_true(
    tiny: dict[str, Any], tmp_path: Path, undisturbed: Undisturbed
):
    training = {"processes": 2, "steps": 300}
    directory = begin(make(tiny, training=training | {"checkpoint_interval": 40, "hang_timeout": 20}))
    begun = time.monotonic()
    with python(tmp_path / "clock", 0, TRAIN, str(directory.path)) as process:
        for step, offset in JUMPS.items():
            wait_for(lambda step=step: steps_done(directory) >= step)
            set_clock(tmp_path / "clock", offset)
        assert process.wait(120) == 0
    took = time.monotonic() - begun
    lines = list(read(directory.journal))
    gaps = [after["time"] - before["time"] for before, after in pairwise(lines)]
    assert sum(abs(gap) > 3600 for gap in gaps) == len(JUMPS), "the clock did not jump"
    assert all(1 < line["train/images_per_second"] < 100_000 for line in lines)
    assert all(0 <= line["train/data_wait_fraction"] <= 1 for line in lines)
    assert len(list(directory.logs.glob("attempt_*"))) == 1, "no rank was taken for one that hangs"
    assert 0 < _training_seconds(directory, 300) < took
    assert result(directory) == undisturbed(make(tiny, training=training))


def test_the_first_failure_is_the_cause_though_the_clock_was_set_back_before_the_second(tmp_path: Path):
    """Each rank fails for real, in a process of its own."""
    fail = "import sys\nfrom pathlib import Path\nfrom pipelines.training.worker import _record_failure\n"
    fail += "_record_failure(Path(sys.argv[1]), ValueError(sys.argv[2]))"
    for rank, (message, offset) in enumerate([("the cause", 0), ("a consequence", -86400)]):
        with python(tmp_path / "clock", offset, fail, str(tmp_path), message, RANK=str(rank)) as process:
            assert process.wait(60) == 0
    write_json(tmp_path / "exit_codes.json", {"0": 1, "1": 1})
    assert str(failure(tmp_path, Ending(1, (), ()))).startswith("Rank 0 failed:\nValueError: the cause")
