"""`services.env`: where a root's servers are, for commands whose environment does not name others.

The file has addresses and names the file of secrets; both are lines of `NAME=value`. Nothing but the names below is
ever taken from them, and a server that the environment names is not sent the secrets of another.
"""

import os
import stat
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.durable_files import write_bytes
from pipelines.errors import InputError
from pipelines.run_directory import Root
from pipelines.tolerant_reading import exists

SECRETS_FILE = "CODECMILL_SECRETS_FILE"
"""Names the file of secrets, from the folder of services.env."""

_LONGEST = 65_536


@dataclass(frozen=True)
class _Server:
    """A server's variables.

    Attributes:
        chosen_by: with one of these in the environment, be it empty, the user speaks of another server, or of none.
        settings: taken from services.env.
        secrets: taken from the file of secrets.
    """

    chosen_by: tuple[str, ...]
    settings: tuple[str, ...]
    secrets: tuple[str, ...]


_SERVERS = (
    _Server(("PREFECT_API_URL",), ("PREFECT_API_URL",), ("PREFECT_API_AUTH_STRING",)),
    _Server(
        ("MLFLOW_TRACKING_URI",),
        ("MLFLOW_TRACKING_URI",),
        ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    ),
    _Server(
        ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_ACCESS_KEY_ID"),
        (
            "AWS_ENDPOINT_URL_S3",
            "AWS_DEFAULT_REGION",
            "AWS_REQUEST_CHECKSUM_CALCULATION",
            "AWS_RESPONSE_CHECKSUM_VALIDATION",
        ),
        ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    ),
)


def use_services(root: Root, environment: MutableMapping[str, str] | None = None) -> None:
    """Complete the environment, this process's by default, with what the root's services.env says.

    What is set there stays as it is. Without a services.env nothing happens.

    Raises:
        InputError: services.env cannot be read, or what it names is no file of secrets.
    """
    target = os.environ if environment is None else environment
    if not exists(root.services_file):
        return
    settings = read_variables(root.services_file)
    file = secrets_file(root, settings)
    # Who may not read them, or has none, can still look at runs; the servers will say that they want a password.
    secrets = read_variables(file) if file is not None and os.access(file, os.R_OK) else {}
    chosen = [server for server in _SERVERS if not any(name in target for name in server.chosen_by)]
    for server in chosen:
        for name, source in [
            *((each, settings) for each in server.settings),
            *((each, secrets) for each in server.secrets),
        ]:
            if name in source:
                target.setdefault(name, source[name])


def write_services(root: Root, settings: Mapping[str, str], secrets: Path) -> None:
    """Write services.env, whole or not at all."""
    lines = [
        "# Where this root's servers are: codecmill reads it, as other programs do after `set -a; . services.env`.",
        "# No secrets in it. A variable that the environment sets stands over the one here.",
        *(f"{name}={value}" for name, value in settings.items()),
        f"{SECRETS_FILE}={os.path.relpath(secrets, root.services_file.parent)}",
    ]
    write_bytes(root.services_file, ("\n".join(lines) + "\n").encode())


def secrets_file(root: Root, settings: Mapping[str, str]) -> Path | None:
    """The file of secrets that services.env names."""
    return root.services_file.parent / settings[SECRETS_FILE] if settings.get(SECRETS_FILE) else None


def read_variables(file: Path) -> dict[str, str]:
    """The lines `NAME=value` of a file, without quotes or expansions; comments and empty lines are left out.

    Raises:
        InputError: it is no such file, or cannot be read.
    """
    try:
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise InputError(f"{file} is no regular file. Remove it, or write lines NAME=value.")
            content = opened.read(_LONGEST + 1)
        if len(content) > _LONGEST:
            raise InputError(f"{file} is longer than {_LONGEST} bytes, and no list of variables. Remove it.")
        lines = content.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}. Have it readable for you, or remove it.") from error
    values: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, separator, value = line.partition("=")
        if not separator or not name.strip().isidentifier():
            raise InputError(f"Line {number} of {file} is not of the form NAME=value. Correct it, or remove the file.")
        values[name.strip()] = value.strip()
    return values


def prefect_at(home: Path) -> dict[str, str]:
    """The environment of a Prefect that works over a home's own database, also where another one's is named."""
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home.absolute()}/prefect.db",
    }
