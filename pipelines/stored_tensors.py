"""A checkpoint's tensors as they lie in files, whole or in the shares of several ranks: rows are read when asked for.

What is sharded (see `sharding_format`) and what is not looks the same from here, so that either is loaded into a model
on one rank, or into the shares of any number of ranks, each of which reads the rows that it is to hold.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipelines.errors import CodecmillError
from pipelines.sharding_format import Part, Piece, Sharding, in_shard
from pipelines.tensor_files import PLAIN_TYPES, TensorFile

if TYPE_CHECKING:
    from types import EllipsisType

    from torch import Tensor

Open = Callable[[str], TensorFile]
"""The file of a name, once it was verified."""


class StoredTensor:
    """A tensor whose rows, along its first axis, lie in one file or in several.

    Attributes:
        shape, dtype: of all of it, as torch says them.
    """

    def __init__(self, dtype: str, shape: tuple[int, ...], name: str, pieces: Sequence[Piece], opened: Open):
        self.dtype = dtype
        self.shape = shape
        self._name = name
        self._pieces = pieces
        self._opened = opened

    def __getitem__(self, rows: "slice | EllipsisType") -> "Tensor":
        """Some rows, or all: read from the files that have them, and from no others.

        Raises:
            CodecmillError: such a file is damaged, or does not hold what it is said to.
        """
        import torch

        count = self.shape[0] if self.shape else 1
        start, stop, _ = (slice(None) if rows is ... else rows).indices(count)
        parts = [
            self._read(piece, max(start - piece.offset, 0), min(stop - piece.offset, piece.rows))
            for piece in self._pieces
            if piece.offset < stop and piece.offset + piece.rows > start
        ]
        if not parts:
            return torch.empty(0, *self.shape[1:], dtype=getattr(torch, self.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def in_pieces(self) -> Iterator["Tensor"]:
        """All rows, in their order, as many at a time as lie in one file."""
        for piece in self._pieces:
            yield self._read(piece, 0, piece.rows)

    def _read(self, piece: Piece, start: int, stop: int) -> "Tensor":
        file = self._opened(piece.file)
        expected = (piece.rows, *self.shape[1:]) if self.shape else ()
        if self._name not in file.names:
            raise CodecmillError(f"{file.path} does not hold '{self._name}'.")
        dtype, shape = file.dtype(self._name), file.shape(self._name)
        if (dtype, shape) != (self.dtype, expected):
            found, said = f"{dtype} {list(shape)}", f"{self.dtype} {list(expected)}"
            raise CodecmillError(f"{file.path} holds '{self._name}' as {found}, and is said to hold it as {said}.")
        return file.rows(self._name, slice(start, stop) if self.shape else ...)


def of_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors in one safetensors file.

    Raises:
        CodecmillError: it is none, is damaged, or holds other than plain numbers.
    """
    opened = TensorFile(file)

    def stored(name: str) -> StoredTensor:
        shape = opened.shape(name)
        pieces = [Piece(file.name, 0, shape[0] if shape else 1)]
        return StoredTensor(opened.dtype(name), shape, name, pieces, lambda _: opened)

    return {name: stored(name) for name in opened.names}


def of_shards(sharding: Sharding, part: Part, opened: Open) -> dict[str, StoredTensor]:
    """The tensors of one kind in the files of ranks."""
    layouts = sharding.model if part == "model" else sharding.training_state
    return {
        name: StoredTensor(layout.dtype, layout.shape, in_shard(part, name), layout.pieces(sharding.files), opened)
        for name, layout in layouts.items()
    }


class _Kind(NamedTuple):
    """What a safetensors file's header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def sha256_as_one_file(tensors: Mapping[str, StoredTensor]) -> str:
    """The sha256 of the safetensors file that all tensors together would be.

    So a checkpoint is known by the same name whether its weights are sharded or not, and by how many ranks.
    """
    digest = hashlib.sha256()
    for part in as_one_file(tensors):
        digest.update(part)
    return digest.hexdigest()


def as_one_file(tensors: Mapping[str, StoredTensor]) -> Iterator[bytes | memoryview]:
    """The bytes of the safetensors file that all tensors together are, one piece at a time in memory."""
    orders = {torch_name: (order, name) for order, (name, torch_name) in enumerate(PLAIN_TYPES.items())}
    names = sorted(tensors, key=lambda name: (orders[tensors[name].dtype][0], name))
    yield _header({name: _Kind(orders[tensors[name].dtype][1], tensors[name].shape) for name in names})
    for name in names:
        for piece in tensors[name].in_pieces():
            yield _bytes(piece)


def _header(kinds: Mapping[str, _Kind]) -> bytes:
    """As safetensors writes it, of tensors in the order of their bytes."""
    import torch

    header, end = {}, 0
    for name, kind in kinds.items():
        start = end
        size = math.prod(kind.shape) * getattr(torch, PLAIN_TYPES[kind.dtype]).itemsize
        end = start + size
        header[name] = {"dtype": kind.dtype, "shape": list(kind.shape), "data_offsets": [start, end]}
    content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _bytes(tensor: "Tensor") -> memoryview:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
