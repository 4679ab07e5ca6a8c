"""Commands that are killed (SIGKILL) in each stage: what is left alive, what Prefect and MLflow say, and what resumes.

The data loaders have no test here: ours are threads of the rank (pipelines.data.loading), so that a loader can only be
killed with its rank, which test_training does (`test_a_rank_that_is_killed_ends_the_others_and_can_be_retried`).
"""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from conftest import make, picture
from processes import PROJECT, clean_environment, wait_for
from trainings import begin, directory_of, ranks_alive, steps_done, train

from pipelines import checkpoints
from pipelines.config import RunConfig
from pipelines.data.shard_set import ShardSet
from pipelines.data.shards import create_shards
from pipelines.durable_files import read_json
from pipelines.evaluation.stage import evaluate_run
from pipelines.run_directory import RunDirectory
from pipelines.status import run_status

pytestmark = [pytest.mark.full, pytest.mark.timeout(600), pytest.mark.usefixtures("used_root")]

MARK = "CODECMILL_TEST_MARK"
PATIENCE_SECONDS = 120.0
"""On a machine that has much else to do; alone it takes some 5 s, and the contract allows 10."""


@dataclass
class Command:
    """`codecmill ...` in a process of its own; all that it starts can be told by a mark in their environment."""

    process: "subprocess.Popen[bytes]"
    mark: str
    log: Path

    def alive(self) -> dict[int, str]:
        """The command lines of all living processes that the command has started, itself among them."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with suppress(OSError):
                    if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def kill_all(self) -> None:
        while victims := self.alive():
            for victim in victims:
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
            self.process.poll()
        self.process.wait()

    def kill_alone(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts commands; whatever is left of them in the end is killed."""
    started: list[Command] = []

    def begin(*words: str, **environment: str) -> Command:
        mark = uuid4().hex
        log = tmp_path / f"{mark}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "flows", *words],
                cwd=PROJECT,
                env=clean_environment() | environment | {MARK: mark},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        started.append(Command(process, mark, log))
        return started[-1]

    yield begin
    for command in started:
        command.kill_all()


def written(config: RunConfig, tmp_path: Path) -> str:
    file = tmp_path / f"{config.name}.json"
    file.write_text(config.model_dump_json())
    return str(file)


def finish(command: Command) -> None:
    assert command.process.wait(300) == 0, command.log.read_text()


def resume(start: Callable[..., Command], config: RunConfig) -> None:
    finish(start("resume", config.name, "--root", str(config.root)))


def prefect_states(root: Path, table: str = "flow_run") -> list[tuple[str, str]]:
    """Name and state of each flow (or task) run in the root's own database, oldest first."""
    with closing(sqlite3.connect(root / "prefect" / "prefect.db")) as database:
        return database.execute(f"SELECT name, state_name FROM {table} ORDER BY created").fetchall()  # noqa: S608


def mlflow_statuses(root: Path) -> list[str]:
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        return [row[0] for row in database.execute("SELECT status FROM runs").fetchall()]


def running(root: Path) -> list[str]:
    return [
        name for table in ("flow_run", "task_run") for name, state in prefect_states(root, table) if state == "Running"
    ]


def list_runs(root: Path) -> float:
    """`codecmill list`; returns the seconds that it took, its own start included."""
    begun = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "flows", "list", "--root", str(root)],
        cwd=PROJECT,
        env=clean_environment(),
        check=True,
        capture_output=True,
        timeout=60,
    )
    return time.monotonic() - begun


