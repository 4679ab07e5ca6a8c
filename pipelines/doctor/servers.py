"""The servers that the environment names: whether they answer, let us in, and are of versions that go together."""

import base64
import http.client
import json
import os
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import metadata
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from pipelines import tracking
from pipelines.doctor.findings import Finding, fault, good, note
from pipelines.doctor.storage import compared_clock
from pipelines.run_directory import Root
from pipelines.trusted_certificates import trusted

TIMEOUT_SECONDS = 5.0
WORK_POOL = "codecmill"
"""As prefect.yaml names it."""


class Faulty(Exception):
    """A server that is configured and cannot be used."""

    def __init__(self, finding: Finding):
        super().__init__(finding.text)
        self.finding = finding


def examine_prefect() -> Iterator[Finding]:
    """`PREFECT_API_URL` and its credentials, as Prefect reads them."""
    address = os.environ.get("PREFECT_API_URL")
    if not address:
        yield good("Prefect", "no server is named (PREFECT_API_URL): each command starts its own")
        return
    server = Server("Prefect", address.rstrip("/"), _prefect_credentials())
    try:
        yield from server.examined("/admin/version", package="prefect")
        yield _workers(server)
    except Faulty as found:
        yield found.finding


def barred_from_prefect() -> Finding | None:
    """Why the server of `PREFECT_API_URL` cannot be used at all; None where it answers and lets us in."""
    try:
        server = Server("Prefect", os.environ["PREFECT_API_URL"].rstrip("/"), _prefect_credentials())
        server.ask("GET", "/admin/version", may_be=(200, 404, 503))
    except Faulty as found:
        return found.finding
    return None


def examine_mlflow(root: Root) -> Iterator[Finding]:
    """`MLFLOW_TRACKING_URI` and its credentials, as MLflow reads them."""
    address = tracking.tracking_uri(root)
    if not tracking.is_server(address):
        yield good("MLflow", f"no server is named; its records are in {tracking.without_password(address)}")
        return
    server = Server("MLflow", address.rstrip("/"), _mlflow_credentials(address))
    try:
        yield from server.examined("/version", package="mlflow")
        server.ask("GET", "/api/2.0/mlflow/experiments/search?max_results=1")  # this needs the credentials
    except Faulty as found:
        yield found.finding


@dataclass(frozen=True)
class Server:
    """One that is configured; `headers` have its credentials."""

    name: str
    address: str
    headers: Mapping[str, str]

    @property
    def shown(self) -> str:
        return tracking.without_password(self.address)

    def examined(self, version_path: str, package: str) -> Iterator[Finding]:
        """Its version beside that of our package, and its clock."""
        answer = self.ask("GET", version_path)
        yield _compared_versions(self.name, self.shown, answer.text.strip().strip('"'), metadata.version(package))
        if answer.clock is not None:
            yield compared_clock(f"clock of {self.name}", answer.clock)

    def ask(self, method: str, path: str, body: Any = None, may_be: tuple[int, ...] = (200,)) -> "Answer":
        """What it answers.

        Raises:
            Faulty: it does not answer, or with another status than it may.
        """
        try:
            answer = _answer(method, self.address + path, self.headers, body, _trusted(self.name, self.address))
        except (OSError, http.client.HTTPException, ValueError) as error:
            text = f"{self.shown} does not answer: {error or type(error).__name__}"
            remedy = "Start it, or correct its address in the environment or services.env."
        else:
            if answer.status in may_be:
                return answer
            if answer.status in (401, 403):
                text = f"{self.shown} refuses our credentials ({answer.status})"
                remedy = _CREDENTIALS[self.name]
            else:
                text = f"{self.shown}{path} answers {answer.status}"
                remedy = "See the server's log, or correct its address in the environment or services.env."
        raise Faulty(fault(self.name, text, remedy))


_CREDENTIALS = {
    "Prefect": "Set PREFECT_API_AUTH_STRING (user:password) or PREFECT_API_KEY as the server wants it.",
    "MLflow": "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.",
}


@dataclass(frozen=True)
class Answer:
    """Attributes: clock: seconds by which the server's clock is ahead of ours, to the second."""

    status: int
    text: str
    clock: float | None


