"""What the ranks tell each other after each step's forward pass: every sample's figures and key, and a wish to stop."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum

import torch

from pipelines import checkpoints
from pipelines.data import consumed
from pipelines.data.batch_making import Batch
from pipelines.errors import CodecmillError, RankFailure
from pipelines.model.losses import psnr
from pipelines.run_directory import RunDirectory
from pipelines.training.distributed import Ranks, as_numbers
from pipelines.training.step import StepOutput

VISIBLE_SECONDS = 90.0
"""How long a network file system may show an older state of a folder; NFS does for up to 60 s."""


class Stop(IntEnum):
    """What a rank wants; of several wishes the greatest counts."""

    NO = 0
    THESE_RANKS = 1
    """They are to end; others may go on without them."""
    THE_RUN = 2


@dataclass(frozen=True)
class Agreement:
    """A step as all ranks know it; lists are in the order of the batch's positions.

    Attributes:
        losses: one a sample.
        decibels: the PSNR of each sample's reconstruction.
        rates: bits per pixel of each sample, one list for each of a codec's parts.
        samples: `consumed.digest` of the keys that the ranks read.
        stop: whether any rank wants to stop after this step.
    """

    losses: list[float]
    decibels: list[float]
    rates: list[list[float]]
    samples: str
    stop: Stop

    def figures(self, parts: tuple[str, ...]) -> dict[str, float]:
        """The means over the batch, summed exactly: the same bits whatever the number of ranks.

        Args:
            parts: the names of a codec's parts.
        """
        return {f"train/{name}": mean for name, mean in means(self.losses, self.decibels, self.rates, parts).items()}

    @property
    def nonfinite(self) -> list[int]:
        """Which samples' losses are NaN or infinite, as places in the batch."""
        return [place for place, loss in enumerate(self.losses) if not math.isfinite(loss)]


def means(
    losses: list[float], decibels: list[float], rates: list[list[float]], parts: tuple[str, ...]
) -> dict[str, float]:
    """Of samples' figures, each summed exactly: loss, psnr, and of a codec bpp with its parts, such as bpp_hyper."""
    found = {"loss": math.fsum(losses), "psnr": math.fsum(decibels)}
    if parts:
        found["bpp"] = math.fsum(rate for part in rates for rate in part)
        found |= {f"bpp_{name}": math.fsum(part) for name, part in zip(parts, rates, strict=True)}
    return {name: total / len(losses) for name, total in found.items()}


def agree(ranks: Ranks, batch: Batch, output: StepOutput, batch_size: int, stop: Stop) -> Agreement:
    """Gather a step's figures with one collective; each rank gives those of its samples."""
    first = (batch.step - 1) * batch_size
    numbers = [consumed.key_number(*each) for each in zip(batch.positions, batch.keys, strict=True)]
    columns = torch.stack(
        [
            output.loss.detach().double().cpu(),
            psnr(output.mse.double()).cpu(),
            torch.tensor(numbers, dtype=torch.float64),
            torch.full((len(numbers),), float(stop), dtype=torch.float64),
            *output.rates.double().cpu().T,
        ]
    )
    places = [position - first for position in batch.positions]
    losses, decibels, keys, stops, *rates = ranks.gather(places, columns, batch_size)
    samples = consumed.digest([int(number) for number in keys])
    return Agreement(losses, decibels, rates, samples, stop=Stop(int(max(stops))))


def agreed_checkpoint(
    directory: RunDirectory,
    ranks: Ranks,
    find: Callable[[RunDirectory], checkpoints.Checkpoint | None] = checkpoints.latest,
) -> checkpoints.Checkpoint | None:
    """The checkpoint that the first rank finds, once all ranks have it.

    Raises:
        RankFailure: some do not, as a rank may that could not read a file at this moment.
    """
    found = find(directory) if ranks.is_first else None
    known = [float(found.step), *_halves(found)] if found else [-1.0, 0.0, 0.0]
    step, *halves = ranks.told_by_first(known)
    if step < 0:
        return None
    if not ranks.is_first:
        found = _seen(directory, int(step), halves)
    (have,) = ranks.told_by_each([float(found is not None)])
    if not all(have):
        lacking = ", ".join(str(rank) for rank, has in enumerate(have) if not has)
        raise RankFailure(
            f"The checkpoint of step {int(step)} in {directory.checkpoints} is sound to rank 0, but not to rank "
            f"{lacking}: is it the same file system?"
        )
    return found


def _halves(checkpoint: checkpoints.Checkpoint) -> list[float]:
    """96 bits of what it is known by."""
    return as_numbers(checkpoint.sha256)[:2]


def _seen(directory: RunDirectory, step: int, halves: list[float]) -> checkpoints.Checkpoint | None:
    """The same checkpoint as the first rank's; of another host, a network file system may show it a while later."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        with suppress(CodecmillError):
            found = checkpoints.of_step(directory, step, but_shards=True)
            if _halves(found) == halves:
                return found
        if time.monotonic() > deadline:
            return None
        time.sleep(1)
