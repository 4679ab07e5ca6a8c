"""The tensors of a checkpoint, be they in one file or sharded: read whole, or the rows that somebody asks for."""

from functools import cache

from torch import Tensor

from pipelines.checkpoint_format import STATE_TENSORS, WEIGHTS
from pipelines.checkpoints import Checkpoint, check_file
from pipelines.errors import CodecmillError
from pipelines.sharding_format import Part, read_sharding
from pipelines.stored_tensors import StoredTensor, of_file, of_shards, sha256_as_one_file
from pipelines.tensor_files import TensorFile, read_tensors


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The model's tensors, on the CPU.

    Raises:
        CodecmillError: a file is damaged, or the shards do not make the weights that the checkpoint is known by.
    """
    if not checkpoint.manifest.is_sharded:
        return read_tensors(checkpoint.path / WEIGHTS)
    weights = stored_weights(checkpoint)
    found = sha256_as_one_file(weights)
    if found != checkpoint.sha256:
        raise CodecmillError(
            f"The shards in {checkpoint.path} do not make the weights that its checkpoint.json names: their sha256 is "
            f"{found[:16]}... instead of {checkpoint.sha256[:16]}..."
        )
    return {name: weight[...] for name, weight in weights.items()}


def stored_weights(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The model's tensors, whose rows are read when they are asked for.

    Raises:
        CodecmillError: a file is damaged.
    """
    if not checkpoint.manifest.is_sharded:
        return of_file(checkpoint.path / WEIGHTS)
    return _of_shards(checkpoint, "model")


def stored_state(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The same of the optimiser's tensors."""
    if not checkpoint.manifest.is_sharded:
        return of_file(checkpoint.path / STATE_TENSORS)
    return _of_shards(checkpoint, "training_state")


def _of_shards(checkpoint: Checkpoint, part: Part) -> dict[str, StoredTensor]:
    @cache
    def opened(name: str) -> TensorFile:
        if name in checkpoint.unread or name not in checkpoint.manifest.files:
            check_file(checkpoint.path / name, checkpoint.manifest.files.get(name))
        return TensorFile(checkpoint.path / name)

    return of_shards(read_sharding(checkpoint.path), part, opened)
