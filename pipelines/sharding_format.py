"""`sharding.json`: which rows of which tensor lie in which of a sharded checkpoint's files.

Each rank of a training with `training.parallel: fsdp` writes `shard_<rank>_of_<ranks>.safetensors`: its rows of the
weights, named `model/<name>`, and of the optimiser's state, named `training_state/<name>`. What every rank holds alike
lies in the first rank's. Other checkpoints have the same in `model.safetensors` and `training_state.safetensors`.
"""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from pipelines.checkpoint_format import SHARDING, FileName
from pipelines.config import Section
from pipelines.durable_files import read_json
from pipelines.errors import CodecmillError, first_fault
from pipelines.tensor_files import PLAIN_TYPES, is_name, is_possible

Count = Annotated[int, Field(ge=0, lt=2**48)]
Part = Literal["model", "training_state"]


class Piece(NamedTuple):
    """Rows `offset` to `offset + rows` of a tensor, along its first axis; a number without axes counts as one row."""

    file: str
    offset: int
    rows: int


class Layout(Section):
    """A whole tensor, by torch's names, and where its rows are: file i has those from `offsets[i]` to the next one."""

    dtype: str
    shape: tuple[Count, ...]
    offsets: tuple[Count, ...]

    @field_validator("dtype")
    @classmethod
    def _check_type(cls, dtype: str) -> str:
        if dtype not in PLAIN_TYPES.values():
            raise ValueError("no plain type of numbers")
        return dtype

    @model_validator(mode="after")
    def _check(self) -> Self:
        rows = self.shape[0] if self.shape else 1
        if not is_possible(self.shape):
            raise ValueError(f"no tensor has shape {list(self.shape)}")
        if [*self.offsets] != sorted(self.offsets) or self.offsets[:1] != (0,) or self.offsets[-1] != rows:
            raise ValueError(f"the offsets do not lead from 0 up to its {rows} rows")
        return self

    def pieces(self, files: tuple[str, ...]) -> list[Piece]:
        """Where there are rows, in their order."""
        spans = zip(files, pairwise(self.offsets), strict=True)
        return [Piece(file, start, stop - start) for file, (start, stop) in spans if stop > start]


class Sharding(Section):
    """The files of the ranks, in their order, and by name the tensors of each kind."""

    files: tuple[FileName, ...]
    model: dict[str, Layout]
    training_state: dict[str, Layout]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in (*self.model, *self.training_state):
            if not is_name(name):
                raise ValueError(f"no tensor is called {name!a}")
        for layout in (*self.model.values(), *self.training_state.values()):
            if len(layout.offsets) != len(self.files) + 1:
                raise ValueError(f"{len(self.files)} files have {len(self.files) + 1} offsets in each tensor")
        return self


def shard_name(number: int, count: int) -> str:
    """The file of a rank, from 0."""
    return f"shard_{number:05d}_of_{count:05d}.safetensors"


def in_shard(part: Part, name: str) -> str:
    """What a tensor is called in a rank's file."""
    return f"{part}/{name}"


def read_sharding(folder: Path) -> Sharding:
    """What a sharded checkpoint's folder says of its tensors.

    Raises:
        CodecmillError: it is missing, or says what cannot be.
    """
    file = folder / SHARDING
    try:
        return Sharding.model_validate(read_json(file))
    except ValidationError as error:
        raise CodecmillError(f"{file} is damaged: {first_fault(error)}.") from error
