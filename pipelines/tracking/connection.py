"""How MLflow is reached: which one, quietly, quickly, and with errors that a user can act on."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import uuid4

from pipelines.durable_files import sync_folder
from pipelines.errors import CodecmillError, InputError
from pipelines.locks import lock
from pipelines.run_directory import Root
from pipelines.tracking.moved_artifacts import EXPERIMENT, bring_artifacts_along

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}
"""Has MLflow's pages show the experiment as training of models, not as traces and judges of a chat."""
REQUEST_SECONDS = 5
"""How long an unresponsive server is waited for, twice at most."""
SLOWEST_UPLOAD = 1_000_000
"""Bytes a second below which a server counts as hanging."""

_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # It logs what it raises as well, with traceback and SQL; what it raises is told in one sentence.
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    _RETRIES: "1",
    _TIMEOUT: str(REQUEST_SECONDS),
    # Else it waits for as long as a server that is busy, or whatever stands before it, says: up to hours.
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
}


class TrackingUnavailable(CodecmillError):
    """MLflow does not answer at the moment; the same call may succeed later, and nothing is lost until then."""

    may_pass = True


def tracking_uri(root: Root) -> str:
    """Where MLflow is: `MLFLOW_TRACKING_URI` if it is set, else a SQLite file under the root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _own_database(root)


def _own_database(root: Root) -> str:
    return f"sqlite:///{root.mlflow_database.absolute()}"


def is_own_database(root: Root) -> bool:
    """Whether MLflow is the root's own SQLite file."""
    return tracking_uri(root) == _own_database(root)


def is_unmade(root: Root) -> bool:
    """Whether MLflow is to be the root's own SQLite file, and that is not there: not yet, or not any more."""
    return is_own_database(root) and not root.mlflow_database.is_file()


def shown_address(root: Root) -> str:
    """MLflow by its address, as it may be shown."""
    return f"MLflow at {without_password(tracking_uri(root))}"


def shown_place(root: Root) -> str:
    """Where MLflow is, as it may be shown, in short."""
    return root.mlflow_database.name if is_own_database(root) else shown_address(root)


def is_current(uri: str, root: Root) -> bool:
    """Whether a stored address, which has no password, is that of the MLflow in use."""
    return uri == without_password(tracking_uri(root))


def without_password(uri: str) -> str:
    """The URI as it may be shown and stored."""
    try:
        parts = urlsplit(uri)
    except ValueError:  # no address at all, such as http://[: whatever stands where a password does is left out
        return re.sub("(?<=//).*@", "***@", uri)
    if ":" in parts.netloc and "@" in "".join(parts[2:]):  # a password with a bare '/', '?' or '#' is cut there
        return re.sub("(?<=//).*@", "***@", uri)
    if parts.password is None:
        return uri
    return parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@", 1)).geturl()


@contextmanager
def connected(root: Root) -> Iterator["MlflowClient"]:
    """A client for the root's MLflow; what MLflow raises inside becomes one sentence.

    Raises:
        TrackingUnavailable: it cannot be reached, is overloaded, or its database is locked.
        InputError: the client of its database, or of the bucket with its artifacts, is not installed.
        CodecmillError: it refused, or an artifact could not be written.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    uri = tracking_uri(root)
    try:
        if is_own_database(root):
            _make_database(root)
            bring_artifacts_along(root)
        yield _client(uri)
    except ModuleNotFoundError as error:
        raise InputError(
            f"MLflow at {without_password(uri)} needs the package {error.name} here, which is not installed: pip "
            "install -c requirements.lock -e '.[services]' has those for PostgreSQL and S3. Or name a server that "
            "reads and writes all of it itself."
        ) from error
    except Exception as error:
        if isinstance(error, (MlflowException, SQLAlchemyError, OSError)) or _is_of_a_bucket(error):
            raise _explained(error, without_password(uri)) from error
        raise


def ensure_database(root: Root) -> None:
    """Make the root's own database, if that is what MLflow uses and it is missing: before a server is started on it."""
    with connected(root):
        pass


def _make_database(root: Root) -> None:
    """Make the root's own database if it has none; a crash at any moment leaves it whole or absent.

    MLflow makes its tables in place, in many steps and without a lock: two processes at once, or a kill in the middle,
    leave a database that never opens again ("duplicate column name").
    """
    final = root.mlflow_database
    if final.exists():
        return
    root.path.mkdir(parents=True, exist_ok=True)
    with lock(root.path / ".mlflow.lock", f"The making of {final}", wait=120):
        if final.exists():
            return
        building = final.with_name(f".tmp-{final.name}-{uuid4().hex}")
        try:
            _client(f"sqlite:///{building.absolute()}")
            building.replace(final)
        finally:
            building.unlink(missing_ok=True)
    sync_folder(root.path)


