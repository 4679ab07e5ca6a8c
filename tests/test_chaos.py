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


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_run_that_is_killed_at_a_crash_point_ends_identical(tmp_path: Path):
    folder = tmp_path / "points"
    command = [sys.executable, "-m", "infra.chaos.points", "--points", "3", "--seed", "2", "--root", str(folder)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads((folder / "points.json").read_text())
    assert [each["differing"] for each in outcomes if each["reached"]], "at least one of them came"
    kinds = {json.loads(line)["kind"] for line in (folder / "record.jsonl").read_text().splitlines()}
    assert kinds >= {"write", "fsync", "rename", "replace", "unlink", "log call", "collective"}
