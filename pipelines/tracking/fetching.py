"""Checkpoints out of MLflow: what `runs:/...` and `models:/...` name, as a folder on this machine."""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import checkpoint_format
from pipelines.errors import InputError
from pipelines.run_directory import Root
from pipelines.tracking.artifacts import CHECKPOINTS
from pipelines.tracking.connection import connected, is_unmade, patience_for, shown_address, tracking_uri
from pipelines.tracking.offline import MODEL_ADDRESS, NoVersionError, Registration, registered_offline

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import FileInfo
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

RUN_ADDRESS = re.compile(r"runs:/([^/]+)/?(.*?)/*")
FORMS = "runs:/<run id>, runs:/<run id>/checkpoints/step_00000200, models:/<name>@<alias> or models:/<name>/<version>"


def fetch_checkpoint(source: str, root: Root, into: Path) -> Path:
    """Copy a checkpoint from MLflow to this machine.

    Args:
        source: `runs:/<run id>` (its newest checkpoint), `runs:/<run id>/<folder>`, `models:/<name>@<alias>` or
            `models:/<name>/<version>`.
        into: a folder to put it in.

    Returns:
        The checkpoint's folder, with its weights and manifest.

    Raises:
        InputError: there is no such run, model, alias, version or checkpoint; the message says which there are.
        TrackingUnavailable: MLflow cannot be reached.
    """
    if is_unmade(root):
        raise NoVersionError(f"There is no {source}: nothing has been sent to MLflow under {root.path} yet.")
    with connected(root) as client:
        where = shown_address(root)
        version = _registration(client, source, where) if source.startswith("models:/") else None
        address = version.source if version else source
        match = RUN_ADDRESS.fullmatch(address)
        if match is None:
            raise InputError(f"'{source}' is no address in MLflow. Write {FORMS}.")
        run_id, path = match[1], match[2]
        artifacts = _artifacts(client, run_id, where, tracking_uri(root))
        if not path:
            newest = next(_checkpoints(artifacts), None)
            if newest is None:
                raise InputError(f"Run {run_id} in {where} has no checkpoint yet.")
            path = newest
        files = _files(artifacts, path)
        if not files:
            known = ", ".join(f"runs:/{run_id}/{folder}" for folder in [*islice(_checkpoints(artifacts), 5)][::-1])
            raise InputError(f"{address} in {where} is no checkpoint. The newest of that run: {known or 'none'}.")
        folder = into / path
        folder.mkdir(parents=True, exist_ok=True)
        with patience_for(max(file.file_size or 0 for file in files)):
            for file in files:
                # What is public downloads all at once, and of what fails says neither why nor whether that may pass.
                artifacts._download_file(file.path, str(folder / Path(file.path).name))
        if version and version.checkpoint_sha256:
            _check_weights(folder, version.checkpoint_sha256, f"{source} in {where}")
        return folder


def _check_weights(folder: Path, registered: str, what: str) -> None:
    found = checkpoint_format.weights_sha256(checkpoint_format.read_manifest(folder))
    if found != registered:
        raise InputError(
            f"{what} is not what was registered: the weights in its place have the sha256 {str(found)[:16]}... instead "
            f"of {registered[:16]}.... Name another version, or a checkpoint's folder."
        )


def registered(address: str, root: Root) -> Registration:
    """The version that `models:/<name>@<alias>` or `models:/<name>/<number>` names.

    Raises:
        NoVersionError: there is none. InputError: it is no such address, or none of codecmill's versions.
        TrackingUnavailable: MLflow cannot be reached.
    """
    if known := registered_offline(address, root):
        return known
    if is_unmade(root):
        raise NoVersionError(f"There is no {address}: nothing has been registered under {root.path} yet.")
    with connected(root) as client:
        return _registration(client, address, shown_address(root))


def _artifacts(client: "MlflowClient", run_id: str, where: str, uri: str) -> "ArtifactRepository":
    """Where the artifacts of a run lie."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        return get_artifact_repository(str(client.get_run(run_id).info.artifact_uri), tracking_uri=uri)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise InputError(
            f"There is no run '{run_id}' in {where}. A run's MLflow id stands in its mlflow_run.json."
        ) from error


def _checkpoints(artifacts: "ArtifactRepository") -> Iterator[str]:
    """The complete checkpoints of a run, newest first."""
    folders = sorted((file.path for file in artifacts.list_artifacts(CHECKPOINTS) if file.is_dir), reverse=True)
    return (folder for folder in folders if _files(artifacts, folder))


def _files(artifacts: "ArtifactRepository", path: str) -> "list[FileInfo]":
    """The files of a checkpoint; empty where there is none, or not all of one."""
    if Path(path).is_absolute() or ".." in Path(path).parts:  # as a version of somebody else's may say
        return []
    files = [file for file in artifacts.list_artifacts(path) if not file.is_dir]
    names = {Path(file.path).name for file in files}
    has_weights = {checkpoint_format.WEIGHTS, checkpoint_format.SHARDING} & names
    return files if has_weights and checkpoint_format.MANIFEST in names else []


def _registration(client: "MlflowClient", source: str, where: str) -> Registration:
    match = MODEL_ADDRESS.fullmatch(source)
    if match is None:
        raise InputError(f"'{source}' names no registered version. Write {FORMS}.")
    name, alias = match[1], match[2]
    model = _model(client, name, where)
    aliases = {alias: int(number) for alias, number in model.aliases.items()}
    number = aliases.get(alias) if alias else int(match[3])
    known = _version(client, name, number)
    if known is None:
        raise NoVersionError(f"There is no {source} in {where}. {_existing(client, name, aliases)}")
    if not str(known.source).startswith("runs:/"):
        raise InputError(f"{source} was not registered by codecmill: its source is {known.source}.")
    return Registration(int(known.version), str(known.source), str(known.tags.get("checkpoint_sha256", "")))


def _model(client: "MlflowClient", name: str, where: str) -> "RegisteredModel":
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = ", ".join(sorted(model.name for model in client.search_registered_models(max_results=20)))
        raise NoVersionError(
            f"There is no registered model '{name}' in {where}. Registered there: {names or 'none yet'}."
        ) from error


def _version(client: "MlflowClient", name: str, number: int | None) -> "ModelVersion | None":
    from mlflow.exceptions import MlflowException

    if number is None:
        return None
    try:
        return client.get_model_version(name, str(number))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _existing(client: "MlflowClient", name: str, aliases: dict[str, int]) -> str:
    versions = client.search_model_versions(f"name = '{name}'", max_results=1000)
    newest = ", ".join(str(number) for number in sorted(int(version.version) for version in versions)[-5:])
    named = ", ".join(f"{alias} (version {number})" for alias, number in sorted(aliases.items()))
    return f"Its aliases: {named or 'none'}. Its newest versions: {newest or 'none'}."
