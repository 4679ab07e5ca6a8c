"""From a rank's share of the batch to the gradient of the whole batch, the same bits on every rank.

Two ways here. `AveragedGradients` is DistributedDataParallel: fast, and the order of its sums depends on the number of
ranks. `OrderedGradients` cuts the batch into virtual ranks, whose gradients are added one after the other whatever rank
computed them: the same bits on any number of ranks. A third, for models that one GPU does not hold, is in
`sharded_gradients`: each rank has the gradient of its share of the weights alone.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.config import TrainingConfig
from pipelines.training.distributed import Ranks
from pipelines.training.step import StepOutput, TrainingStep

Scale = Callable[[Tensor], Tensor]
"""What the loss is multiplied by before the backward pass, against fp16's underflow."""


class Gradients(Protocol):
    """Computes a step."""

    def compute(self, images: Tensor, masks: Tensor | None, noise: Tensor | None, scale: Scale) -> StepOutput:
        """Leave the (scaled) gradient of the global batch's mean loss in the parameters; returns this rank's samples'.

        Takes what `TrainingStep.forward` takes, of this rank's samples: every `world_size`-th of the batch.
        """
        ...


class AveragedGradients:
    """torch's DistributedDataParallel, its traffic overlapped with the backward pass."""

    def __init__(self, module: TrainingStep, ranks: Ranks, batch_size: int):
        self._replicas = nn.parallel.DistributedDataParallel(
            module, gradient_as_bucket_view=True, forward_sync_buffers=False
        )
        # DDP averages over the ranks, so a rank's sum times the world size over the batch gives the batch's mean.
        self._weight = ranks.world_size / batch_size

    def compute(self, images: Tensor, masks: Tensor | None, noise: Tensor | None, scale: Scale) -> StepOutput:
        output = self._replicas(images, masks, noise)
        scale(output.loss.sum() * self._weight).backward()
        return output


class OrderedGradients:
    """The gradients of K virtual ranks, each of every K-th sample of the batch, added in the order of their numbers.

    A rank of W computes the virtual ranks r, r + W, r + 2 W ... one after the other, each into a row of its own. Then
    every rank gets all K rows of one W-th of the parameters, adds them, and all ranks exchange the sums. Floating-point
    sums depend on their order alone, and that is the same for every W that divides K.
    """

    def __init__(self, module: TrainingStep, ranks: Ranks, batch_size: int, virtual_ranks: int):
        self._module = module
        self._ranks = ranks
        self._batch_size = batch_size
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._count = virtual_ranks // ranks.world_size
        total = sum(parameter.numel() for parameter in self._parameters)
        self._share = -(-total // ranks.world_size)
        like = self._parameters[0]
        self._rows = like.new_zeros(self._count, ranks.world_size, self._share)
        self._sum = like.new_zeros(ranks.world_size * self._share)
        self._views = [self._as_parameters(row.view(-1)) for row in self._rows]
        self._sum_views = self._as_parameters(self._sum)

    def compute(self, images: Tensor, masks: Tensor | None, noise: Tensor | None, scale: Scale) -> StepOutput:
        self._rows.zero_()
        outputs = []
        for number, views in enumerate(self._views):
            self._put(views)  # the backward pass adds to what is there
            mine = [None if x is None else x[number :: self._count].contiguous() for x in (images, masks, noise)]
            output: StepOutput = self._module(*mine)
            scale(output.loss.sum() / self._batch_size).backward()
            outputs.append(output)
        self._add_up()
        self._put(self._sum_views)
        return StepOutput(*(torch.stack(parts, dim=1).flatten(0, 1) for parts in zip(*outputs, strict=True)))

    def _add_up(self) -> None:
        """All rows, in their order, into the sum: each rank adds its share of the columns."""
        world_size = self._ranks.world_size
        sent = self._rows.transpose(0, 1).contiguous()  # (to rank, row, share)
        received = sent
        if world_size > 1:
            received = torch.empty_like(sent)  # (from rank, row, share)
            dist.all_to_all_single(received, sent)
        share = torch.zeros_like(received[0, 0])
        for row in range(self._count):
            for rank in range(world_size):
                share += received[rank, row]
        if world_size > 1:
            dist.all_gather_single(self._sum, share)
        else:
            self._sum.copy_(share)

    def _as_parameters(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat tensor, one a parameter, of its shape and memory layout: the optimiser walks both alike."""
        views, start = [], 0
        for parameter in self._parameters:
            part = flat[start : start + parameter.numel()]
            views.append(part.as_strided(parameter.shape, parameter.stride()))
            start += parameter.numel()
        return views

    def _put(self, gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient


def build(module: TrainingStep, ranks: Ranks, training: TrainingConfig) -> Gradients:
    """Plain data parallelism, unless virtual ranks or sharded weights are asked for."""
    if training.parallel == "fsdp":
        from pipelines.training.sharded_gradients import ShardedGradients  # half a second that others need not wait

        return ShardedGradients(module, ranks, training.batch_size)
    if training.virtual_ranks is None:
        return AveragedGradients(module, ranks, training.batch_size)
    return OrderedGradients(module, ranks, training.batch_size, training.virtual_ranks)
