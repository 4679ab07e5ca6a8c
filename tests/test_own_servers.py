"""`make services`: what runs on it, who can reach it, where its secrets are not, and what of it outlives a kill."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import browser
from conftest import make
from processes import PROJECT, clean_environment, descendants, is_alive, listening_on, wait_for, wait_gone
from test_deployment import PREFECT
from trainings import steps_done

from infra.services.configuration import DATABASES, USER
from infra.services.secrets import NAMES
from pipelines.run_directory import Root
from pipelines.service_addresses import read_variables, use_services

IS_EMBEDDED, IS_ARTIFACT = "each.src.startsWith('data:image/')", "each.src.includes('get-artifact')"
NAME, STEPS = "on-servers", 800

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


@dataclass
class Running:
    """The services of a root, as a user has them."""

    root: Root
    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def secrets(self) -> dict[str, str]:
        """By name; whose user's name it is, is none."""
        found = read_variables(self.root.path / "services" / "secrets.env")
        return {name: value for name, value in found.items() if name != "MLFLOW_TRACKING_USERNAME"}

    @property
    def environment(self) -> dict[str, str]:
        """That of a command which found services.env."""
        found = clean_environment()
        use_services(self.root, found)
        return found

    def prefect(self, method: str, path: str, body: Any = None) -> Any:
        environment = self.environment
        pair = base64.b64encode(environment["PREFECT_API_AUTH_STRING"].encode()).decode()
        answer = httpx.request(
            method,
            f"{environment['PREFECT_API_URL']}/{path}",
            json=body,
            headers={"Authorization": f"Basic {pair}"},
            timeout=60,
        )
        return answer.raise_for_status().json()

    def mlflow(self, path: str, **parameters: Any) -> Any:
        environment = self.environment
        url = f"{environment['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/{path}"
        return httpx.get(url, params=parameters, auth=self.login, timeout=60).raise_for_status().json()

    @property
    def login(self) -> tuple[str, str]:
        """To MLflow."""
        environment = self.environment
        return environment["MLFLOW_TRACKING_USERNAME"], environment["MLFLOW_TRACKING_PASSWORD"]

    def metrics(self, server: str) -> str:
        """What a server tells Prometheus."""
        name, _, password = self.environment["PREFECT_API_AUTH_STRING"].partition(":")
        login = self.login if server == "MLFLOW_TRACKING_URI" else (name, password)
        return httpx.get(f"{self.environment[server]}/metrics", auth=login, timeout=60).raise_for_status().text

    def dump(self, database: str) -> str:
        """All that a database holds, as SQL."""
        command = ["pg_dump", "--host=127.0.0.1", f"--port={self.postgres_port()}", f"--username={USER}", database]
        environment = {**os.environ, "PGPASSWORD": self.secrets["POSTGRES_PASSWORD"]}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    def postgres_port(self) -> int:
        """As its own process says it."""
        lines = (self.root.path / "services" / "postgres" / "postmaster.pid").read_text().splitlines()
        return int(lines[3])

    def told(self) -> str:
        return self.log.read_text()


def started(folder: Path, **environment: str) -> Running:
    """Start services in a folder; returns once all of them are told to be ready."""
    log = folder / f"told-{time.monotonic_ns()}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "infra.services.run", "--root", str(folder / "root")],
            cwd=PROJECT,
            env=clean_environment()
            | {f"CODECMILL_{name}_PORT": "0" for name in ("PREFECT", "MLFLOW", "S3", "POSTGRES")}
            | environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    running = Running(Root(folder / "root"), process, log)
    wait_for(lambda: "Ctrl-C ends all" in running.told() or process.poll() is not None, 180)
    assert process.poll() is None, running.told()
    return running


