"""What a training holds from one step to the next where each rank has a share: see `state`.

A share is there once, so that there is nothing to compare it with: what proves it right is that its rank computed it
from the sum of all gradients, and a checkpoint that its rows and those of all others make the whole. What every rank
holds alike (codebooks, buffers, counts of steps) is compared as ever.
"""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipelines import checkpoints, sharded_saving
from pipelines.checkpoint_format import FileRecord
from pipelines.checkpoint_tensors import stored_weights
from pipelines.durable_files import built_folder, folder_being_built
from pipelines.run_directory import RunDirectory
from pipelines.sharded_saving import Share, Shares
from pipelines.stored_tensors import StoredTensor
from pipelines.training import optimization
from pipelines.training.distributed import Ranks
from pipelines.training.step import TrainingStep
from pipelines.weights import apply_weights

DIGITS = 12
"""Of a sha256 in one number of float64, which holds 53 bits exactly."""


class SharedState:
    """Every rank holds its rows of each tensor; all of it is nowhere."""

    def __init__(
        self, module: TrainingStep, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, ranks: Ranks
    ):
        self._module = module
        self._optimizer = optimizer
        self._scaler = scaler
        self._ranks = ranks

    @torch.no_grad()
    def clip(self, limit: float) -> float:
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        shares = [each.to_local() for each in gradients if isinstance(each, DTensor)]
        whole = [each for each in gradients if not isinstance(each, DTensor)]
        ranks = self._ranks
        # Every rank adds the same numbers in the same order, and so has the same norm.
        own = torch.tensor([[_square(shares)]], dtype=torch.float64)
        (squares,) = ranks.gather([ranks.rank], own, ranks.world_size)
        norm = math.sqrt(sum(squares) + _square(whole))
        factor = limit / (norm + 1e-6) if limit else 1.0  # as torch's clip_grad_norm_
        if factor < 1:
            for gradient in (*shares, *whole):
                gradient.mul_(factor)
        return norm

    def replicas(self) -> Mapping[str, Tensor]:
        moments, _ = optimization.state(self._module.model, self._optimizer, self._scaler)
        held = self._module.state_dict() | moments
        return {name: tensor for name, tensor in held.items() if not isinstance(tensor, DTensor)}

    def save(
        self,
        directory: RunDirectory,
        about: Mapping[str, Any],
        scalars: Mapping[str, Any],
        check_writer: Callable[[], None],
    ) -> checkpoints.Checkpoint | None:
        """Each rank writes its shares, then the first what makes a checkpoint of them, or nothing is kept."""
        ranks = self._ranks
        moments, own = optimization.state(self._module.model, self._optimizer, self._scaler)
        shares: Shares = {
            "model": self._shares(self._module.model.state_dict()),
            "training_state": self._shares(moments),
        }
        final = checkpoints.folder_of(directory, about["step"])
        check_writer()
        with built_folder(final) if ranks.is_first else nullcontext():
            folder = folder_being_built(final, self._of_the_first(os.getpid()))  # there is one when all know its name
            record = sharded_saving.write_shard(folder, ranks.rank, ranks.world_size, shares)
            records = self._of_all(record)
            if not ranks.is_first:
                return None
            check_writer()  # the others may have taken long
            manifest = sharded_saving.complete(folder, directory.path.name, about, shares, records, own | dict(scalars))
        return checkpoints.Checkpoint(final, manifest)

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        model = self._module.model
        apply_weights(model, stored_weights(checkpoint), True, str(checkpoint.path), copy=self._take_share)
        optimization.restore(checkpoint, model, self._optimizer, self._scaler, copy=self._take_share)

    def _shares(self, tensors: Mapping[str, Tensor]) -> dict[str, Share]:
        return {name: self._share(tensor) for name, tensor in tensors.items()}

    def _share(self, tensor: Tensor) -> Share:
        kind = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if isinstance(tensor, DTensor):
            return Share(*kind, tensor.to_local())
        return Share(*kind, tensor if self._ranks.is_first else None)

    def _take_share(self, into: Tensor, source: Tensor | StoredTensor) -> None:
        if not isinstance(into, DTensor):
            into.copy_(source[...])
            return
        rows = into.to_local()
        start = min(self._ranks.rank * -(-len(into) // self._ranks.world_size), len(into))  # as torch.chunk cuts
        rows.copy_(source[start : start + len(rows)])

    def _of_the_first(self, number: int) -> int:
        """What the first rank says, which all know once it has said it."""
        is_first = self._ranks.is_first
        columns = torch.tensor([[float(number)]], dtype=torch.float64)[:, : int(is_first)]
        ((told,),) = self._ranks.gather([0] if is_first else [], columns, 1)
        return int(told)

    def _of_all(self, record: FileRecord) -> list[FileRecord]:
        numbers = [record.bytes, *(int(record.sha256[at : at + DIGITS], 16) for at in range(0, 64, DIGITS))]
        columns = torch.tensor(numbers, dtype=torch.float64)[:, None]
        sizes, *parts = self._ranks.gather([self._ranks.rank], columns, self._ranks.world_size)
        widths = [min(DIGITS, 64 - at) for at in range(0, 64, DIGITS)]
        digests = [
            "".join(f"{int(number):0{width}x}" for number, width in zip(each, widths, strict=True))
            for each in zip(*parts, strict=True)
        ]
        return [FileRecord(bytes=int(size), sha256=digest) for size, digest in zip(sizes, digests, strict=True)]


def _square(tensors: list[Tensor]) -> float:
    """The sum of all elements' squares."""
    return nn.utils.get_total_norm([tensor for tensor in tensors if tensor.numel()]).item() ** 2