class _AsItIs(HTTPRedirectHandler):
    """Lets a redirection be the answer: the clients' requests would not all survive it."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


def _answer(method: str, url: str, headers: Mapping[str, str], body: Any, context: ssl.SSLContext | None) -> Answer:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        raise ValueError("that is no address of the form http://host:port")
    content = None if body is None else json.dumps(body).encode()
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # its password is in the headers
    all_headers = {"Content-Type": "application/json", **headers}
    request = Request(address, content, all_headers, method=method)  # noqa: S310  # http(s), see above
    opener = build_opener(HTTPSHandler(context=context), _AsItIs)
    try:
        response = opener.open(request, timeout=TIMEOUT_SECONDS)
    except HTTPError as refusal:
        response = refusal
    except URLError as error:  # says so in its reason
        raise error.reason if isinstance(error.reason, OSError) else ValueError(error.reason) from error
    with response:
        text = response.read(2**20).decode("utf-8", "replace")
        date = response.headers.get("Date")
    clock = parsedate_to_datetime(date).timestamp() - time.time() if date else None
    return Answer(response.status or 0, text, clock)


def _trusted(server: str, address: str) -> ssl.SSLContext | None:
    """Whose certificates a server may have, as its client reads it from the environment; None where it does not: that
    of Prefect wants the file that is named there for plain http as well.

    Raises:
        OSError: it cannot be read.
    """
    if server == "MLflow" and urlsplit(address).scheme != "https":
        return None
    anyone, files = _TRUST[server]
    file = next((found for name in files if (found := os.environ.get(name))), None)
    return trusted(file, os.environ.get(anyone, "").lower() in ("1", "true", "t", "yes", "y", "on"))


_TRUST = {
    "Prefect": ("PREFECT_API_TLS_INSECURE_SKIP_VERIFY", ("PREFECT_API_SSL_CERT_FILE", "SSL_CERT_FILE")),
    "MLflow": (
        "MLFLOW_TRACKING_INSECURE_TLS",
        ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    ),
}


def _prefect_credentials() -> dict[str, str]:
    if pair := os.environ.get("PREFECT_API_AUTH_STRING"):
        return _basic(pair)
    key = os.environ.get("PREFECT_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _mlflow_credentials(address: str) -> dict[str, str]:
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    with suppress(ValueError):  # it is no address, which asking it will say
        parts = urlsplit(address)
        if parts.username is not None:
            user, password = unquote(parts.username), unquote(parts.password or "")
    if user and password is not None:
        return _basic(f"{user}:{password}")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _basic(pair: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _compared_versions(name: str, address: str, theirs: str, ours: str) -> Finding:
    """A server may be newer than its clients, within a major version; never older by a minor one."""
    text = f"{address} is {name} {theirs}"
    try:
        server, client = (tuple(map(int, version.split(".")[:2])) for version in (theirs, ours))
    except ValueError:
        return note(name, f"{address} says that its version is '{theirs[:60]}'", f"Ours is {ours}: compare them.")
    if server[0] != client[0] or server < client:
        return fault(name, f"{text}, and ours is {ours}", f"Run the server with {name} {ours} or a later one of it.")
    return good(name, text)


def _workers(server: Server) -> Finding:
    """Somebody has to run what is scheduled."""
    answer = server.ask("POST", f"/work_pools/{WORK_POOL}/workers/filter", {}, may_be=(200, 404))
    start = f"python -m infra.services.worker --pool {WORK_POOL}"  # whose flow runs save where it is ended
    if answer.status == 404:
        remedy = f"For scheduled runs: prefect work-pool create {WORK_POOL} --type process, then {start}"
        return note("workers", f"there is no work pool '{WORK_POOL}'", remedy)
    try:
        online = [str(each["name"]) for each in json.loads(answer.text) if each.get("status") == "ONLINE"]
    except (ValueError, TypeError, AttributeError, KeyError):
        text = f"{server.shown} answers, but not as Prefect's server does"
        raise Faulty(fault("workers", text, "Correct PREFECT_API_URL: it ends with /api.")) from None
    if not online:
        return note("workers", f"none is online in the work pool '{WORK_POOL}'", f"For scheduled runs: {start}")
    return good("workers", f"{len(online)} online in the work pool '{WORK_POOL}': {', '.join(sorted(online)[:4])}")
