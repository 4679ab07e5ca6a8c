"""What the services are told: ports and names from defaults.env and the environment, and their paths under a root."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flows.cli.services import free_port
from pipelines.errors import InputError
from pipelines.run_directory import Root
from pipelines.service_addresses import read_variables

DEFAULTS = Path(__file__).with_name("defaults.env")
USER = "codecmill"
"""Of PostgreSQL, Prefect and MLflow; the S3 server knows its user by a key, which is drawn as well."""

DATABASES = ("prefect", "mlflow", "mlflow_auth")


@dataclass(frozen=True)
class Ports:
    prefect: int
    mlflow: int
    s3: int
    postgres: int


@dataclass(frozen=True)
class Places:
    """What the services keep, below `<root>/services`."""

    root: Root

    @property
    def folder(self) -> Path:
        return self.root.path / "services"

    @property
    def lock(self) -> Path:
        return self.folder / ".lock"

    @property
    def secrets(self) -> Path:
        return self.folder / "secrets.env"

    @property
    def postgres(self) -> Path:
        return self.folder / "postgres"

    @property
    def objects(self) -> Path:
        """Each bucket a folder in it, each object a file."""
        return self.folder / "objects"

    @property
    def prefect_home(self) -> Path:
        return self.folder / "prefect"

    @property
    def mlflow_accounts(self) -> Path:
        return self.folder / "mlflow-accounts.ini"

    @property
    def mlflow_metrics(self) -> Path:
        """Counters for Prometheus, which MLflow keeps in files."""
        return self.folder / "mlflow-metrics"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"


@dataclass(frozen=True)
class Configuration:
    ports: Ports
    bucket: str

    @property
    def prefect_api(self) -> str:
        return f"http://127.0.0.1:{self.ports.prefect}/api"

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.ports.mlflow}"

    @property
    def s3(self) -> str:
        return f"http://127.0.0.1:{self.ports.s3}"


def configured(environment: Mapping[str, str] | None = None, is_ours: bool = True) -> Configuration:
    """The configuration that the environment asks for, over the defaults.

    Args:
        is_ours: the ports are for us to listen on, and not for containers.

    Raises:
        InputError: a port is none, or one that the environment names is taken.
    """
    given = os.environ if environment is None else environment
    values = read_variables(DEFAULTS) | {name: value for name, value in given.items() if name.startswith("CODECMILL_")}
    ports = {
        name: _port(f"CODECMILL_{name.upper()}_PORT", values, given, is_ours)
        for name in ("prefect", "mlflow", "s3", "postgres")
    }
    if len(set(ports.values())) < len(ports):
        raise InputError(f"Two services would share a port: {ports}. Give them different CODECMILL_*_PORT.")
    return Configuration(Ports(**ports), values["CODECMILL_BUCKET"])


def _port(name: str, values: Mapping[str, str], given: Mapping[str, str], is_ours: bool) -> int:
    if not (values[name].isdecimal() and 0 <= int(values[name]) < 65536):
        raise InputError(f"{name} is '{values[name]}', and no port: give a number up to 65535, or 0 for any free one.")
    wanted = int(values[name])
    found = free_port(wanted) if is_ours else wanted
    if name in given and wanted not in (0, found):
        raise InputError(f"{name} is {wanted}, where somebody else listens. Stop them, or name another port.")
    return found
