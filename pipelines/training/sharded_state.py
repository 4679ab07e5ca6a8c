"""What a training holds from one step to the next where each rank has a share: see `state`.

A share is there once, so that there is nothing to compare it with: what proves it right is that its rank computed it
from the sum of all gradients, and a checkpoint that its rows and those of all others make the whole. What every rank
holds alike (codebooks, buffers, counts of steps) is compared as ever.
"""

import math
import os
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipelines import checkpoints, sharded_saving
from pipelines.checkpoint_format import FileRecord
from pipelines.checkpoint_tensors import stored_weights
from pipelines.durable_files import built_folder, folder_being_built
from pipelines.sharded_saving import Share, Shares
from pipelines.stored_tensors import StoredTensor
from pipelines.training import optimization
from pipelines.training.distributed import as_digest, as_numbers
from pipelines.training.state import Saving, State
from pipelines.weights import apply_weights


class SharedState(State):
    """Every rank holds its rows of each tensor; all of it is nowhere."""

    @torch.no_grad()
    def clip(self, limit: float) -> float:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        shares = [each.to_local() for each in gradients if isinstance(each, DTensor)]
        whole = [each for each in gradients if not isinstance(each, DTensor)]
        # Every rank adds the same numbers in the same order, and so has the same norm.
        (squares,) = self.ranks.told_by_each([_square(shares)])
        norm = math.sqrt(sum(squares) + _square(whole))
        factor = limit / (norm + 1e-6) if limit else 1.0  # as torch's clip_grad_norm_
        if factor < 1:
            for gradient in (*shares, *whole):
                gradient.mul_(factor)
        return norm

    def replicas(self) -> Mapping[str, Tensor]:
        moments, _ = self.of_optimizer()
        held = self.module.state_dict() | moments
        return {name: tensor for name, tensor in held.items() if not isinstance(tensor, DTensor)}

    def save(self, saving: Saving) -> checkpoints.Checkpoint | None:
        """Each rank writes its shares, then the first what makes a checkpoint of them, or nothing is kept."""
        ranks, about = self.ranks, saving.about
        moments, own = self.of_optimizer()
        shares: Shares = {
            "model": self._shares(self.module.model.state_dict()),
            "training_state": self._shares(moments),
        }
        final = checkpoints.folder_of(saving.directory, about["step"])
        saving.check_writer()
        with built_folder(final) if ranks.is_first else nullcontext():
            (builder,) = ranks.told_by_first([os.getpid()])
            folder = folder_being_built(final, int(builder))  # there is one when all know its name
            record = sharded_saving.write_shard(folder, ranks.rank, ranks.world_size, shares)
            records = self._of_all(record)
            if not ranks.is_first:
                return None
            saving.check_writer()  # the others may have taken long
            run, scalars = saving.directory.path.name, own | saving.scalars
            manifest = sharded_saving.complete(folder, run, about, shares, records, scalars)
        return checkpoints.Checkpoint(final, manifest)

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        model = self.module.model
        apply_weights(model, stored_weights(checkpoint), True, str(checkpoint.path), copy=self._take_share)
        optimization.restore(checkpoint, model, self.optimizer, self.scaler, copy=self._take_share)

    def _shares(self, tensors: Mapping[str, Tensor]) -> dict[str, Share]:
        return {name: self._share(tensor) for name, tensor in tensors.items()}

    def _share(self, tensor: Tensor) -> Share:
        kind = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if isinstance(tensor, DTensor):
            return Share(*kind, tensor.to_local())
        return Share(*kind, tensor if self.ranks.is_first else None)

    def _take_share(self, into: Tensor, source: Tensor | StoredTensor) -> None:
        if not isinstance(into, DTensor):
            into.copy_(source[...])
            return
        rows = into.to_local()
        start = min(self.ranks.rank * -(-len(into) // self.ranks.world_size), len(into))  # as torch.chunk cuts
        rows.copy_(source[start : start + len(rows)])

    def _of_all(self, record: FileRecord) -> list[FileRecord]:
        told = zip(*self.ranks.told_by_each([record.bytes, *as_numbers(record.sha256)]), strict=True)
        return [FileRecord(bytes=int(size), sha256=as_digest(numbers)) for size, *numbers in told]


def _square(tensors: list[Tensor]) -> float:
    """The sum of all elements' squares."""
    return nn.utils.get_total_norm([tensor for tensor in tensors if tensor.numel()]).item() ** 2
