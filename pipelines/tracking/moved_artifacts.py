"""The artifacts of a root that was moved or copied: MLflow's database says where they were made, by whole paths."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pipelines.locks import lock
from pipelines.run_directory import Root

EXPERIMENT = "codecmill"


def bring_artifacts_along(root: Root) -> None:
    """Have the root's own database name the root's own folder of artifacts, if it names that of a former place.

    Else what is sent from now on would go to the former place, and what was sent would be looked for there. Where the
    database cannot be read, or not be written to, MLflow will say why.
    """
    try:
        if _former_place(root) is None:
            return
        with lock(root.path / ".mlflow.lock", f"The moving of {root.mlflow_database}", wait=120):
            former = _former_place(root)
            if former is not None:  # nobody else was faster
                _rename(root, former, _own_place(root))
    except (sqlite3.Error, OSError):
        return


def _own_place(root: Root) -> str:
    return root.mlflow_artifacts.absolute().as_uri()


def _former_place(root: Root) -> str | None:
    """Another folder of artifacts, of the name that ours has, that the experiment's are said to be in."""
    with closing(
        sqlite3.connect(f"{root.mlflow_database.absolute().as_uri()}?mode=ro", uri=True, timeout=5)
    ) as database:
        found = database.execute("SELECT artifact_location FROM experiments WHERE name = ?", (EXPERIMENT,)).fetchone()
    place = str(found[0]) if found else ""
    is_a_roots = place.startswith("file:///") and place.endswith(f"/{root.mlflow_artifacts.name}")
    if not is_a_roots or place == _own_place(root) or _is_same(Path(url2pathname(urlsplit(place).path)), root):
        return None
    return place


def _is_same(folder: Path, root: Root) -> bool:
    """Whether it is ours by another name, as through a link."""
    try:
        return os.path.samefile(folder, root.mlflow_artifacts)  # noqa: PTH121  # pathlib's is the same
    except OSError:
        return False


def _rename(root: Root, former: str, own: str) -> None:
    """Put our folder in the other's place, in all that lies in it, or in nothing."""
    columns = (("experiments", "artifact_location"), ("runs", "artifact_uri"))  # versions name runs, no folders
    with closing(sqlite3.connect(root.mlflow_database, timeout=5)) as database, database:
        for table, column in columns:
            database.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608  # names of ours
                f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                (own, len(former) + 1, former, len(former) + 1, f"{former}/"),
            )
