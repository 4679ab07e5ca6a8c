"""A real Prefect server, `prefect deploy --all` and a worker: runs that complete, are killed, are cancelled."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import make
from processes import PROJECT, clean_environment, is_alive, wait_for
from trainings import directory_of, ranks_alive, steps_done

from flows.cli.services import free_port
from pipelines import checkpoints
from pipelines.config import RunConfig
from pipelines.doctor.servers import examine_prefect
from pipelines.locks import lock
from pipelines.run_directory import RunDirectory

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]


def ask(api: str, method: str, path: str, body: Any = None) -> Any:
    """What a Prefect server answers.

    Its SQLite may be locked for a minute, after which it answers 503, for which its own clients ask again.
    """
    end = time.monotonic() + 120
    while True:
        answer = httpx.request(method, f"{api}/{path}", json=body, timeout=90)
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > end:
            return answer.raise_for_status().content and answer.json()
        time.sleep(1)


@dataclass
class Services:
    """A Prefect server with our deployments, and a worker that runs them."""

    api: str
    environment: dict[str, str]
    start: Callable[..., "subprocess.Popen[bytes]"]
    worker: "subprocess.Popen[bytes]"

    def run(self, deployment: str, config: RunConfig) -> str:
        """Start a deployment; returns the id of the flow run."""
        found = ask(self.api, "GET", f"deployments/name/{deployment}")
        body = {"parameters": {"config": config.model_dump(mode="json")}, "state": {"type": "SCHEDULED"}}
        return ask(self.api, "POST", f"deployments/{found['id']}/create_flow_run", body)["id"]

    def state(self, flow_run: str) -> str:
        return ask(self.api, "GET", f"flow_runs/{flow_run}")["state"]["name"]

    def set_state(self, flow_run: str, kind: str, name: str) -> None:
        body = {"state": {"type": kind, "name": name}}
        ask(self.api, "POST", f"flow_runs/{flow_run}/set_state", body)

    def retry(self, flow_run: str) -> None:
        subprocess.run(
            [*PREFECT, "flow-run", "retry", flow_run], env=self.environment, check=True, capture_output=True, timeout=60
        )

    def wait_for_state(self, flow_run: str, *names: str, seconds: float = 240) -> None:
        wait_for(lambda: self.state(flow_run) in names, seconds)

    def logs(self, flow_run: str) -> str:
        body = {"logs": {"flow_run_id": {"any_": [flow_run]}}, "limit": 200}
        found = ask(self.api, "POST", "logs/filter", body)
        return "\n".join(line["message"] for line in found)


def start_worker(start: Callable[..., "subprocess.Popen[bytes]"]) -> "subprocess.Popen[bytes]":
    return start("infra.services.worker", "--pool", "codecmill", "--name", "test")


def answers(url: str) -> Callable[[], bool]:
    def answered() -> bool:
        try:
            return httpx.get(url, timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    return answered


@contextmanager
def running_services(home: Path) -> Iterator[Services]:
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    environment = {
        **clean_environment(),
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_WORKER_QUERY_SECONDS": "1",  # it looks for work every ten seconds else
        "PYTHONPATH": str(PROJECT),
    }
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> "subprocess.Popen[bytes]":
        log = (home / f"{arguments[0]}.log").open("ab")
        command = [sys.executable, "-m", *arguments]
        started.append(
            subprocess.Popen(
                command, cwd=PROJECT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        )
        log.close()
        return started[-1]

    try:
        start("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
        wait_for(answers(f"{api}/health"), 180)
        for arguments in (["work-pool", "create", "codecmill", "--type", "process"], ["deploy", "--all"]):
            done = subprocess.run(
                [*PREFECT, *arguments], cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=180
            )
            assert done.returncode == 0, done.stdout + done.stderr
        yield Services(api, environment, start, start_worker(start))
    finally:
        for process in reversed(started):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with running_services(tmp_path_factory.mktemp("prefect")) as services:
        yield services


def flow_process(flow_run: str) -> int:
    """The process that the worker started for a flow run."""
    wanted = f"PREFECT__FLOW_RUN_ID={flow_run}".encode()
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                if wanted in (process / "environ").read_bytes().split(b"\0"):
                    return int(process.name)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    raise AssertionError("no process runs this flow")


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def long(tiny: dict[str, Any], name: str) -> RunConfig:
    return make(
        tiny, name=name, training={"steps": 100_000, "processes": 2, "checkpoint_interval": 50, "warmup_steps": 1}
    )


def test_all_deployments_are_there_with_forms_and_the_nightly_schedule(services: Services):
    found = ask(services.api, "POST", "deployments/filter", {})
    by_name = {each["name"]: each for each in found}
    assert set(by_name) == {
        "nightly",
        "pipeline",
        "shards",
        "training",
        "evaluation",
        "watch",
        "verification",
        "clean-up",
    }
    form = by_name["pipeline"]["parameter_openapi_schema"]
    steps = form["definitions"]["TrainingConfig"]["properties"]["steps"]
    assert steps["minimum"] == 1
    assert steps["description"]
    (schedule,) = by_name["nightly"]["schedules"]
    assert schedule["active"]
    assert schedule["schedule"]["cron"] == "0 2 * * *"
    # Its lease would end what is at work where the server is away: see tasks/turns.py.
    assert {each["global_concurrency_limit"] for each in found} == {None}


def test_what_a_schedule_starts_while_its_former_is_at_work_is_cancelled(services: Services, tmp_path: Path):
    found = ask(services.api, "GET", "deployments/name/clean-up/clean-up")
    at_once = {"parameters": {"root": str(tmp_path)}, "state": {"type": "SCHEDULED"}}
    (tmp_path / "at_work").mkdir()

    def schedule(runs: int) -> None:
        """No more than so many: Prefect's server does not get up again below a flow run each few seconds."""
        start = datetime.now(UTC) + timedelta(seconds=15)
        rule = f"DTSTART:{start:%Y%m%dT%H%M%SZ}\nRRULE:FREQ=SECONDLY;INTERVAL=15;COUNT={runs}"
        schedules = [{"schedule": {"rrule": rule}}] if runs else []
        changed = {"parameters": {"root": str(tmp_path)}, "schedules": schedules}
        ask(services.api, "PATCH", f"deployments/{found['id']}", changed)

    def ended(how: str) -> list[Any]:
        body = {"deployments": {"id": {"any_": [found["id"]]}}, "flow_runs": {"state": {"name": {"any_": [how]}}}}
        return ask(services.api, "POST", "flow_runs/filter", body)

    try:
        with lock(tmp_path / "at_work" / f"{found['id']}.turn", "", wait=0):
            schedule(3)
            wait_for(lambda: bool(ended("Cancelled")), 120)
            schedule(0)
            wanted = ask(services.api, "POST", f"deployments/{found['id']}/create_flow_run", at_once)["id"]
            services.wait_for_state(wanted, "Completed", seconds=120)
            assert {each["id"] for each in ended("Completed")} == {wanted}, "one that somebody wants is not in its turn"
            message = ended("Cancelled")[0]["state"]["message"]
            assert message.startswith(f"The turn of this schedule is in use by process {os.getpid()}.")
        schedule(3)
        wait_for(lambda: len(ended("Completed")) > 1, 120)
    finally:
        schedule(0)


