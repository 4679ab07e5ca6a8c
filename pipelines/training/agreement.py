"""What the ranks tell each other after each step's forward pass: every sample's figures and key, and a wish to stop."""

import math
from dataclasses import dataclass

import torch

from pipelines.data import consumed
from pipelines.data.loading import Batch
from pipelines.model.losses import psnr
from pipelines.training.distributed import Ranks
from pipelines.training.step import StepOutput


@dataclass(frozen=True)
class Agreement:
    """A step as all ranks know it; lists are in the order of the batch's positions.

    Attributes:
        losses: one a sample.
        decibels: the PSNR of each sample's reconstruction.
        samples: `consumed.digest` of the keys that the ranks read.
        stop: whether any rank wants to stop after this step.
    """

    losses: list[float]
    decibels: list[float]
    samples: str
    stop: bool

    def figures(self) -> dict[str, float]:
        """The means over the batch, summed exactly: the same bits whatever the number of ranks."""
        count = len(self.losses)
        return {"train/loss": math.fsum(self.losses) / count, "train/psnr": math.fsum(self.decibels) / count}

    @property
    def nonfinite(self) -> list[int]:
        """Which samples' losses are NaN or infinite, as places in the batch."""
        return [place for place, loss in enumerate(self.losses) if not math.isfinite(loss)]


def agree(ranks: Ranks, batch: Batch, output: StepOutput, batch_size: int, stop: bool) -> Agreement:
    """Gather a step's figures with one collective; each rank gives those of its samples."""
    first = (batch.step - 1) * batch_size
    numbers = [consumed.key_number(*each) for each in zip(batch.positions, batch.keys, strict=True)]
    columns = torch.stack(
        [
            output.loss.detach().double().cpu(),
            psnr(output.mse.double()).cpu(),
            torch.tensor(numbers, dtype=torch.float64),
            torch.full((len(numbers),), float(stop), dtype=torch.float64),
        ]
    )
    places = [position - first for position in batch.positions]
    losses, decibels, keys, stops = ranks.gather(places, columns, batch_size)
    return Agreement(losses, decibels, consumed.digest([int(number) for number in keys]), stop=any(stops))
