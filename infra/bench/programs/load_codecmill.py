"""Loading by codecmill: checksums, and the order and the draws that a resumed run has again."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from infra.bench.programs.reading import BATCH, CROP, WARM_UP, timed
from infra.bench.programs.serving import Measure, Parameters, serve
from pipelines.config import RunConfig
from pipelines.data.batch_making import Batch
from pipelines.data.images import HALF, to_unit
from pipelines.data.loading import training_batches
from pipelines.data.shard_set import ShardSet


def prepare(parameters: Parameters) -> Measure:
    """Parameters: `shard_set`; `workers`, threads; `patches` a round; `as_levels`: uint8, as the trainer has them."""
    data = {"workers": parameters["workers"], "flip_horizontal": True, "flip_vertical": True}
    training = {"batch_size": BATCH, "crop_size": CROP}
    config = RunConfig.model_validate({"name": "bench", "data": data, "training": training})
    steps = WARM_UP + parameters["patches"] // BATCH
    # As each process of the peers has one: torch's second would wait for the next normalisation in a busy loop.
    torch.set_num_threads(1)

    def measure(number: int) -> dict[str, float]:
        started = time.perf_counter()
        shard_set = ShardSet.open(Path(parameters["shard_set"]))
        with training_batches(shard_set, config, 1 + number * steps, 0, 1) as batches:
            images = _levels(batches) if parameters.get("as_levels") else _normalized(batches)
            return timed(started, images, parameters["patches"])

    return measure


def _levels(batches: Iterator[Batch]) -> Iterator[torch.Tensor]:
    for batch in batches:
        yield batch.images


def _normalized(batches: Iterator[Batch]) -> Iterator[torch.Tensor]:
    for batch in batches:
        yield HALF.normalize_(to_unit(batch.images, torch.float32))


if __name__ == "__main__":
    serve(prepare)
