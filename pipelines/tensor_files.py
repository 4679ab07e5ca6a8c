"""Tensors in safetensors files that somebody else may have written: all of a file, or the rows that are asked for."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import CodecmillError

if TYPE_CHECKING:
    from types import EllipsisType

    from torch import Tensor

PLAIN_TYPES = {
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Of torch's types of numbers, those that others are copied from, by safetensors' names and in the order in which its
files hold them. There are complex, quantised and 4-bit ones, too."""

LARGEST_HEADER = 2 * 2**20
"""Bytes. Adam's moments of the largest model are named in half of it; safetensors takes 30 us a tensor."""

MOST_NUMBERS = 2**48
"""Of a tensor that anybody has; an empty one counts as having one along each axis, as its strides do."""

LISTED = 20
"""Tensors that a message names."""


class TensorFile:
    """An open file: what it holds is known, and rows are read when they are asked for.

    Raises:
        CodecmillError: it is no safetensors file, is damaged, or holds other than plain numbers.
    """

    def __init__(self, file: Path):
        from safetensors import SafetensorError, safe_open

        self.path = file
        try:
            _check_header(file)
            self._opened = safe_open(file, "pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise CodecmillError(f"{file} is no intact safetensors file: {error}.") from error
        self.names = dict.fromkeys(self._opened.offset_keys())  # in the order of their bytes
        _refuse((name for name in self.names if not self._is_plain(name)), str(file))

    def _is_plain(self, name: str) -> bool:
        return self._type(name) in PLAIN_TYPES and is_possible(self.shape(name))

    def _type(self, name: str) -> str:
        return self._opened.get_slice(name).get_dtype()

    def dtype(self, name: str) -> str:
        """torch's name of a tensor's type."""
        return PLAIN_TYPES[self._type(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._opened.get_slice(name).get_shape())

    def rows(self, name: str, rows: "slice | EllipsisType") -> "Tensor":
        """Some rows of a tensor, or all of it, on the CPU: no others are read."""
        import torch

        with torch.device("cpu"):  # a slice would be made on what is the default device
            return self._opened.get_slice(name)[rows]


def read_tensors(file: Path) -> dict[str, "Tensor"]:
    """The named tensors in a safetensors file, on the CPU.

    Raises:
        CodecmillError: it is none, is damaged, or holds complex numbers or other than plain ones.
    """
    opened = TensorFile(file)
    return {name: opened.rows(name, ...) for name in opened.names}


def is_possible(shape: tuple[int, ...]) -> bool:
    """Whether a tensor may have this shape: of others torch cannot tell the strides, or there is no room."""
    return math.prod(max(1, length) for length in shape) < MOST_NUMBERS


def is_name(name: str) -> bool:
    """Whether a safetensors file may name a tensor so: JSON and pickles know halves of characters, UTF-8 does not."""
    return name.encode(errors="replace").decode() == name


def _check_header(file: Path) -> None:
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    if header > LARGEST_HEADER:
        raise ValueError(f"its header is said to have {header} bytes")


def check_plain(values: Mapping[str, object], source: str) -> None:
    """Of values that somebody else may have written, all must be tensors that can be named and copied into weights.

    Raises:
        CodecmillError: some are none.
    """
    import torch

    def is_plain(value: object) -> bool:
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
            return False
        return str(value.dtype).removeprefix("torch.") in PLAIN_TYPES.values()

    _refuse((name for name, value in values.items() if not is_plain(value) or not is_name(name)), source)


def _refuse(names: Iterable[str], source: str) -> None:
    strange = sorted(names)
    if strange:
        named = ", ".join(strange[:LISTED]) + (f" and {len(strange) - LISTED} more" if len(strange) > LISTED else "")
        named = named.encode(errors="backslashreplace").decode()
        raise CodecmillError(f"{source} holds something that is no plain tensor of numbers: {named}.")
