"""Services that die: a worker with its flow, and a Prefect server in mid-training that comes back late, or never."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import make, tiny_config
from processes import PROJECT, clean_environment, wait_for
from test_dead_runs import Command, start, written  # noqa: F401  # start is a fixture
from test_deployment import PREFECT, Services, answers, ask, flow_process, long, running_services
from trainings import directory_of, ranks_alive, steps_done

from flows.cli.services import free_port
from pipelines.durable_files import read_json
from pipelines.run_directory import RunDirectory
from pipelines.status import run_status

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]


def signs_of_life(api: str, flow_run: str) -> list[datetime]:
    """When a flow run said that it lives, oldest first."""
    wanted = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": {"id": [f"prefect.flow-run.{flow_run}"]}}
    found = ask(api, "POST", "events/filter", {"filter": wanted})["events"]
    return sorted(datetime.fromisoformat(each["occurred"].replace("Z", "+00:00")) for each in found)


@dataclass(frozen=True)
class Orphan:
    """A flow run that was killed together with its worker, at a time of the monotonic clock."""

    services: Services
    flow_run: str
    run: RunDirectory
    killed: float

    def crashed(self) -> dict[str, Any] | None:
        states = ask(self.services.api, "GET", f"flow_run_states/?flow_run_id={self.flow_run}")
        return next((state for state in states if state["name"] == "Crashed"), None)


@pytest.fixture(scope="module")
def orphan(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Iterator[Orphan]:
    """Killed once for the module: until it is taken for dead two minutes pass, which the tests in between can use."""
    folder = tmp_path_factory.mktemp("orphan")
    (folder / "home").mkdir()
    with running_services(folder / "home") as services:
        created = subprocess.run(
            [*PREFECT, "automation", "create", "--from-file", "infra/automations.yaml"],
            cwd=PROJECT,
            env=services.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert created.returncode == 0, created.stdout + created.stderr
        config = long(tiny_config(folder / "root", photos), "orphaned")
        flow_run = services.run("training/training", config)
        run = directory_of(config)
        wait_for(lambda: steps_done(run) >= 20, 180)
        wait_for(lambda: len(signs_of_life(services.api, flow_run)) >= 2, 60)
        first, second = signs_of_life(services.api, flow_run)[:2]
        assert 25 < (second - first).total_seconds() < 45, "one that lives would be taken for dead"
        victim = flow_process(flow_run)
        services.worker.kill()
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        services.worker.wait()
        yield Orphan(services, flow_run, run, killed)


def test_of_a_flow_killed_together_with_its_worker_nothing_is_left_but_a_wrong_record(orphan: Orphan):
    wait_for(lambda: not ranks_alive(orphan.run), 30)
    assert orphan.services.state(orphan.flow_run) == "Running", "nobody is left to say otherwise"


@dataclass
class Server:
    """A Prefect server of its own, on 127.0.0.1, that can be killed and started again."""

    home: Path
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def start(self) -> None:
        self.home.mkdir(exist_ok=True)
        quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(self.port)],
                env=clean_environment() | quiet | {"PREFECT_HOME": str(self.home)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(answers(f"{self.api}/health"), 180)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None

    def states(self, what: str) -> dict[str, str]:
        """The states of all 'flow_runs' or 'task_runs' by name."""
        found = ask(self.api, "POST", f"{what}/filter", {})
        return {each["name"]: each["state"]["name"] for each in found}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "server")
    server.start()
    try:
        yield server
    finally:
        server.kill()


def test_a_training_outlives_a_prefect_server_that_is_away_for_more_than_a_minute(
    tiny: dict[str, Any],
    tmp_path: Path,
    server: Server,
    start: Callable[..., Command],  # noqa: F811
):
    config = make(tiny, name="patient", training={"steps": 1500, "checkpoint_interval": 100})
    run = directory_of(config)
    home = {"PREFECT_API_URL": server.api, "PREFECT_HOME": str(tmp_path / "home")}
    command = start("run", "--config", written(config, tmp_path), **home)
    wait_for(lambda: steps_done(run) >= 20, 120)
    server.kill()
    away = time.monotonic()
    wait_for(lambda: steps_done(run) == 1500, 240)
    time.sleep(max(0.0, 70 - (time.monotonic() - away)))
    assert command.process.poll() is None, command.log.read_text()
    server.start()
    assert command.process.wait(120) == 0, command.log.read_text()
    assert len(list(run.logs.glob("attempt_*"))) == 1, "it was not trained again"
    assert read_json(run.promotion_file)["alias"] == "champion"
    assert server.states("flow_runs") == {"codecmill patient": "Completed", "shards patient": "Completed"}
    tasks = server.states("task_runs")
    assert set(tasks.values()) == {"Completed"}, tasks
    assert {"train patient", "register patient"} <= set(tasks)
    assert "Prefect at" in (said := command.log.read_text())
    assert "Traceback" not in said


IMPATIENT = """
import sys
from flows.__main__ import main
from flows.cli import starting
load = starting.pipeline