@contextmanager
def ended(running: Running) -> Iterator[Running]:
    """At the end: Ctrl-C, after which nothing is left."""
    try:
        yield running
    finally:
        everyone = descendants(running.process.pid)
        running.process.send_signal(signal.SIGINT)  # nothing where a test has killed it
        code = running.process.wait(60)
        left = wait_gone(everyone, 10)
    assert left == set()
    assert code in (128 + signal.SIGINT, -signal.SIGKILL)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where PostgreSQL's user can get to, as it cannot below pytest's own temporary folder."""
    path = Path(tempfile.mkdtemp(prefix="codecmill-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def services(folder: Path) -> Iterator[Running]:
    impatient = {"PREFECT_WORKER_QUERY_SECONDS": "2", "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2"}
    with ended(started(folder, **impatient)) as running:
        yield running


@pytest.fixture(scope="module")
def announced() -> Iterator[tuple[str, list[str]]]:
    """Where Prefect can announce something, and what it has."""
    said: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", said
        server.shutdown()
        thread.join()


BLOCK = """
import sys
from prefect.blocks.notifications import CustomWebhookNotificationBlock
CustomWebhookNotificationBlock(name="here", url=sys.argv[1], json_data={"text": "{{subject}}"}).save("announcements")
"""


def prepare(running: Running, announcements: str) -> None:
    """What a user does once, as README says it: deployments, a notification block, automations."""
    environment = running.environment | {"PYTHONPATH": str(PROJECT)}
    block = [sys.executable, "-c", BLOCK, announcements]
    automations = [sys.executable, "-m", "infra.services.automations", "--root", str(running.root.path)]
    for together in (
        [[*PREFECT, "deploy", "--name", "pipeline"], block],
        [[*automations, "--announce-by", "custom-webhook/announcements"]],
    ):
        started = [
            subprocess.Popen(each, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for each in together
        ]
        for process in started:
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said


def run_pipeline(running: Running, config: dict[str, Any]) -> str:
    """Have the worker run the deployed pipeline; returns the id of the flow run."""
    deployment = running.prefect("GET", "deployments/name/codecmill/pipeline")["id"]
    values = make(config).model_dump(mode="json")
    body = {"parameters": {"config": values}, "state": {"type": "SCHEDULED"}}
    return running.prefect("POST", f"deployments/{deployment}/create_flow_run", body)["id"]


def schedule_pipeline(running: Running, config: dict[str, Any]) -> str:
    """Have it run every day from now on; returns the id of the flow run that the schedule makes first."""
    deployment = running.prefect("GET", "deployments/name/codecmill/pipeline")["id"]
    begin = datetime.now(UTC) + timedelta(seconds=15)
    schedule = {
        "schedule": {"interval": 24 * 3600, "anchor_date": begin.isoformat()},
        "parameters": {"config": make(config).model_dump(mode="json")},
    }
    running.prefect("POST", f"deployments/{deployment}/schedules", [schedule])
    wanted = {"sort": "EXPECTED_START_TIME_ASC", "deployments": {"id": {"any_": [deployment]}}}
    found: list[Any] = []
    wait_for(lambda: bool(found.extend(running.prefect("POST", "flow_runs/filter", wanted)) or found), 15)
    assert found[0]["auto_scheduled"]
    assert datetime.fromisoformat(found[0]["expected_start_time"].replace("Z", "+00:00")) == begin
    return found[0]["id"]


def make_late_run(running: Running) -> None:
    """One that was due an hour ago, and that no worker will take."""
    flow = running.prefect("GET", "deployments/name/codecmill/pipeline")["flow_id"]
    due = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    state = {"type": "SCHEDULED", "state_details": {"scheduled_time": due}}
    running.prefect("POST", "flow_runs/", {"flow_id": flow, "name": "nobody's", "tags": ["codecmill"], "state": state})


@dataclass
class Runs:
    """Ids of flow runs: a scheduled one that went on although its worker was killed, and one that can do nothing."""

    killed: str
    hopeless: str


@pytest.fixture(scope="module")
def runs(services: Running, photos: Path, announced: tuple[str, list[str]]) -> Runs:
    """A pipeline that no hand starts, and none again when its worker was killed in mid-training."""
    config: dict[str, Any] = {
        "name": NAME,
        "root": str(services.root.path),
        "data": {"images": str(photos), "patch_size": 32, "workers": 1, "validation_fraction": 0.2},
        "model": {"channels": 8, "latent_channels": 4, "downsamplings": 2},
        "training": {"steps": STEPS, "batch_size": 4, "crop_size": 16, "processes": 1, "threads": 1, "compile": False},
    }
    prepare(services, announced[0])
    make_late_run(services)
    killed = schedule_pipeline(services, config)
    directory = services.root.run(NAME)
    wait_for(lambda: steps_done(directory) >= 100, 120)
    os.kill(process_of(services, "worker", is_keeper=False), signal.SIGKILL)
    hopeless = run_pipeline(services, config | {"name": "hopeless", "data": {"images": "no/such/folder"}})
    for flow_run, end in ((killed, "COMPLETED"), (hopeless, "FAILED")):
        wait_for(
            lambda flow_run=flow_run, end=end: (
                (found := services.prefect("GET", f"flow_runs/{flow_run}"))["state"]["type"] == end
                and found["run_count"] == 2
            ),
            150,
        )
    assert "The worker is ready again" in services.told()
    return Runs(killed, hopeless)


def test_a_scheduled_run_whose_worker_was_killed_goes_on_by_itself(services: Running, runs: Runs):
    directory = services.root.run(NAME)
    assert steps_done(directory) == STEPS
    output = (directory.logs / "attempt_02" / "output.log").read_text()
    resumed = re.search(r"Resuming at step (\d+)", output)
    assert resumed is not None
    assert int(resumed[1]) >= 100, "it was asked to stop, and saved what it had reached"


def test_what_failed_twice_and_what_is_late_is_announced_once(
    services: Running, runs: Runs, announced: tuple[str, list[str]]
):
    hopeless = services.prefect("GET", f"flow_runs/{runs.hopeless}")["name"]
    wait_for(lambda: len(announced[1]) >= 2, 30)
    assert sorted(announced[1]) == sorted([f"codecmill: {hopeless} is Failed", "codecmill: nobody's is late"])


def test_a_run_of_the_worker_is_in_both_servers_and_its_artifacts_are_objects(services: Running, runs: Runs):
    (version,) = services.mlflow("model-versions/search")["model_versions"]
    run = services.mlflow("runs/get", run_id=version["run_id"])["run"]
    assert run["info"]["status"] == "FINISHED"
    assert run["info"]["artifact_uri"].startswith("mlflow-artifacts:/")
    stored = services.root.path / "services/objects/codecmill/mlflow"
    assert list(stored.rglob("model.safetensors"))
    assert list(stored.rglob("report.html"))
    assert not (services.root.path / "mlflow.db").exists(), "nothing has gone to the root's own database"
    assert not (services.root.path / "prefect").exists()


def test_a_command_finds_the_servers_by_the_root_alone(services: Running, runs: Runs):
    found = subprocess.run(
        [sys.executable, "-m", "flows", "doctor", "--root", str(services.root.path), "--json"],
        cwd=PROJECT,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout
    findings = {each["about"]: each for each in json.loads(found.stdout)}
    assert "is Prefect" in findings["Prefect"]["text"]
    assert "is MLflow" in findings["MLflow"]["text"]
    assert "1 online" in findings["workers"]["text"]
    assert "lets us in; buckets: codecmill" in findings["S3"]["text"]
    assert findings["secrets"]["state"] == "good"


def test_no_secret_is_anywhere_but_in_its_file(services: Running, runs: Runs):
    secrets = services.secrets
    assert len(secrets) == len(NAMES) - 1
    file = services.root.path / "services/secrets.env"
    assert file.stat().st_mode & 0o777 == 0o600
    searched = 0
    for path in services.root.path.rglob("*"):
        if path.is_file() and path != file:
            with suppress(FileNotFoundError):  # PostgreSQL's come and go
                content = path.read_bytes()
                searched += 1
                assert not [name for name, value in secrets.items() if value.encode() in content], path
    assert searched > 1000
    # Large values are compressed in PostgreSQL's files.
    dumps = {name: services.dump(name) for name in DATABASES}
    assert NAME in dumps["prefect"]
    assert NAME in dumps["mlflow"]
    assert USER in dumps["mlflow_auth"]
    for name, text in {**dumps, "told": services.told()}.items():
        assert not [secret for secret, value in secrets.items() if value in text], name
    for process in [services.process.pid, *descendants(services.process.pid)]:
        line = b" ".join(command_line(process))
        assert not [secret for secret, value in secrets.items() if value.encode() in line], line


def test_nobody_gets_in_without_a_password(services: Running, runs: Runs):
    address = read_variables(services.root.services_file)
    wrong = {"Authorization": f"Basic {base64.b64encode(b'codecmill:wrong').decode()}"}
    for headers in ({}, wrong):
        prefect = httpx.post(f"{address['PREFECT_API_URL']}/flow_runs/filter", json={}, headers=headers)
        assert prefect.status_code == 401
        for path in (
            "api/2.0/mlflow/experiments/search?max_results=1",
            "ajax-api/2.0/mlflow/experiments/search?max_results=1",
            "api/2.0/mlflow-artifacts/artifacts",
        ):
            assert httpx.get(f"{address['MLFLOW_TRACKING_URI']}/{path}", headers=headers).status_code == 401, path
        objects = httpx.get(f"{address['AWS_ENDPOINT_URL_S3']}/codecmill?list-type=2", headers=headers)
        assert objects.status_code in (400, 401, 403)
        assert "<Contents>" not in objects.text
        for figures in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
            assert httpx.get(f"{address[figures]}/metrics", headers=headers).status_code == 401
    command = ["psql", "--host=127.0.0.1", f"--port={services.postgres_port()}", f"--username={USER}", "mlflow"]
    entered = subprocess.run(
        [*command, "--command=SELECT 1"], env={**os.environ, "PGPASSWORD": "wrong"}, capture_output=True
    )
    assert entered.returncode == 2
    assert b"password authentication failed" in entered.stderr


def test_prometheus_finds_figures(services: Running, runs: Runs):
    assert 'mlflow_http_request_total{method="POST",status="200"}' in services.metrics("MLFLOW_TRACKING_URI")
    assert "python_info{" in services.metrics("PREFECT_API_URL")


UPKEEP = """
import sys
from pathlib import Path
from flows.upkeep import cleaning, verification
from pipelines.errors import CodecmillError

