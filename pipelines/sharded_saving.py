"""A checkpoint that several ranks write together: a file of each, and what the first says of them all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.checkpoint_format import (
    MANIFEST,
    SHARDED_VERSION,
    SHARDING,
    STATE_SCALARS,
    FileRecord,
    Manifest,
)
from pipelines.checkpoints import record_of
from pipelines.durable_files import write_bytes, write_json
from pipelines.errors import CodecmillError
from pipelines.sealed_json import write_sealed
from pipelines.sharding_format import Layout, Part, Sharding, in_shard, shard_name
from pipelines.stored_tensors import of_shards, sha256_as_one_file
from pipelines.tensor_files import TensorFile

if TYPE_CHECKING:
    from torch import Tensor


class Share(NamedTuple):
    """What a rank holds of a tensor.

    Attributes:
        dtype, shape: of the whole tensor; the type by torch's name.
        rows: this rank's, along the first axis; of what all ranks hold alike only the first rank has any.
    """

    dtype: str
    shape: tuple[int, ...]
    rows: "Tensor | None"


Shares = Mapping[Part, Mapping[str, Share]]
"""By the kind of tensor and its name."""


def write_shard(folder: Path, number: int, count: int, shares: Shares) -> FileRecord:
    """Write the file of one rank of `count`.

    Raises:
        CodecmillError: the disk is full.
    """
    from safetensors.torch import save

    named = {
        in_shard(part, name): share.rows.detach().cpu().contiguous()
        for part, tensors in shares.items()
        for name, share in tensors.items()
        if share.rows is not None and share.rows.numel()
    }
    file = folder / shard_name(number, count)
    write_bytes(file, save(named))
    return record_of(file)


def complete(
    folder: Path,
    run: str,
    about: Mapping[str, Any],
    shares: Shares,
    records: Sequence[FileRecord],
    state_scalars: Mapping[str, Any],
) -> Manifest:
    """Write what makes a checkpoint of the files of all ranks, the manifest last.

    Args:
        about: the manifest's fields but for those that say what lies in the folder.
        shares: the first rank's; types and shapes are those of all ranks.
        records: of the ranks' files, in their order.

    Raises:
        CodecmillError: the files do not hold all rows of all tensors.
    """
    names = [shard_name(number, len(records)) for number in range(len(records))]
    files = {name: TensorFile(folder / name) for name in names}
    sharding = Sharding(
        files=tuple(names),
        model=_layouts("model", shares["model"], files),
        training_state=_layouts("training_state", shares["training_state"], files),
    )
    write_json(folder / SHARDING, sharding.model_dump(mode="json"))
    write_json(folder / STATE_SCALARS, dict(state_scalars))
    manifest = Manifest(
        format_version=SHARDED_VERSION,
        run=run,
        files=dict(zip(names, records, strict=True))
        | {name: record_of(folder / name) for name in (SHARDING, STATE_SCALARS)},
        weights_sha256=sha256_as_one_file(of_shards(sharding, "model", files.__getitem__)),
        **about,
    )
    write_sealed(folder / MANIFEST, manifest.as_json())
    return manifest


def _layouts(part: Part, shares: Mapping[str, Share], files: Mapping[str, TensorFile]) -> dict[str, Layout]:
    return {name: _layout(in_shard(part, name), share, files) for name, share in shares.items()}


def _layout(name: str, share: Share, files: Mapping[str, TensorFile]) -> Layout:
    """Where a tensor's rows are, by what is in the files."""
    offsets = [0]
    for opened in files.values():
        shape = opened.shape(name) if name in opened.names else (0, *share.shape[1:])
        if shape[1:] != share.shape[1:] or (name in opened.names and opened.dtype(name) != share.dtype):
            raise CodecmillError(f"{opened.path} holds '{name}' in another type or shape than the first rank does.")
        offsets.append(offsets[-1] + (shape[0] if shape else 1))
    if offsets[-1] != (share.shape[0] if share.shape else 1):
        raise CodecmillError(
            f"The ranks have saved {offsets[-1]} rows of '{name}', whose shape is {list(share.shape)}: this checkpoint "
            "is not kept. Resume from the one before."
        )
    return Layout.model_validate({"dtype": share.dtype, "shape": share.shape, "offsets": offsets})
