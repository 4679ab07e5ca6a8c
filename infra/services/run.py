"""Starts PostgreSQL, an S3 server, Prefect's and MLflow's servers and a worker on this machine: `make services`.

All listen on 127.0.0.1 alone, and end with this program, however it ends. What they keep is below `<root>/services`,
and a next start finds it again; where they are stands in `<root>/services.env`, which codecmill reads.
"""

import argparse
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from flows.cli.endings import closed_place
from flows.cli.prefect_server import no_proxy
from infra.services.configuration import DATABASES, Configuration, Places, configured
from infra.services.parts import Services, addresses
from infra.services.postgres import cluster
from infra.services.secrets import NAMES, PREFIX, secrets_of
from infra.services.supervision import Supervisor, say
from pipelines.errors import CodecmillError, InputError
from pipelines.locks import lock
from pipelines.run_directory import Root
from pipelines.service_addresses import write_services
from tasks.dead_runs import put_right_beside

DYING_SECONDS = 30.0
"""How long the services of a program that was killed are waited for."""

_OF_OTHERS = (
    "PREFECT_API_",
    "PREFECT_SERVER_DATABASE_",
    "PREFECT_PROFILE",
    "PREFECT_HOME",
    "MLFLOW_TRACKING_",
    "AWS_",
    "PG",
    "RCLONE_",
)
"""Variables that speak of other servers than ours, and would reach ours by the environment."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("codecmill-data"), help="folder [codecmill-data]")
    parser.add_argument(
        "--for-compose", action="store_true", help="start nothing: secrets and addresses of compose.yaml"
    )
    parser.add_argument("--no-worker", action="store_true", help="start the servers alone")
    arguments = parser.parse_args()
    places = Places(Root(arguments.root.absolute()))
    for number in (signal.SIGINT, signal.SIGTERM):  # a script's `make services &` would have Ctrl-C ignored
        signal.signal(number, _leave)
    try:
        # PostgreSQL's user has to pass through it; what is secret in it has a mode of its own.
        _make_folder(places.folder, mode=0o711)
        for folder in (places.logs, places.prefect_home, places.objects):
            _make_folder(folder, mode=0o700)
        if arguments.for_compose:
            secrets_of(places.secrets)
            write_services(places.root, addresses(configured(is_ours=False)), places.secrets)
            print(f"Wrote {places.secrets} and {places.root.services_file}")
        else:
            with lock(places.lock, str(places.folder), wait=DYING_SECONDS) as held:
                serve(places, configured(), held, with_worker=not arguments.no_worker)
    except CodecmillError as error:
        say(str(error))
        return error.exit_code
    except OSError as error:
        closed = closed_place(error, places.root.path)
        if closed is None:
            raise
        say(closed)
        return InputError.exit_code
    return 0


def _make_folder(folder: Path, mode: int) -> None:
    """Make it where it is missing.

    Raises:
        OSError: it cannot be made; NotADirectoryError, as further up the path, where a file has its name.
    """
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error


def serve(places: Places, configuration: Configuration, held: int, with_worker: bool) -> None:
    """Start all, tell where they are, and look after them until a signal comes.

    Args:
        held: the descriptor of the lock, which each service keeps until it is gone.

    Raises:
        CodecmillError: one cannot be started, or dies again and again.
    """
    secrets = secrets_of(places.secrets)
    for name in list(os.environ):
        if name.startswith(_OF_OTHERS) or name.removeprefix(PREFIX) in NAMES:
            del os.environ[name]
    os.environ.update(no_proxy())
    databases = cluster(places.postgres)
    databases.make()
    databases.set_password(secrets["POSTGRES_PASSWORD"])
    services = Services(places, configuration, secrets, databases, held)
    with Supervisor() as supervisor:
        supervisor.start(services.postgres, services.s3)
        supervisor.start(services.prefect, services.mlflow)
        if not services.mlflow_knows_us():
            _set_mlflow_password(services)
        if with_worker:
            supervisor.start(services.worker)
        write_services(places.root, addresses(configuration), places.secrets)
        # What a former start had under way when it was killed, as a kill or a power cut does: it is known for dead now.
        put_right_beside(places.root, services.for_clients())
        _tell(places, configuration)
        supervisor.watch()


def _set_mlflow_password(services: Services) -> None:
    """MLflow keeps the password of its first start: have it take that of the file of secrets."""
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    environment = {**os.environ, **{name: services.secrets[name] for name in names}}
    environment |= {"PGPASSWORD": services.secrets["POSTGRES_PASSWORD"]}
    command = [sys.executable, "-m", "infra.services.mlflow_password", services.accounts_database()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not services.mlflow_knows_us():
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise CodecmillError(f"MLflow does not take the password in {services.places.secrets}: {last}")
    say("MLflow has the changed password")


def _tell(places: Places, configuration: Configuration) -> None:
    print(f"Prefect:  {configuration.prefect_api.removesuffix('/api')}")
    print(f"MLflow:   {configuration.mlflow}")
    print(f"S3:       {configuration.s3}, bucket {configuration.bucket}")
    print(f"Secrets:  {places.secrets}")
    print(f"Databases of PostgreSQL: {', '.join(DATABASES)}, on 127.0.0.1:{configuration.ports.postgres}")
    print(f"codecmill finds all this in {places.root.services_file}. Ctrl-C ends all.", flush=True)


def _leave(number: int, _: object) -> NoReturn:
    say("ending all; some ten seconds")
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