root, tar = map(Path, sys.argv[1:])
for dry_run in (True, False):
    print(cleaning(root, days=0, dry_run=dry_run).model_dump_json(), [path.exists() for path in root.glob("shards/0*")])
print(verification(root).model_dump_json())
content = tar.read_bytes()
tar.write_bytes(content[:-2000] + b"?" + content[-1999:])
try:
    verification(root)
except CodecmillError as error:
    print(error)
finally:
    tar.write_bytes(content)
"""


def test_upkeep_reads_all_again_and_removes_what_nobody_names(services: Running, runs: Runs, tmp_path: Path):
    directory = services.root.run(NAME)
    shard_set = directory.shard_set()
    unnamed = shard_set.with_name("0" * 16)
    shutil.copytree(shard_set, unnamed)
    tar = min(shard_set.glob("train-*.tar"))
    done = subprocess.run(
        [sys.executable, "-c", UPKEEP, str(services.root.path), str(tar)],
        cwd=PROJECT,
        env=services.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    would, went, sound, *broken = done.stdout.splitlines()
    for said, is_there in ((would, "[True]"), (went, "[]")):
        assert str(unnamed) in said and str(shard_set) not in said
        assert said.endswith(is_there)
    verified = json.loads(sound)
    assert verified["runs"] == 1
    assert verified["bytes"] > sum(file.stat().st_size for file in shard_set.glob("*.tar"))
    assert broken[0] == "1 of the files that runs come from are not as they were written:"
    assert str(tar) in broken[1]
    shown = services.prefect("POST", "artifacts/filter", {"artifacts": {"key": {"any_": ["verification", "clean-up"]}}})
    rows = {
        (each["description"].split(": ")[1], row["file" if "file" in row else "folder"])
        for each in shown
        for row in json.loads(each["data"])
    }
    size = f"({sum(file.stat().st_size for file in tar.parent.glob('*')):,} bytes)"
    assert rows >= {(f"1 folders {size} {end}.", str(unnamed)) for end in ("would go", "were removed")}
    assert [file for said, file in rows if said.startswith("1 of")] == [str(tar)]


def test_a_browser_shows_the_run_its_figures_and_its_pictures(services: Running, runs: Runs, tmp_path: Path):
    prefect = services.environment["PREFECT_API_URL"].removesuffix("/api")
    mlflow = services.environment["MLFLOW_TRACKING_URI"]
    to_prefect, to_mlflow = services.environment["PREFECT_API_AUTH_STRING"], ":".join(services.login)
    wanted = {"artifacts": {"flow_run_id": {"any_": [runs.killed]}}}
    (artifact,) = services.prefect("POST", "artifacts/filter", wanted)
    (version,) = services.mlflow("model-versions/search")["model_versions"]
    flow_run = f"{prefect}/runs/flow-run/{runs.killed}"
    run = f"{mlflow}/#/experiments/1/runs/{version['run_id']}"
    with browser(tmp_path) as page:
        page.open(flow_run, to_prefect, f"codecmill {NAME}", "Completed", "Resuming at step", "registration 3/3")
        page.open(f"{prefect}/artifacts/artifact/{artifact['id']}", to_prefect, "dB", "In MLflow", picture=IS_EMBEDDED)
        of_run, of_report = (each for each in page.links() if each.startswith(run))
        page.open(of_run, to_mlflow, NAME, "dB PSNR", "validation/psnr", "training.steps", picture=IS_ARTIFACT)
        assert {flow_run, of_report, f"{mlflow}/#/models/codecmill/versions/1"} <= {*page.links()}
        page.open(of_report, to_mlflow, "report.html")
        page.open(f"{run}/model-metrics", to_mlflow, "images_per_second", picture=IS_ARTIFACT)
        page.open(f"{mlflow}/#/models/codecmill/versions/1", to_mlflow, "champion", "Report with pictures")


def command_line(process: int) -> list[bytes]:
    """A process's words; none where it has ended meanwhile, as PostgreSQL's do all the time."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def test_all_listen_on_this_machine_alone(services: Running, runs: Runs):
    found = listening_on(descendants(services.process.pid))
    assert len(found) >= 4
    assert set(found) == {"0100007F"}, "127.0.0.1"