def impatient():
    flow = load()
    from tasks import reporting
    reporting.PATIENCE_SECONDS = 5.0
    return flow

starting.pipeline = impatient
sys.exit(main(sys.argv[1:]))
"""


def test_where_prefect_stays_away_the_command_says_what_is_done_and_resume_goes_on_without_it(
    tiny: dict[str, Any],
    tmp_path: Path,
    server: Server,
    start: Callable[..., Command],  # noqa: F811
):
    """Five seconds of patience here, ten minutes else."""
    config = make(tiny, name="alone", training={"steps": 1000, "checkpoint_interval": 100})
    run = directory_of(config)
    environment = clean_environment() | {"PREFECT_API_URL": server.api, "PREFECT_HOME": str(tmp_path / "home")}
    with subprocess.Popen(
        [sys.executable, "-c", IMPATIENT, "run", "--config", written(config, tmp_path)],
        cwd=PROJECT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(lambda: steps_done(run) >= 20, 120)
        server.kill()
        wait_for(lambda: steps_done(run) == 1000, 240)
        trained = time.monotonic()
        _, said = process.communicate(timeout=300)
    assert process.returncode == 1, said
    assert time.monotonic() - trained < 90, "Prefect's client asked on and on"
    (told,) = [line for line in said.splitlines() if line.startswith("codecmill: ")]
    begins = (
        f"codecmill: Training of 'alone' is done on disk, unreported: Prefect at {server.api} did not answer for 5 s"
    )
    assert told.startswith(begins)
    assert told.endswith(f"go on with: {run.command('resume')}")
    assert "Error logging" not in said
    assert "Traceback" not in said
    assert {stage.name: stage.state for stage in run_status(run).stages}["training"] == "done"
    command = start("resume", "alone", "--root", str(config.root))
    assert command.process.wait(120) == 0, command.log.read_text()
    assert len(list(run.logs.glob("attempt_*"))) == 1, "it was not trained again"
    server.start()
    subprocess.run(
        [sys.executable, "-m", "flows", "list", "--root", str(config.root)],
        env=clean_environment(),
        cwd=PROJECT,
        check=True,
    )
    wait_for(lambda: server.states("flow_runs")["codecmill alone"] == "Crashed", 120)
    wait_for(lambda: not list((config.root / "at_work").glob("*.json")), 120)


def test_a_flow_killed_together_with_its_worker_is_crashed_by_the_automation_within_3_minutes(orphan: Orphan):
    left = 180 - (time.monotonic() - orphan.killed)
    wait_for(lambda: orphan.crashed() is not None, max(left, 1))
    found = orphan.crashed()
    assert found is not None and "no sign of life" in found["message"]
    killed = datetime.now(UTC) - timedelta(seconds=time.monotonic() - orphan.killed)
    assert datetime.fromisoformat(found["timestamp"]) - killed < timedelta(minutes=3)
