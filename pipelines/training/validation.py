"""Validation in the middle of training: loss, PSNR and a grid of pictures of the validation split."""

import math
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from pipelines.config import RunConfig
from pipelines.data.batch_making import Batch
from pipelines.data.images import to_levels
from pipelines.data.loading import validation_batches
from pipelines.data.png_writing import write_png
from pipelines.data.shard_set import ShardSet
from pipelines.durable_files import write_bytes
from pipelines.evaluation.pictures import grid
from pipelines.model.losses import psnr
from pipelines.run_directory import RunDirectory, step_name
from pipelines.training.agreement import means
from pipelines.training.distributed import Ranks
from pipelines.training.heartbeat import Beat
from pipelines.training.step import TrainingStep

PICTURES = 6


@dataclass(frozen=True)
class Validation:
    """Means over the validated patches: `loss`, `psnr` in dB, and of a codec `bpp` with its parts."""

    means: dict[str, float]

    @property
    def psnr(self) -> float:
        return self.means["psnr"]

    def figures(self) -> dict[str, float]:
        """Those that are numbers: a diverged model has none."""
        return {f"validation/{name}": value for name, value in self.means.items() if math.isfinite(value)}


def draw_beginning(
    module: TrainingStep, shard_set: ShardSet, config: RunConfig, ranks: Ranks, directory: RunDirectory
) -> None:
    """The pictures of step 0: what the model makes of them before it learns.

    MLflow's pages open a run's pictures at step 0, and would show that there is none. All ranks take part, since each
    may have a share of the weights alone.
    """
    module.eval()
    with torch.inference_mode(), closing(validation_batches(shard_set, config, 0, ranks.world_size)) as batches:
        for batch in islice(batches, 1):
            _, pictures = module.compare(batch.images.to(ranks.device), None, noise=None)
            if ranks.is_first:
                _write_pictures(directory, 0, batch, pictures)
    module.train()


def _write_pictures(directory: RunDirectory, step: int, batch: Batch, pictures: Tensor) -> None:
    """The first patches beside what became of them, on the scale 0 to 1."""
    sheet = grid(batch.images[:PICTURES], to_levels(pictures[:PICTURES]).cpu())
    write_bytes(directory.pictures / f"{step_name(step)}_validation.png", write_png(sheet))


def validate(
    module: TrainingStep,
    shard_set: ShardSet,
    config: RunConfig,
    ranks: Ranks,
    directory: RunDirectory,
    step: int,
    beat: Beat,
) -> Validation | None:
    """Validate on all ranks together; rank 0 writes the pictures. None where there is no validation split.

    The model is called without compilation and in evaluation mode: a compiled step that has seen another shape would
    compute the next training step with other bits.
    """
    total = sum(shard_set.counts("validation"))
    if not total:
        return None
    places: list[int] = []
    columns: list[Tensor] = []
    module.eval()
    with torch.inference_mode():
        for batch in validation_batches(shard_set, config, ranks.rank, ranks.world_size):
            beat(step, "validating")
            masks = None if batch.masks is None else batch.masks.to(ranks.device)
            output, pictures = module.compare(batch.images.to(ranks.device), masks, noise=None)
            if not batch.positions:
                continue
            columns.append(torch.stack([output.loss, psnr(output.mse.double()), *output.rates.T]).double().cpu())
            if ranks.is_first and not places:
                _write_pictures(directory, step, batch, pictures)
            places += batch.positions
    module.train()
    parts = module.model.parts
    mine = torch.cat(columns, dim=1) if columns else torch.zeros(2 + len(parts), 0)
    losses, decibels, *rates = ranks.gather(places, mine, total)
    return Validation(means(losses, decibels, rates, parts))
