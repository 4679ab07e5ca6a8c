"""`codecmill ui`: MLflow's and Prefect's pages over the local state, until Ctrl-C."""

import os
import sys
import time
from contextlib import ExitStack

from flows.cli.prefect_server import start_lock, start_server
from flows.cli.services import HOST, Service, free_port
from pipelines.errors import InputError
from pipelines.run_directory import Root
from pipelines.tracking.connection import ensure_database, is_server, tracking_uri, without_password

MLFLOW_PORT = 5000
PREFECT_PORT = 4200


def serve_pages(root: Root) -> None:
    """Start what no environment variable names a server for, print the addresses, and wait.

    Raises:
        CodecmillError: a server cannot start, or dies.
    """
    if not root.path.is_dir():
        raise InputError(
            f"There is no folder {root.path} yet. Start with `codecmill demo`, or name another with --root."
        )
    # MLFLOW_TRACKING_URI may name a database as well; that is served like our own.
    tracking, prefect = tracking_uri(root), os.environ.get("PREFECT_API_URL")
    mlflow = tracking if is_server(tracking) else None
    with ExitStack() as stack:
        with ExitStack() as starting:
            pages = {
                "MLflow": _page(mlflow) if mlflow else _kept(stack, _start_mlflow(root)),
                "Prefect": _page(prefect) if prefect else _kept(stack, _start_prefect(root, starting)),
            }
            services = [page for page in pages.values() if isinstance(page, Service)]
            for service in services:
                service.wait_ready()
        for what, page in pages.items():
            address = page.address if isinstance(page, Service) else f"{page} (your server; nothing was started)"
            print(f"{what + ':':9}{address}", flush=True)
        if services:
            print(f"Ctrl-C ends {'both' if len(services) == 2 else 'it'}.", file=sys.stderr, flush=True)
            _watch(services)


def _kept(stack: ExitStack, service: Service) -> Service:
    stack.callback(service.close)
    return service


def _watch(services: list[Service]) -> None:
    while True:
        for service in services:
            service.check()
        time.sleep(0.3)


def _start_mlflow(root: Root) -> Service:
    ensure_database(root)
    root.mlflow_artifacts.mkdir(parents=True, exist_ok=True)
    port = free_port(MLFLOW_PORT)
    return Service(
        name="MLflow's server",
        command=[
            *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
            *("--artifacts-destination", root.mlflow_artifacts.absolute().as_uri()),
        ],
        environment={
            # It may have a password, and all users of a machine see command lines.
            "MLFLOW_BACKEND_STORE_URI": tracking_uri(root),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            # Its pool of job processes serves evaluations of language models.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
        port=port,
        health="/health",
        log=root.path / "logs" / f"mlflow-server-{os.getpid()}.log",
    )


def _start_prefect(root: Root, starting: ExitStack) -> Service:
    starting.enter_context(start_lock(root))
    port = free_port(PREFECT_PORT)
    return start_server(root, port, {"PREFECT_SERVER_UI_API_URL": f"http://{HOST}:{port}/api"})


def _page(address: str) -> str:
    """A server's page, where `address` is its API, without a password."""
    return without_password(address).removesuffix("/").removesuffix("/api")
