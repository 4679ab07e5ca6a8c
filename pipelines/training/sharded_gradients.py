"""Fully sharded data parallelism: each rank holds a share of the weights, and of their gradients and moments.

torch's `fully_shard` (FSDP2; Zhao 2023, arXiv:2304.11277, and Rajbhandari 2020, arXiv:1910.02054, for the idea): the
weights of one part of the model after the other are brought together for its forward and for its backward pass, and
let go of; what the batch says of them is added up where their share lies. Tried with gloo on several ranks, with NCCL
on one.
"""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from pipelines.training.codebooks import codebook_parameters
from pipelines.training.distributed import Ranks
from pipelines.training.gradients import Scale
from pipelines.training.step import StepOutput, TrainingStep


class ShardedGradients:
    """Shards the model of a training step in place, along the first axis of each weight.

    Codebooks stay whole on every rank: each step rewrites them by what all of the batch says of them.
    """

    def __init__(self, module: TrainingStep, ranks: Ranks, batch_size: int):
        self._module = module
        self._batch_size = batch_size
        model = module.model
        whole = [*codebook_parameters(model), *(each for each in model.parameters() if each.dim() == 0)]
        for parameter in whole:
            parameter.data = parameter.data.to(ranks.device)
        self._whole = [parameter for parameter in whole if parameter.requires_grad]
        # It warns of views that come out of a part, which nobody is to change in place: here nobody does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        # From the inside out: what an inner part has is not the outer one's. Only one part is whole on a GPU at a time.
        for part in reversed([*model.modules()]):
            if part is model or isinstance(part, model.units):
                _shard(part, mesh, set(whole))

    def compute(self, images: Tensor, masks: Tensor | None, noise: Tensor | None, scale: Scale) -> StepOutput:
        output = self._module(images, masks, noise)
        scale(output.loss.sum() / self._batch_size).backward()
        self._add_up_whole()
        return output

    def _add_up_whole(self) -> None:
        """As `fully_shard` does it for what it manages: sum the gradients over the ranks."""
        if not self._whole:
            return
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in self._whole]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for parameter, part in zip(self._whole, parts, strict=True):
            parameter.grad = part.view(parameter.shape)


def _shard(part: nn.Module, mesh: DeviceMesh, whole: set[nn.Parameter]) -> None:
    # Also the outermost is let go of after its forward pass: else a validation would leave its weights whole.
    fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    assert isinstance(part, FSDPModule)  # noqa: S101
    # A plain sum: the loss is divided by the batch, not by the ranks. gloo knows no other way to add.
    part.set_gradient_divide_factor(1.0)
    part.set_force_sum_reduction_for_comms(True)
