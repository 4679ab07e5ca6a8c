"""`codecmill run` from the outside, a whole small run, and again when all is done."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from infra.bench.process_tree import Stretch
from infra.bench.programs import small_run
from infra.bench.programs.serving import Measure, Parameters, figures, serve


def prepare(parameters: Parameters) -> Measure:
    """Parameters: `folder`, of a root that is made and warmed by a first run; `images`.

    Warm means that Prefect's and MLflow's databases are there.
    """
    root = Path(parameters["folder"])
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    _run(root, parameters, 0)

    def measure(number: int) -> dict[str, Any]:
        with Stretch() as stretch:
            _run(root, parameters, number + 1)
        with Stretch() as again:
            _run(root, parameters, number + 1)
        return figures(stretch, 1, done_seconds=again.seconds)

    return measure


def _run(root: Path, parameters: Parameters, number: int) -> None:
    chosen = root / f"small-{number:02d}.json"
    chosen.write_text(json.dumps(small_run.values(root, parameters["images"], number)))  # JSON is YAML
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    command = [sys.executable, "-m", "flows", "run", "--config", str(chosen)]
    done = subprocess.run(
        command, env=kept, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(f"codecmill run ended with {done.returncode}:\n{done.stdout[-3000:]}")


if __name__ == "__main__":
    serve(prepare)
