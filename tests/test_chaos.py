"""A short campaign of kills at random moments, as `make chaos` runs a long one, and whether its report is honest."""

import json
import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from processes import PROJECT, USERS_OWN, wait_for

from infra.chaos import run as campaign
from infra.chaos.results import Ending, Kill, faults_of, report_of, table
from infra.chaos.small_runs import SmallRun, interrupted

FINE = Kill("run-001", "training", "everything", 8.0, 130, 1, 0, resumed=True, redone=5, recovery=9.04)
ENDED = Ending("run-001", "run-001.log")


def reported(kills: list[Kill], endings: list[Ending], wanted: int | None = None) -> dict[str, Any]:
    return report_of(kills, endings, len(kills) if wanted is None else wanted, interval=25, seed=3, seconds=60)


def test_a_campaign_in_which_all_went_well_is_told_stage_by_stage():
    kills = [
        FINE,
        replace(FINE, stage="shards", victim="a shard worker", reached=0, starts=0, redone=None, recovery=None),
        replace(FINE, run="run-002", redone=25, recovery=7.0),
        replace(FINE, run="run-002", stage="evaluation", reached=400, redone=None, recovery=4.0),
    ]
    report = reported(kills, [ENDED, replace(ENDED, run="run-002")])
    assert report["failures"] == []
    assert (report["kills"], report["runs"], report["identical"], report["orphans"]) == (4, 2, 2, 0)
    assert report["stages"]["training"] == {
        "kills": 2,
        "resumed": 2,
        "identical": 2,
        "most_steps_redone": 25,
        "longest_recovery": 9.0,
    }
    assert report["stages"]["shards"]["longest_recovery"] is None
    assert report["stages"]["evaluation"]["longest_recovery"] == 4.0
    assert report["stages"]["end"]["kills"] == 0
    assert json.loads(json.dumps(report))["victims"] == {"everything": 3, "a shard worker": 1}
    assert "FAILED" not in table(report)


def test_a_run_that_does_not_resume_is_in_the_report_with_its_kills_and_its_log():
    kills = [FINE, replace(FINE, run="run-002"), replace(FINE, run="run-002", stage="evaluation", resumed=False)]
    endings = [ENDED, Ending("run-002", "folder/run-002.log", failure="exit code 1")]
    report = reported(kills, endings)
    assert report["failures"] == [
        "run-002 did not come to its end: exit code 1. Its log is folder/run-002.log.",
        "run-002, killed in the stage 'evaluation' (everything), was not resumed.",
    ]
    stages = report["stages"]
    assert (stages["training"]["kills"], stages["training"]["resumed"], stages["training"]["identical"]) == (2, 2, 1)
    assert (stages["evaluation"]["kills"], stages["evaluation"]["resumed"]) == (1, 0)
    assert (report["runs"], report["identical"]) == (2, 1)
    assert "FAILED: run-002 did not come to its end" in table(report)


@pytest.mark.parametrize(
    ("kills", "ending", "wanted", "failure"),
    [
        ([FINE], ENDED, 2, "Only 1 of 2 kills were done."),
        ([FINE], replace(ENDED, differing=["alias", "step"]), 1, "otherwise than the run left alone: alias, step."),
        ([FINE], replace(ENDED, faults=["MLflow has it twice."]), 1, "run-001: MLflow has it twice."),
        ([replace(FINE, redone=26)], ENDED, 1, "did 26 steps again; the checkpoint interval is 25."),
        ([replace(FINE, orphans=2)], ENDED, 1, "left 2 processes alive."),
    ],
)
def test_each_broken_promise_fails_the_campaign(kills: list[Kill], ending: Ending, wanted: int, failure: str):
    report = reported(kills, [ending], wanted)
    (found,) = report["failures"]
    assert found.endswith(failure)
    assert report["identical"] == (1 if ending == ENDED else 0)


def database(file: Path, statuses: list[str], points: list[tuple[str, int]]) -> Path:
    """The two tables of MLflow's that are looked at, as far as they are."""
    with closing(sqlite3.connect(file)) as opened, opened:
        opened.execute("CREATE TABLE runs (status TEXT)")
        opened.execute("CREATE TABLE metrics (key TEXT, step INTEGER, value REAL, timestamp INTEGER)")
        opened.executemany("INSERT INTO runs VALUES (?)", [(status,) for status in statuses])
        opened.executemany("INSERT INTO metrics VALUES (?, ?, 1.5, 7)", points)
    return file