def process_of(running: Running, program: str, is_keeper: bool) -> int:
    """The process of a service, or its keeper's."""
    lines = {each: command_line(each) for each in descendants(running.process.pid)}
    (found,) = (
        each
        for each, line in lines.items()
        if any(part.rpartition(b"/")[2] == program.encode() for part in line)
        and (b"flows.cli.keeper" in line) == is_keeper
    )
    return found


@pytest.mark.parametrize(
    ("program", "name", "is_keeper"), [("postgres", "PostgreSQL", True), ("rclone", "The S3 server", False)]
)
def test_one_that_dies_is_named_with_its_log_and_started_again(
    program: str, name: str, is_keeper: bool, services: Running, runs: Runs
):
    """A keeper, whose program has to go with it, or the program."""
    before, victim = services.told(), process_of(services, program, is_keeper)
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: f"{name} is ready again" in services.told()[len(before) :], 60)
    said = services.told()[len(before) :]
    assert said.startswith(f"services: {name} ended with exit code")
    assert str(services.root.path / "services/logs") in said
    wait_for(lambda: services.prefect("GET", f"flow_runs/{runs.killed}")["state"]["type"] == "COMPLETED", 60)
    assert services.mlflow("model-versions/search")["model_versions"]


def test_after_a_kill_of_all_a_next_start_finds_everything_and_takes_a_changed_password(
    services: Running, folder: Path, runs: Runs
):
    everyone = descendants(services.process.pid)
    services.process.kill()
    services.process.wait()
    file = services.root.path / "services/secrets.env"
    kept = file.read_text()
    # A start at once waits for what is still dying, by the lock that it holds.
    file.write_text(
        "".join(
            line
            for line in kept.splitlines(keepends=True)
            if "POSTGRES" not in line and "MLFLOW_TRACKING_P" not in line
        )
    )
    former = services.secrets
    again = started(folder)
    assert not any(map(is_alive, everyone))
    with ended(again):
        assert again.prefect("GET", f"flow_runs/{runs.killed}")["state"]["type"] == "COMPLETED"
        (version,) = again.mlflow("model-versions/search")["model_versions"]
        directory = services.root.run(NAME).path
        (report,) = directory.glob("evaluation/*/report.html")
        environment = again.environment
        login = (environment["MLFLOW_TRACKING_USERNAME"], environment["MLFLOW_TRACKING_PASSWORD"])
        url = f"{environment['MLFLOW_TRACKING_URI']}/get-artifact"
        asked = {"run_uuid": version["run_id"], "path": str(report.relative_to(directory))}
        assert httpx.get(url, params=asked, auth=login, timeout=60).content == report.read_bytes()
        assert again.secrets["AWS_SECRET_ACCESS_KEY"] == former["AWS_SECRET_ACCESS_KEY"]
        assert again.secrets["POSTGRES_PASSWORD"] not in kept
        assert again.secrets["MLFLOW_TRACKING_PASSWORD"] not in kept
        assert file.stat().st_mode & 0o777 == 0o600
