"""`make services` ended in mid-training and started again: the run goes on by itself, though no process knows of it."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from processes import PROJECT, descendants, wait_for, wait_gone
from test_deployment import PREFECT
from test_own_servers import Running, command_line, folder, run_pipeline, started  # noqa: F401  # folder is a fixture
from trainings import ranks_alive, steps_done

from flows.cli.services import free_port
from infra.services.configuration import Places
from infra.services.postgres import cluster
from pipelines import checkpoints
from pipelines.run_directory import RunDirectory

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]


@dataclass
class Scene:
    """A training that a worker runs, and the services around it, which come and go."""

    running: Running
    flow_run: str
    run: RunDirectory
    settings: dict[str, str]
    saved: int = 0
    """The step that the services' end left it at."""

    def start_again(self) -> None:
        self.running = started(self.running.root.path.parent, **self.settings)

    def states(self) -> list[str]:
        found = self.running.prefect("GET", f"flow_run_states/?flow_run_id={self.flow_run}")
        return [each["name"] for each in found]

    def is_resumed(self) -> bool:
        output = self.run.logs / "attempt_02" / "output.log"
        return output.is_file() and f"Resuming at step {self.saved}" in output.read_text()


@pytest.fixture(scope="module")
def scene(folder: Path, photos: Path) -> Iterator[Scene]:  # noqa: F811
    settings = {"CODECMILL_PREFECT_PORT": str(free_port()), "PREFECT_WORKER_QUERY_SECONDS": "2"}
    running = started(folder, **settings)
    try:
        automations = [sys.executable, "-m", "infra.services.automations", "--root", str(running.root.path)]
        for command in ([*PREFECT, "deploy", "--name", "pipeline"], automations):
            environment = running.environment | {"PYTHONPATH": str(PROJECT)}
            subprocess.run(command, cwd=PROJECT, env=environment, check=True, capture_output=True, timeout=120)
        config: dict[str, Any] = {
            "name": "first",
            "root": str(running.root.path),
            "data": {"images": str(photos), "patch_size": 32, "workers": 1, "validation_fraction": 0.2},
            "model": {"channels": 8, "latent_channels": 4, "downsamplings": 2},
            "training": {"steps": 1_000_000, "batch_size": 4, "crop_size": 16, "threads": 1, "compile": False},
        }
        flow_run = run_pipeline(running, config)
        scene = Scene(running, flow_run, running.root.run("first"), settings)
        wait_for(lambda: steps_done(scene.run) >= 100, 120)
        yield scene
        running = scene.running
    finally:
        running.process.send_signal(signal.SIGINT)
        running.process.wait(60)


def kill_prefect(running: Running) -> None:
    """Its server alone, which is started again."""
    lines = {each: command_line(each) for each in descendants(running.process.pid)}
    (server,) = (
        each for each, line in lines.items() if {b"prefect", b"server"} <= set(line) and b"flows.cli.keeper" not in line
    )
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: "Prefect's server is ready again" in running.told(), 60)


def let_a_day_pass(running: Running) -> None:
    """For what automations wait for, which is in the database alone: no server runs."""
    sets = ", ".join(f'"{each}" = "{each}" - interval \'1 day\'' for each in ("start", "end"))
    database = cluster(Places(running.root).postgres)
    database._call("postgres", "--single", "prefect", told=f"UPDATE automation_bucket SET {sets};\n")  # noqa: S608


def test_an_event_waits_for_the_one_before_unless_that_is_of_an_earlier_server():
    from prefect._internal.uuid7 import uuid7
    from prefect.server.events.ordering import EventArrivedEarly
    from prefect.server.events.schemas.events import ReceivedEvent

    from infra.services.event_order import CausalOrdering

    async def waits(before: UUID) -> bool:
        run = {"prefect.resource.id": "prefect.flow-run.1"}
        crash = {"event": "prefect.flow-run.Crashed", "resource": run, "id": uuid7(), "follows": before}
        event = ReceivedEvent.model_validate({**crash, "occurred": datetime.now(UTC)})
        try:
            await CausalOrdering("test").wait_for_leader(event)
        except EventArrivedEarly:
            return True
        return False

    now_ms = time.time_ns() // 1_000_000
    assert asyncio.run(waits(uuid7(now_ms + 1000)))
    assert not asyncio.run(waits(uuid7(now_ms - 60_000)))
    assert asyncio.run(waits(uuid4())), "nobody knows when that was made"


def test_a_run_saves_and_reports_when_the_services_end_and_goes_on_when_they_are_back_the_next_day(scene: Scene):
    # The crash that is to be reported follows a state that this server has never heard of.
    kill_prefect(scene.running)
    assert "Running" in scene.states()
    everyone = descendants(scene.running.process.pid)
    scene.running.process.send_signal(signal.SIGINT)
    assert scene.running.process.wait(30) == 128 + signal.SIGINT
    assert wait_gone(everyone, 1) == set(), "the flow run's process as well"
    assert "Flow runs under way" in scene.running.told()
    saved = checkpoints.latest(scene.run)
    assert saved is not None
    assert saved.step == steps_done(scene.run), "nothing is to be done again"
    scene.saved = saved.step

    let_a_day_pass(scene.running)
    scene.start_again()
    ready = time.monotonic()
    wait_for(scene.is_resumed, 60)
    assert time.monotonic() - ready < 60
    assert "Crashed" in scene.states()
    assert scene.running.prefect("GET", f"flow_runs/{scene.flow_run}")["run_count"] == 2


def test_a_run_whose_processes_were_all_killed_with_the_services_is_crashed_once_they_are_back(scene: Scene):
    before = scene.states().count("Crashed")
    everyone = descendants(scene.running.process.pid)
    for each in (scene.running.process.pid, *everyone):
        with suppress(ProcessLookupError):  # many die with the one that started them
            os.kill(each, signal.SIGKILL)
    scene.running.process.wait()
    assert wait_gone(everyone, 10) == set()
    wait_for(lambda: not ranks_alive(scene.run), 10)
    scene.start_again()
    wait_for(lambda: scene.states().count("Crashed") == before + 1, 30)