def _client(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    if not is_server(uri):
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = 2  # of ten tries to open a database, all of them silent, the last waits for 50 s
    return MlflowClient(tracking_uri=uri)


def is_server(uri: str) -> bool:
    """Whether it is the address of a server, not of a database."""
    return uri.startswith(("http://", "https://"))


def experiment_id(client: "MlflowClient", root: Root) -> str:
    """The experiment 'codecmill', created by whoever comes first."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        # A server places artifacts itself; a bare database would put them below the working directory.
        location = None if is_server(tracking_uri(root)) else root.mlflow_artifacts.absolute().as_uri()
        try:
            return client.create_experiment(EXPERIMENT, artifact_location=location, tags=MODEL_TRAINING)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        raise CodecmillError(f"MLflow says that the experiment '{EXPERIMENT}' exists, but does not show it.")
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return experiment.experiment_id


@contextmanager
def sent_once() -> Iterator[None]:
    """Have MLflow's client send a request that makes something once, and wait as long as for all tries of another.

    A server that was only slow has made it: the same request again would make a second. Whoever calls looks first
    whether it is there.
    """
    is_usual = all(os.environ[name] == _SETTINGS[name] for name in (_RETRIES, _TIMEOUT))
    with _set(_RETRIES, "0"), _set(_TIMEOUT, str(2 * REQUEST_SECONDS) if is_usual else os.environ[_TIMEOUT]):
        yield


@contextmanager
def patience_for(size: int) -> Iterator[None]:
    """Give a server time to store `size` bytes before it counts as hanging, unless the user chose a timeout."""
    if os.environ.get(_TIMEOUT) != _SETTINGS[_TIMEOUT]:
        yield
        return
    with _set(_TIMEOUT, str(REQUEST_SECONDS + size // SLOWEST_UPLOAD)):
        yield


@contextmanager
def _set(name: str, value: str) -> Iterator[None]:
    """Another value of a variable that is set, for the duration."""
    former, os.environ[name] = os.environ[name], value
    try:
        yield
    finally:
        os.environ[name] = former


def _explained(error: BaseException, uri: str) -> CodecmillError:
    from requests.exceptions import ChunkedEncodingError, ConnectionError, RetryError, Timeout
    from sqlalchemy.exc import OperationalError

    absences = (ChunkedEncodingError, ConnectionError, RetryError, Timeout, OperationalError)

    chain = list(_causes(error))
    reason = _said(chain[-1], 300)
    is_bucket = any(map(_is_bucket_away, chain))
    if is_bucket or any(isinstance(link, absences) for link in chain):
        if is_bucket:
            way_out = "Look for the bucket in which it has artifacts kept"
        elif uri.startswith("sqlite:"):
            way_out = "Look for a full disk or for another process that holds it"
        else:
            way_out = "Start it or correct MLFLOW_TRACKING_URI"
        return TrackingUnavailable(
            f"MLflow at {uri} cannot be reached: {reason}. {way_out}; what it has missed is on disk, to be sent later."
        )
    return CodecmillError(f"MLflow at {uri} did not take it: {_said(error, 500)}")


def _said(error: BaseException, longest: int) -> str:
    """The first line of what an error says, without the passwords of the addresses in it."""
    first = str(error).strip().partition("\n")[0] or type(error).__name__
    return re.sub(r"(?<=://)[^\s/]\S*@", "***@", first)[:longest]


def _is_of_a_bucket(error: BaseException) -> bool:
    """Whether it is of the client of S3, which MLflow's passes on: some servers have artifacts written by who has them.

    By its name, as to import that client takes as long as half of MLflow.
    """
    return type(error).__module__.partition(".")[0] in ("boto3", "botocore")


def _is_bucket_away(error: BaseException) -> bool:
    if not _is_of_a_bucket(error):
        return False
    answer = (getattr(error, "response", None) or {}).get("ResponseMetadata", {})
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return answer.get("HTTPStatusCode", 0) >= HTTPStatus.INTERNAL_SERVER_ERROR or not kinds.isdisjoint(
        {"ConnectionError", "HTTPClientError"}
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