def test_what_is_wrong_in_mlflow_is_found_with_nothing_to_compare_it_with(tmp_path: Path):
    losses = [("train/loss", step) for step in (1, 2, 3)]
    assert faults_of(database(tmp_path / "fine", ["FINISHED"], [*losses, ("test/psnr", 3)]), steps=3) == []
    twice = database(tmp_path / "twice", ["FINISHED"], [*losses, ("train/loss", 2), ("test/psnr", 3), ("test/psnr", 3)])
    assert faults_of(twice, steps=3) == [
        "MLflow has more than one value of test/psnr for step 3.",
        "MLflow has more than one value of train/loss for step 2.",
    ]
    gap = database(tmp_path / "gap", ["RUNNING"], [*losses, ("train/psnr", 1), ("train/psnr", 3)])
    assert faults_of(gap, steps=3) == [
        "MLflow has runs that are ['RUNNING'], and not one, FINISHED.",
        "MLflow has train/psnr of 2 steps, and not of each up to 3.",
    ]
    empty = database(tmp_path / "empty", ["FINISHED", "KILLED"], [])
    assert [fault.partition(" of ")[0] for fault in faults_of(empty, steps=3)] == [
        "MLflow has runs that are ['FINISHED', 'KILLED'], and not one, FINISHED.",
        "MLflow has train/loss",
    ]


@dataclass(frozen=True)
class Scripted(SmallRun):
    """A run whose commands are shell scripts: the first, then others in its place."""

    scripts: tuple[str, ...] = ()

    def command(self) -> list[str]:
        begun = len(self.log.read_bytes().splitlines())
        return ["sh", "-c", f"echo begun; {self.scripts[min(begun, len(self.scripts) - 1)]}"]


class AtOnce(random.Random):
    """Chooses who is killed as ever, and kills half a second after each start."""

    def uniform(self, a: float, b: float) -> float:
        return 0.5


@pytest.mark.parametrize(
    ("scripts", "failure", "resumed", "recovered"),
    [
        (("exec sleep 60", "exit 3"), "exit code 3", [False], [False]),
        (("exit 4",), "exit code 4", [], []),
        (("exec sleep 60", "exec sleep 60", "exit 0"), None, [True, True], [False, True]),
        (("exec sleep 60", "exec sleep 60", "exit 1"), "exit code 1", [True, False], [False, False]),
    ],
)
def test_commands_that_fail_end_their_run_and_not_the_campaign(
    tmp_path: Path, scripts: tuple[str, ...], failure: str | None, resumed: list[bool], recovered: list[bool]
):
    """With real processes, though not codecmill's."""
    run = Scripted(tmp_path, "scripted", steps=32, scripts=scripts)
    run.log.touch()
    kills, found = campaign.disturbed(run, wanted=2, usual=1.0, chance=AtOnce(1))
    assert found == failure
    assert [kill.resumed for kill in kills] == resumed
    assert [kill.recovery is not None for kill in kills] == recovered
    assert run.alive() == {}


def test_a_campaign_knows_nothing_of_the_users_servers_and_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From a store an earlier campaign's runs would come, trained already: nothing would be killed or compared."""
    for name in USERS_OWN:
        monkeypatch.setenv(name, "theirs")
    run = Scripted(tmp_path, "scripted", steps=32, scripts=("env",))
    run.log.touch()
    run.finish()
    assert f"CODECMILL_CHAOS={run.root}" in run.log.read_text()
    assert "theirs" not in run.log.read_text()


def test_a_run_that_says_it_is_done_and_has_made_nothing_is_a_failure(tmp_path: Path):
    ending = campaign.ending_of(SmallRun(tmp_path, "empty", steps=32), None, {})
    assert ending.failure is not None
    assert ending.failure.startswith("what it should end with cannot be read (ValueError")


class CtrlC(AtOnce):
    """Kills once; when the run is on its way again, Ctrl-C comes."""

    comes = False

    def uniform(self, a: float, b: float) -> float:
        if self.comes:
            raise KeyboardInterrupt
        self.comes = True
        return super().uniform(a, b)


def test_ctrl_c_leaves_nothing_of_a_disturbed_run(tmp_path: Path):
    run = Scripted(tmp_path, "scripted", steps=32, scripts=("exec sleep 60", "sleep 60 & sleep 60"))
    run.log.touch()
    with pytest.raises(KeyboardInterrupt):
        campaign.disturbed(run, wanted=2, usual=1.0, chance=CtrlC(1))
    assert run.alive() == {}


@pytest.mark.parametrize(
    ("module", "name", "first", "said"),
    [
        ("infra.chaos.run", "chaos", "alone", "codecmill chaos: interrupted; nothing was found by then"),
        ("infra.chaos.points", "points", "alone", "codecmill chaos-points: interrupted; nothing was found by then"),
        pytest.param("infra.gpu_check.run", "gpu-check", "alone-ddp", "", marks=pytest.mark.full),
    ],
)
def test_ctrl_c_ends_a_campaign_with_its_run_and_a_sentence(
    tmp_path: Path, module: str, name: str, first: str, said: str
):
    command = [sys.executable, "-m", module, "--root", str(tmp_path)]
    command += ["--device", "cpu"] if name == "gpu-check" else []
    run = SmallRun(tmp_path / name, first, steps=32)
    with subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True, preexec_fn=_hear_ctrl_c) as process:
        wait_for(lambda: bool(run.alive()), 120)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.rstrip("\n")) == (130, said)
    assert run.alive() == {}


