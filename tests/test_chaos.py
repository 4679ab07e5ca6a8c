"""A short campaign of kills at random moments, as `make chaos` runs a long one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_training import PROJECT


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_runs_that_are_killed_anywhere_end_identical_to_one_that_is_left_alone(tmp_path: Path):
    command = [sys.executable, "-m", "infra.chaos.run", "--kills", "8", "--seed", "1"]
    command += ["--root", str(tmp_path / "chaos")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "chaos" / "chaos.json").read_text())
    assert report["kills"] == sum(row["resumed"] for row in report["stages"].values()) == 8
    assert (report["identical"], report["differing"], report["orphans"]) == (report["runs"], {}, 0)
