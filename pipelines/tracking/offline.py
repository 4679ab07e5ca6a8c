"""What the root's own registry says of a version, read from its database in a millisecond: MLflow takes two seconds."""

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from pipelines.errors import InputError
from pipelines.run_directory import Root
from pipelines.tracking.connection import is_own_database

MODEL_ADDRESS = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d{1,9}))")


class NoVersionError(InputError):
    """The registry is there, and has no version of that name."""


class Registration(NamedTuple):
    """A registered version: its number, the address that it was registered from, and its weights' sha256."""

    number: int
    source: str
    checkpoint_sha256: str


def registered_offline(address: str, root: Root) -> Registration | None:
    """The version that `models:/<name>@<alias>` or `models:/<name>/<number>` names; None where only MLflow can tell.

    Raises:
        NoVersionError: the root's own registry can be read, and has no such version.
    """
    match = MODEL_ADDRESS.fullmatch(address)
    if match is None or not is_own_database(root) or not root.mlflow_database.is_file():
        return None
    try:
        with closing(_opened_for_reading(root.mlflow_database)) as database:
            return _version(database, match[1], match[2], match[3]) or _refuse(database, address, match[1], root)
    except (sqlite3.Error, ValueError):
        return None  # locked, damaged, or of an MLflow with other tables


def _opened_for_reading(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=1)


def _version(database: sqlite3.Connection, model: str, alias: str | None, number: str | None) -> Registration | None:
    if alias:
        rows = database.execute(
            "SELECT version FROM registered_model_aliases WHERE name = ? AND alias = ?", (model, alias)
        ).fetchall()
        number = str(rows[0][0]) if rows else None
    found = database.execute(
        "SELECT version, source FROM model_versions WHERE name = ? AND version = ? AND current_stage <> ?",
        (model, int(number or 0), "Deleted_Internal"),
    ).fetchone()
    if found is None:
        return None
    tags = database.execute(
        "SELECT value FROM model_version_tags WHERE name = ? AND version = ? AND key = 'checkpoint_sha256'",
        (model, found[0]),
    ).fetchone()
    return Registration(int(found[0]), str(found[1]), str(tags[0]) if tags else "")


def _refuse(database: sqlite3.Connection, address: str, model: str, root: Root) -> None:
    aliases = database.execute(
        "SELECT alias, version FROM registered_model_aliases WHERE name = ?", (model,)
    ).fetchall()
    named = ", ".join(f"{alias} (version {number})" for alias, number in sorted(aliases))
    raise NoVersionError(f"There is no {address} in {root.mlflow_database}. Its aliases: {named or 'none'}.")