def test_the_doctor_finds_the_server_and_its_worker(services: Services, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_API_URL", services.api)
    wait_for(lambda: any("online" in finding.text and finding.state == "good" for finding in examine_prefect()), 60)
    assert {finding.state for finding in examine_prefect()} == {"good"}


def test_a_deployed_pipeline_completes(services: Services, tiny: dict[str, Any]):
    config = make(tiny, name="deployed")
    flow_run = services.run("codecmill/pipeline", config)
    services.wait_for_state(flow_run, "Completed", "Failed", "Crashed")
    assert services.state(flow_run) == "Completed", services.logs(flow_run)
    run = directory_of(config)
    assert json.loads(run.promotion_file.read_text())["alias"] == "champion"
    log = services.logs(flow_run)
    assert "Starting at step 0" in log, "what the ranks print reaches Prefect's log"
    assert "training 12/12 steps  done in" in log
    (artifact,) = ask(services.api, "POST", "artifacts/filter", {"artifacts": {"key": {"any_": ["evaluation"]}}})
    assert artifact["type"] == "markdown"
    assert artifact["data"].startswith("# `deployed` at step ")
    assert "](data:image/" in artifact["data"], "pictures that the page shows"
    assert (run.evaluation(12) / "report.html").is_file() or list((run.path / "evaluation").glob("*/report.html"))


def test_a_killed_flow_is_retried_and_goes_on_from_its_checkpoint(services: Services, tiny: dict[str, Any]):
    config = make(tiny, name="killed", training={"steps": 800, "processes": 2, "checkpoint_interval": 50})
    flow_run = services.run("training/training", config)
    run = directory_of(config)
    wait_for(lambda: steps_done(run) >= 120, 180)
    os.kill(flow_process(flow_run), signal.SIGKILL)
    wait_for(lambda: not ranks_alive(run), 30)
    services.wait_for_state(flow_run, "Crashed", seconds=120)
    # The worker may report the crash seconds after its runner has: a retry between the two would be crashed again.
    time.sleep(10)
    saved = checkpoints.latest(run)
    assert saved is not None
    services.retry(flow_run)
    output = run.logs / "attempt_02" / "output.log"
    wait_for(lambda: output.is_file() and f"Resuming at step {saved.step}" in output.read_text(), 180)
    services.wait_for_state(flow_run, "Completed", "Failed", "Crashed")
    assert services.state(flow_run) == "Completed", services.logs(flow_run)
    assert steps_done(run) == 800


def test_cancelling_stops_the_ranks_within_30_seconds_with_their_state_saved(services: Services, tiny: dict[str, Any]):
    config = long(tiny, "cancelled")
    flow_run = services.run("training/training", config)
    run = directory_of(config)
    wait_for(lambda: steps_done(run) >= 20, 180)
    services.set_state(flow_run, "CANCELLING", "Cancelling")
    asked = time.monotonic()
    wait_for(lambda: not ranks_alive(run), 45)
    took = time.monotonic() - asked
    services.wait_for_state(flow_run, "Cancelled", seconds=60)
    assert took < 30 + 15, f"the ranks ended {took:.0f} s after the request, which the worker sees within 15 s"
    saved = checkpoints.latest(run)
    assert saved is not None
    assert saved.step == steps_done(run)


def test_a_flow_ends_with_its_killed_worker_saved_and_another_worker_goes_on_with_it(
    services: Services, tiny: dict[str, Any]
):
    config = long(tiny, "orphan")
    flow_run = services.run("training/training", config)
    run = directory_of(config)
    wait_for(lambda: steps_done(run) >= 20, 180)
    flow = flow_process(flow_run)
    os.kill(parent(flow), signal.SIGKILL)  # Prefect's own worker, below ours
    is_saved(services, flow_run, flow, run, signal.SIGKILL)
    goes_on(services, flow_run, run, attempt=2)
    # The second time the worker is asked to end, as a container is.
    flow = flow_process(flow_run)
    services.worker.terminate()
    is_saved(services, flow_run, flow, run, signal.SIGTERM)
    goes_on(services, flow_run, run, attempt=3)
    services.set_state(flow_run, "CANCELLING", "Cancelling")
    services.wait_for_state(flow_run, "Cancelled", seconds=90)


def goes_on(services: Services, flow_run: str, run: RunDirectory, attempt: int) -> None:
    """A retry resumes at the step that was saved."""
    saved = checkpoints.latest(run)
    assert saved is not None
    services.retry(flow_run)
    output = run.logs / f"attempt_{attempt:02d}" / "output.log"
    wait_for(lambda: output.is_file() and f"Resuming at step {saved.step}" in output.read_text(), 180)


def is_saved(services: Services, flow_run: str, flow: int, run: RunDirectory, by: signal.Signals) -> None:
    """The worker, which a signal ends, is not gone before its flow has ended, saved; there is another one then."""
    assert services.worker.wait(60) == 128 + by, "who looks after it is to start it again"
    assert not is_alive(flow)
    assert not ranks_alive(run)
    services.wait_for_state(flow_run, "Crashed", seconds=30)
    saved = checkpoints.latest(run)
    assert saved is not None
    assert saved.step == steps_done(run), "nothing is to be done again"
    services.worker = start_worker(services.start)
