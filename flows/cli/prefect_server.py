"""Prefect's server: one of our own beside each command that runs a flow, over the root's database, unless one is named.

Every codecmill process starts its own server over the same SQLite file, rather than to use that of another process,
which may end at any moment. That is safe: Prefect opens the file in WAL mode and waits for its lock; only the creation
and migration of the tables is not, so servers start one after another (`.start.lock`).
"""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from flows.cli.services import GRACE_SECONDS, HOST, Service, free_port
from pipelines.errors import CodecmillError
from pipelines.locks import lock
from pipelines.run_directory import Root
from pipelines.service_addresses import prefect_at

# What schedules, cancels late runs or reacts to events has nothing to do beside a single flow run. The recorder of
# task runs and the persister of events stay: without them Prefect's pages would show no tasks.
_NEEDLESS = (
    "SCHEDULER",
    "LATE_RUNS",
    "PAUSE_EXPIRATIONS",
    "CANCELLATION_CLEANUP",
    "FOREMAN",
    "TRIGGERS",
    "REPOSSESSOR",
)
_LIGHT = {f"PREFECT_SERVER_SERVICES_{service}_ENABLED": "false" for service in _NEEDLESS} | {
    "PREFECT_SERVER_UI_ENABLED": "false",
    # Registering all block types takes a third of a first start, and no flow of ours uses one.
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
}
_CONSOLE_LEVEL = "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"
# The processes of a task runner import Prefect too and would print their log into the picture; the API gets it anyway.
_SILENT = {_CONSOLE_LEVEL: "CRITICAL"}
_QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_SERVER_LOGGING_LEVEL": "WARNING"}


LAST_WORDS_SECONDS = 30.0
"""At most, for what became of a flow's tasks: it is sent and written down last, where another server may write, too."""


class EmbeddedServer:
    """A Prefect server that lives as long as the flow beside it, and is started again on the same port if it dies."""

    def __init__(self, root: Root):
        self._root = root
        self._resources = ExitStack()
        self._resources.enter_context(start_lock(root))
        self._service = start_server(root, free_port(), _LIGHT, LAST_WORDS_SECONDS)
        self._closing = threading.Event()
        self.restarts = 0
        self._guard = threading.Thread(target=self._restart_when_dead, daemon=True)

    @property
    def api(self) -> str:
        return f"{self._service.address}/api"

    @property
    def pid(self) -> int:
        """The process id of the server's keeper."""
        return self._service.process.pid

    def wait_ready(self) -> None:
        """Return when the server answers; from then on it is started again whenever it dies.

        Raises:
            CodecmillError: it cannot start.
        """
        if self._guard.is_alive():
            return
        with self._resources:
            self._service.wait_ready()
        self._guard.start()

    def _restart_when_dead(self) -> None:
        while not self._closing.wait(0.5):
            if self._service.process.poll() is None:
                continue
            self._service.close()
            with start_lock(self._root):
                self._service = start_server(self._root, self._service.port, _LIGHT, LAST_WORDS_SECONDS)
                try:
                    self._service.wait_ready()
                except CodecmillError as error:
                    print(f"Prefect's server died and does not start again: {error}", file=sys.stderr)
                    return
            self.restarts += 1

    def close(self) -> None:
        self._closing.set()
        if self._guard.is_alive():
            self._guard.join()
        self._resources.close()
        self._service.close()


@contextmanager
def embedded_prefect(root: Root) -> Iterator[EmbeddedServer | None]:
    """A Prefect server for this process for the duration, or None where PREFECT_API_URL names one.

    Enter it before Prefect is imported, import the flow while the server starts, and call `wait_ready` before the flow.
    """
    if os.environ.get("PREFECT_API_URL"):
        with _environment(_SILENT):
            yield None
        return
    server = EmbeddedServer(root)
    try:
        with _environment(
            {"PREFECT_API_URL": server.api, "PREFECT_HOME": str(root.prefect_home), **_QUIET, **_SILENT, **no_proxy()}
        ):
            try:
                yield server
            finally:
                _send_what_is_queued()
    finally:
        server.close()


def without_heartbeats() -> AbstractContextManager[object]:
    """Flow runs beside a server of our own send none: nobody listens, and each would end up to a second later."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    return temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})


def start_server(root: Root, port: int, settings: dict[str, str], grace: float = GRACE_SECONDS) -> Service:
    """Start Prefect's server over the root's database; `grace` is that of `Service`."""
    root.prefect_home.mkdir(parents=True, exist_ok=True)
    return Service(
        name="Prefect's server",
        command=[sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)],
        environment={
            **_QUIET,
            _CONSOLE_LEVEL: "WARNING",
            **settings,
            **prefect_at(root.prefect_home),
        },
        port=port,
        health="/api/health",
        log=root.path / "logs" / f"prefect-server-{os.getpid()}.log",
        grace=grace,
    )


def start_lock(root: Root) -> AbstractContextManager[int]:
    """Hold the right to start a server over the root's database, which may create or migrate its tables."""
    root.prefect_home.mkdir(parents=True, exist_ok=True)
    return lock(root.prefect_home / ".start.lock", f"The Prefect database in {root.prefect_home}", wait=180)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    former = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def no_proxy() -> dict[str, str]:
    """What has clients, Prefect's and others, ask our servers themselves, and no proxy of the environment."""
    hosts = ",".join(filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), HOST)))
    return {"NO_PROXY": hosts, "no_proxy": hosts}


def _send_what_is_queued() -> None:
    """Have Prefect's client send its queues (states of tasks are events, too) while there is a server to take them."""
    if "prefect" not in sys.modules:
        return
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        # Every few seconds it would tell how much is left, by a logger of its own name.
        logging.getLogger(worker.__name__).setLevel(logging.ERROR)
        worker.drain_all(timeout=LAST_WORDS_SECONDS)
