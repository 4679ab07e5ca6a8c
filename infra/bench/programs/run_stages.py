"""The work of the stages of a small run alone, called one after another, without Prefect and the command line."""

import shutil
import time
from pathlib import Path
from typing import Any

from infra.bench.process_tree import Stretch
from infra.bench.programs import small_run
from infra.bench.programs.serving import Measure, Parameters, figures, serve
from pipelines import checkpoints, registration
from pipelines.data.shards import create_shards
from pipelines.durable_files import write_json
from pipelines.evaluation.stage import evaluate_run
from pipelines.run_directory import Root
from pipelines.runs import start_or_continue
from pipelines.training import launch
from pipelines.training.shipping import Shipping


def prepare(parameters: Parameters) -> Measure:
    """Parameters: `folder`, of a root that is made and warmed by a first run; `images`."""
    root = Path(parameters["folder"])
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    _stages(root, parameters["images"], 0)

    def measure(number: int) -> dict[str, Any]:
        with Stretch() as stretch:
            seconds = _stages(root, parameters["images"], number + 1)
        return figures(stretch, 1, stages=seconds)

    return measure


def _stages(root: Path, images: str, number: int) -> dict[str, float]:
    """Seconds of each stage."""
    clock = _Clock()
    config = small_run.config(root, images, number)
    run = Root(root).run(config.name)
    with run.locked() as lock:
        start_or_continue(config)
        shard_set = create_shards(config)
        write_json(run.shard_set_file, {"fingerprint": shard_set.fingerprint, "path": str(shard_set.path)})
        clock.stage("shards")
        with Shipping(run, warn=print):
            last = launch.train(run, lock, on_line=print)
        best = checkpoints.best(run) or last
        clock.stage("training")
        evaluation = evaluate_run(run, best, shard_set, config.evaluation)
        clock.stage("evaluation")
        registration.register(run, best, shard_set, evaluation.means, evaluation.folder, config.evaluation)
        clock.stage("registration")
    return clock.seconds


class _Clock:
    """Seconds between one stage's end and the next one's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stage(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


if __name__ == "__main__":
    serve(prepare)
