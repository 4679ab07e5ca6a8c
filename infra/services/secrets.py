"""The services' secrets: drawn once, kept in one file that only its owner can read, or given in the environment."""

import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from infra.services.configuration import USER
from pipelines.durable_files import write_bytes
from pipelines.errors import InputError
from pipelines.service_addresses import read_variables

_CARRIED = re.compile(r"[\w.:+/=@%-]{1,200}", re.ASCII)
"""What shells, compose and rclone take from a line NAME=value as it is."""
_HEADING = """\
# Secrets of codecmill's services. Whoever reads this file can do with them what they like: keep it to yourself.
# To change one, remove its line (another is drawn) or write your own, and start the services again.
"""


def _drawn() -> dict[str, str]:
    password = secrets.token_urlsafe(24)
    return {
        "PREFECT_API_AUTH_STRING": f"{USER}:{secrets.token_urlsafe(24)}",
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": password,
        "AWS_ACCESS_KEY_ID": f"{USER}-{secrets.token_hex(8)}",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
        "POSTGRES_PASSWORD": secrets.token_urlsafe(24),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(32),
    }


NAMES = tuple(_drawn())
"""In this order they stand in the file; compose.yaml knows them by the same names."""


PREFIX = "CODECMILL_"
"""Before a name in the environment. A plain AWS_SECRET_ACCESS_KEY may well be that of a cloud, and none of ours."""


def secrets_of(file: Path, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The secrets by name: from the environment, else from the file, else drawn; what is new is written down.

    Raises:
        InputError: one is empty, too long, or has characters that not everybody reads alike.
    """
    given = os.environ if environment is None else environment
    kept = read_variables(file) if file.is_file() else {}
    found = {**_drawn(), **{name: kept[name] for name in NAMES if name in kept}}
    found |= {name: given[PREFIX + name] for name in NAMES if PREFIX + name in given}
    for name, value in found.items():
        if not _CARRIED.fullmatch(value):
            raise InputError(f"{name} cannot be used: give 1 to 200 letters, digits and characters of _.:+/=@%-")
    if found != kept:
        lines = "".join(f"{name}={found[name]}\n" for name in NAMES)
        write_bytes(file, (_HEADING + lines).encode("ascii"), mode=0o600)
    file.chmod(0o600)
    return found
