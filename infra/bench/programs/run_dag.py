"""`codecmill run` from the outside, a whole small run, and again when all is done, with or without a server running."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from flows.cli.prefect_server import no_proxy, start_server
from flows.cli.services import free_port
from infra.bench.process_tree import Stretch
from infra.bench.programs import small_run
from infra.bench.programs.serving import Measure, Parameters, figures, serve
from infra.environment import without_servers
from pipelines.run_directory import Root


def prepare(parameters: Parameters) -> Measure:
    """Parameters: `folder`, of a root that is made and warmed by a first run; `images`; `served`, by a running server.

    Warm means that Prefect's and MLflow's databases are there.
    """
    root = Path(parameters["folder"])
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    address = _serve_prefect(Root(root)) if parameters["served"] else {}
    _run(root, parameters, 0, address)

    def measure(number: int) -> dict[str, Any]:
        with Stretch() as stretch:
            _run(root, parameters, number + 1, address)
        with Stretch() as again:
            _run(root, parameters, number + 1, address)
        return figures(stretch, 1, done_seconds=again.seconds)

    return measure


def _serve_prefect(root: Root) -> dict[str, str]:
    """Start a server that ends with this program; returns what tells of it."""
    server = start_server(root, free_port(), {})
    server.wait_ready()
    return {"PREFECT_API_URL": f"{server.address}/api", **no_proxy()}


def _run(root: Path, parameters: Parameters, number: int, address: dict[str, str]) -> None:
    chosen = root / f"small-{number:02d}.json"
    chosen.write_text(json.dumps(small_run.values(root, parameters["images"], number)))  # JSON is YAML
    command = [sys.executable, "-m", "flows", "run", "--config", str(chosen)]
    done = subprocess.run(
        command,
        env=without_servers() | address,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"codecmill run ended with {done.returncode}:\n{done.stdout[-3000:]}")


if __name__ == "__main__":
    serve(prepare)
