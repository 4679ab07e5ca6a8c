"""Opening what has grown large: a shard set of 10,000 shards, and the newest of 1,000 checkpoints."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

from infra.bench.process_tree import Stretch
from infra.bench.programs import small_run
from infra.bench.programs.serving import Measure, Parameters, figures, serve
from pipelines import checkpoint_format, checkpoints
from pipelines.config import RunConfig
from pipelines.data.images import HALF
from pipelines.data.shard_format import MANIFEST
from pipelines.data.shard_set import ShardSet
from pipelines.data.shards import create_shards
from pipelines.durable_files import write_json
from pipelines.model.build import build_model
from pipelines.run_directory import Root, RunDirectory


def prepare(parameters: Parameters) -> Measure:
    """Parameters: `folder`; `images`; how many `shards` and `checkpoints`.

    The shards are links to one, under names of their own; so are the checkpoints, but for the newest.
    """
    folder = Path(parameters["folder"])
    shutil.rmtree(folder, ignore_errors=True)
    config = RunConfig.model_validate(small_run.values(folder, parameters["images"], 0))
    large = _multiplied(create_shards(config), parameters["shards"])
    run = _with_checkpoints(Root(folder).run(config.name), config, parameters["checkpoints"])

    def measure(number: int) -> dict[str, Any]:
        with Stretch() as stretch:
            ShardSet.open(large)
        begun = time.perf_counter()
        newest = checkpoints.latest(run)
        seconds = time.perf_counter() - begun
        if newest is None or newest.step != parameters["checkpoints"]:
            raise RuntimeError(f"the newest checkpoint was not found, but {newest}")
        return figures(stretch, parameters["shards"], latest_seconds=seconds)

    return measure


def _multiplied(shard_set: ShardSet, count: int) -> Path:
    large = shard_set.path.with_name("large")
    large.mkdir()
    row = shard_set.rows("train")[0]
    rows = []
    for number in range(count):
        copy = row.model_copy(update={"name": f"train-{number:06x}"})
        for (old, _, _), (new, _, _) in zip(row.files(), copy.files(), strict=True):
            os.link(shard_set.path / old, large / new)
        rows.append(copy)
    write_json(large / MANIFEST, shard_set.manifest.model_copy(update={"shards": rows}).model_dump(mode="json"))
    return large


def _with_checkpoints(run: RunDirectory, config: RunConfig, count: int) -> RunDirectory:
    model = build_model(config.model)
    about = {
        "position": 0,
        "model": config.model,
        "normalization": HALF,
        "shard_set": "0" * 64,
        "parent": None,
        "versions": {},
        "validation": {},
        "best": checkpoint_format.Best(step=1, psnr=30.0),
    }
    first, newest = (
        checkpoints.save(run, about | {"step": step}, model.state_dict(), {}, {}).path for step in (1, count)
    )
    for step in range(2, count):
        (newest.parent / f"step_{step:08d}").symlink_to(first)
    return run


if __name__ == "__main__":
    serve(prepare)