def _hear_ctrl_c() -> None:
    # What a shell starts in the background, these tests perhaps, ignores it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_what_was_found_before_ctrl_c_is_named(tmp_path: Path):
    (tmp_path / "chaos.json").touch()
    told = f"codecmill chaos: interrupted; what was found by then is in {tmp_path / 'chaos.json'}"
    assert interrupted("chaos", tmp_path / "chaos.json") == told


def test_a_command_that_hangs_is_ended_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(campaign, "LONGEST_SECONDS", 1.0)
    run = Scripted(tmp_path, "scripted", steps=32, scripts=("exec sleep 60",))
    run.log.touch()
    kills, found = campaign.disturbed(run, wanted=1, usual=1.0, chance=AtOnce(1))
    assert (found, [kill.resumed for kill in kills]) == ("it did not end within 1 s", [False])
    assert run.alive() == {}


def test_what_was_done_again_is_told_by_the_ranks(tmp_path: Path):
    run = SmallRun(tmp_path, "told", steps=400)
    assert (run.interval, run.beginnings(), run.redone(0, 0)) == (25, [], None)
    for number, said in enumerate(("Starting at step 0, warmed up in 0.1 s\n", "", "x\nResuming at step 50, w\n"), 1):
        attempt = run.folder / "logs" / f"attempt_{number:02d}"
        attempt.mkdir(parents=True)
        (attempt / "output.log").write_text(said)
    assert run.beginnings() == [0, 50]
    assert run.redone(reached=73, starts=1) == 23
    assert run.redone(reached=73, starts=2) is None
    assert run.redone(reached=40, starts=0) == 40, "from the start: all of it"


@pytest.mark.parametrize(
    ("module", "name", "more"),
    [
        ("infra.chaos.run", "chaos", ()),
        ("infra.chaos.points", "points", ()),
        ("infra.gpu_check.run", "gpu-check", ("--device", "cpu")),
    ],
)
def test_only_a_folder_of_its_own_is_emptied_below_the_root(
    tmp_path: Path, module: str, name: str, more: tuple[str, ...]
):
    """`--root` names here as everywhere the folder with all runs, which is not to be lost."""
    kept = tmp_path / "runs" / "precious" / "config.json"
    earlier = tmp_path / name / "run-001" / "left.txt"
    for file in (kept, earlier):
        file.parent.mkdir(parents=True)
        file.touch()
    # That no file may be written ends it at the first picture, after what this is about.
    command = ["prlimit", "--fsize=0", sys.executable, "-m", module, "--root", str(tmp_path), *more]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=100)
    assert "File too large" in done.stderr
    assert (kept.is_file(), earlier.exists(), (tmp_path / name / "pictures").is_dir()) == (True, False, True)


def test_a_recipe_that_is_not_there_is_one_sentence_of_gpu_check(tmp_path: Path):
    command = [sys.executable, "-m", "infra.gpu_check.run", "--device", "cpu", "--step", str(tmp_path / "no.yaml")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    said = f"gpu-check: The config {tmp_path / 'no.yaml'} cannot be read: No such file or directory. "
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_runs_that_are_killed_anywhere_end_identical_to_one_that_is_left_alone(tmp_path: Path):
    command = [sys.executable, "-m", "infra.chaos.run", "--kills", "3", "--seed", "1"]
    command += ["--root", str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "chaos" / "chaos.json").read_text())
    stages = report["stages"].values()
    assert report["failures"] == []
    assert report["kills"] == sum(row["resumed"] for row in stages) == sum(row["identical"] for row in stages) == 3
    assert (report["identical"], report["orphans"]) == (report["runs"], 0)
    assert max(row["most_steps_redone"] for row in stages) <= report["checkpoint_interval"]
    assert any(kill["redone"] is not None for kill in report["each_kill"]), "ranks went on after none of them"


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_run_that_is_killed_at_a_crash_point_ends_identical(tmp_path: Path):
    folder = tmp_path / "points"
    command = [sys.executable, "-m", "infra.chaos.points", "--points", "2", "--seed", "2", "--root", str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads((folder / "points.json").read_text())
    assert [each["differing"] for each in outcomes if each["reached"]], "at least one of them came"
    kinds = {json.loads(line)["kind"] for line in (folder / "record.jsonl").read_text().splitlines()}
    assert kinds >= {"write", "fsync", "rename", "replace", "unlink", "log call", "collective"}