def test_killed_whole_in_training_and_then_the_flow_alone_it_is_put_right_and_resumed_each_time(
    tiny: dict[str, Any], tmp_path: Path, start: Callable[..., Command]
):
    config = make(tiny, name="killed", training={"steps": 1500, "checkpoint_interval": 100, "processes": 2})
    run = directory_of(config)
    command = start("run", "--config", written(config, tmp_path))
    wait_for(lambda: steps_done(run) >= 150 and run.mlflow_file.is_file(), 120)
    wait_for(lambda: mlflow_statuses(config.root) == ["RUNNING"], 30)
    wait_for(lambda: "train killed" in running(config.root), 30)
    assert any("pipelines.training.worker" in words for words in command.alive().values())
    command.kill_all()
    assert sorted(running(config.root)) == ["codecmill killed", "train killed"], "what nobody put right"
    assert mlflow_statuses(config.root) == ["RUNNING"]

    begun = time.monotonic()
    took = list_runs(config.root)
    wait_for(lambda: not running(config.root) and mlflow_statuses(config.root) == ["KILLED"], PATIENCE_SECONDS)
    print(f"list took {took:.2f} s; all was put right {time.monotonic() - begun:.1f} s after its start")
    assert ("codecmill killed", "Crashed") in prefect_states(config.root)
    assert ("train killed", "Crashed") in prefect_states(config.root, "task_run")
    assert run_status(run).state == "interrupted"
    wait_for(lambda: not list((config.root / "at_work").glob("*.json")), PATIENCE_SECONDS)
    assert not (config.root / "logs" / "dead-runs.log").exists()

    reached = steps_done(run)
    command = start("resume", "killed", "--root", str(config.root))
    wait_for(lambda: steps_done(run) > reached, 120)
    wait_for(lambda: "train killed" in running(config.root), 30)
    everyone = " ".join(command.alive().values())
    assert "pipelines.training.agent" in everyone
    assert "prefect server start" in everyone
    command.kill_alone()
    wait_for(lambda: not command.alive(), 30)
    assert ranks_alive(run) == []
    assert sorted(running(config.root)) == ["codecmill killed", "train killed"]

    resume(start, config)
    wait_for(lambda: not running(config.root) and not list((config.root / "at_work").glob("*.json")), PATIENCE_SECONDS)
    states = [state for name, state in prefect_states(config.root) if name == "codecmill killed"]
    assert states == ["Crashed", "Crashed", "Completed"]
    assert mlflow_statuses(config.root) == ["FINISHED"]
    assert steps_done(run) == 1500


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Pictures that take long enough to be caught at work on them."""
    folder = tmp_path / "large"
    folder.mkdir()
    for number in range(12):
        picture(number, 700, 600).save(folder / f"{number:02d}.png")
    return folder


def test_killed_in_the_evaluation_it_believes_nothing_half_written_and_ends_with_the_same_results(
    tiny: dict[str, Any], tmp_path: Path, large: Path, start: Callable[..., Command]
):
    config = make(tiny, name="judged", data={"images": str(large), "test_fraction": 0.5})
    run = begin(config)
    train(run)
    command = start("resume", "judged", "--root", str(config.root))
    begun = "evaluation/.tmp-step_*/pictures/*"
    wait_for(lambda: len(list(run.path.glob(begun))) >= 2, 120)
    command.kill_all()
    assert list(run.path.glob(begun)), "it was not caught in mid-way"
    assert not list(run.path.glob("evaluation/step_*"))
    stages = {stage.name: stage.state for stage in run_status(run).stages}
    assert (stages["training"], stages["evaluation"]) == ("done", "missing")
    last = checkpoints.best(run)
    assert last is not None
    shard_set = ShardSet.open(Path(read_json(run.shard_set_file)["path"]))
    copy = RunDirectory(Path(shutil.copytree(run.path, run.path.with_name("undisturbed"))))
    shutil.rmtree(copy.path / "evaluation")
    undisturbed = evaluate_run(copy, last, shard_set, config.evaluation)
    assert len(undisturbed.images) >= 4

    list_runs(config.root)
    wait_for(lambda: not running(config.root) and mlflow_statuses(config.root) == ["KILLED"], PATIENCE_SECONDS)
    resume(start, config)
    (folder,) = run.path.glob("evaluation/step_*")
    assert json.loads((folder / "evaluation.json").read_text())["images"] == [
        vars(row) | {} for row in undisturbed.images
    ]
    pictures = [
        {file.relative_to(of): file.read_bytes() for file in of.rglob("*.png")} for of in (folder, undisturbed.folder)
    ]
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) >= 4
    assert not list(run.path.glob("evaluation/.tmp-*"))
    assert mlflow_statuses(config.root) == ["FINISHED"]
    assert read_json(run.promotion_file)["alias"] == "champion"


@dataclass
class Cutting:
    """`codecmill shards` of large pictures, to be disturbed, and the same in a root of its own, left alone."""

    config: RunConfig
    undisturbed: RunConfig
    tmp_path: Path

    def begin(self, start: Callable[..., Command]) -> tuple[Command, list[int]]:
        """Start it and wait until some pictures are encoded; also the processes that encode."""
        command = start("shards", "--config", written(self.config, self.tmp_path))
        wait_for(lambda: bool(list(self.config.root.glob("shards/.tmp-*/parts/[!.]*.part"))), 120)
        pool = [process for process, words in command.alive().items() if "pipelines.data.encoding_worker" in words]
        assert len(pool) == 2
        return command, pool

    def check(self) -> None:
        """The disturbed set is the undisturbed one, byte for byte."""
        create_shards(self.undisturbed)
        sets = [
            {file.name: file.read_bytes() for end in ("tar", "index") for file in root.glob(f"shards/*/*.{end}")}
            for root in (self.config.root, self.undisturbed.root)
        ]
        assert len(sets[0]) >= 6
        assert sets[0] == sets[1]
        assert not list(self.config.root.glob("shards/.tmp-*/*"))


@pytest.fixture
def cutting(tiny: dict[str, Any], tmp_path: Path, large: Path) -> Cutting:
    data = {
        "images": str(large),
        "patch_size": 32,
        "workers": 2,
        "max_patches_per_image": 100_000,
        "task_runner": "processes",
    }
    alone = make(tiny, name="whole", root=str(tmp_path / "undisturbed"), data=data)
    return Cutting(make(tiny, name="cut", data=data), alone, tmp_path)


def test_the_command_killed_while_it_writes_shards_goes_on_and_ends_with_the_same_bytes(
    cutting: Cutting, start: Callable[..., Command]
):
    root = cutting.config.root
    command, _ = cutting.begin(start)
    command.kill_alone()
    wait_for(lambda: not command.alive(), 30)
    assert not list(root.glob("shards/[!.]*/manifest.json")), "no half-written set is seen"
    assert running(root)
    list_runs(root)
    wait_for(lambda: not running(root), PATIENCE_SECONDS)
    finish(start("shards", "--config", written(cutting.config, cutting.tmp_path)))
    assert [state for _, state in prefect_states(root)] == ["Crashed", "Completed"]
    cutting.check()


def test_a_pool_process_killed_while_it_encodes_is_replaced_and_the_bytes_are_the_same(
    cutting: Cutting, start: Callable[..., Command]
):
    root = cutting.config.root
    command, (first, _) = cutting.begin(start)
    os.kill(first, signal.SIGKILL)
    finish(command)
    said = command.log.read_text()
    assert "A process that encodes images was killed by SIGKILL." in said
    assert "Its work goes on in a new one." in said
    assert "Traceback" not in said
    assert [state for _, state in prefect_states(root)] == ["Completed"]
    assert {state for _, state in prefect_states(root, "task_run")} == {"Completed"}
    cutting.check()
