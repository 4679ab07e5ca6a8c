"""Symbols to bytes and back by a range coder: the only room that speaks to `constriction`.

A part's symbols are coded table by table, all of one table in one call: the order is known from the scales alone, which
the reader has too. Symbols without an entry of their own follow the part, one by one.
"""

from collections.abc import Iterator

import numpy as np
import torch
from constriction import stream  # type: ignore[attr-defined]  # a compiled module without types
from numpy.typing import NDArray
from torch import Tensor

from pipelines.errors import CodecmillError
from pipelines.model.entropy.laplace import LARGEST, TOTAL

ESCAPE = 2 * LARGEST + 1
"""The last entry of a table."""

ESCAPE_BITS = 16
"""An escaped symbol is at most 2^16 - 1 beyond the largest that has an entry."""


ROUNDED_UP = 2
"""What `constriction` adds to an entry of a table at most: one, that none be zero, and one by its own rounding."""


class Tables:
    """The probabilities that a model's symbols are coded with.

    Args:
        frequencies: `laplace.frequency_tables` as the model holds them, int32 (scales, symbols).

    Attributes:
        models: one of `constriction` a scale.
        least_bits: that a symbol takes, (scales, symbols), float64.

    Raises:
        CodecmillError: they are no such tables.
    """

    def __init__(self, frequencies: Tensor):
        counts = frequencies.cpu().numpy()
        if counts.ndim != 2 or counts.shape[1] != ESCAPE + 1 or counts.min() < 1 or (counts.sum(axis=1) != TOTAL).any():
            raise CodecmillError("The model's tables of probabilities are none: it is damaged, or of another version.")
        self.models = [stream.model.Categorical(row / TOTAL, perfect=False) for row in counts]
        self.least_bits = np.log2(TOTAL) - np.log2(np.minimum(counts.astype(np.int64) + ROUNDED_UP, TOTAL))


class SymbolWriter:
    """Collects symbols; `content` is what they became."""

    def __init__(self, tables: Tables):
        self._tables = tables
        self._encoder = stream.queue.RangeEncoder()

    def code(self, scales: Tensor, symbols: Tensor | None) -> Tensor:
        """As `SymbolCoder.code`: writes them."""
        if symbols is None:
            raise ValueError("there is nothing to write")
        rows = scales.flatten().numpy()
        limit = LARGEST + 2**ESCAPE_BITS - 1
        values = symbols.flatten().numpy().clip(-limit, limit)
        entries = np.where(np.abs(values) <= LARGEST, values + LARGEST, ESCAPE).astype(np.int32)
        order = _order(rows)
        for row, places in _groups(rows, order):
            self._encoder.encode(entries[places], self._tables.models[row])
        for place in order[entries[order] == ESCAPE]:
            self._write_escaped(int(values[place]))
        return torch.from_numpy(values).view(scales.shape)

    def content(self) -> bytes:
        """Everything so far."""
        return self._encoder.get_compressed().astype("<u4").tobytes()

    def _write_escaped(self, value: int) -> None:
        """The sign, how many digits, and the digits after the first, which is a one (Elias 1975)."""
        number = abs(value) - LARGEST
        digits = number.bit_length()
        self._encoder.encode(int(value < 0), stream.model.Uniform(2))
        self._encoder.encode(digits - 1, stream.model.Uniform(ESCAPE_BITS))
        if digits > 1:
            self._encoder.encode(number - 2 ** (digits - 1), stream.model.Uniform(2 ** (digits - 1)))


class SymbolReader:
    """Reads what a `SymbolWriter` wrote, asked for the same parts in the same order.

    A range decoder does not know its end: it finds zeros there for ever. So what symbols take at least is counted, and
    a reader that is asked for more than was written says so soon, whatever size a damaged file claims.

    Args:
        tables: of the model.
        content: of the writer.
        symbols: how many will be asked for at least, a count.

    Raises:
        CodecmillError: the content is none of a writer, or has no room for so many symbols.
    """

    def __init__(self, tables: Tables, content: bytes, symbols: int = 0):
        if len(content) % 4:
            raise CodecmillError(f"A coded picture has a multiple of 4 bytes, but this one has {len(content)}.")
        self._tables = tables
        # A writer's range shrinks by these bits or more; for each 32 of them it writes a word, and one for the rest.
        self._room = 8.0 * len(content)
        if symbols * tables.least_bits.min() > self._room:
            raise CodecmillError(f"A coded picture of {symbols:,} symbols does not fit into {len(content)} bytes.")
        self._decoder = stream.queue.RangeDecoder(np.frombuffer(content, dtype="<u4").astype(np.uint32))

    def code(self, scales: Tensor, symbols: Tensor | None = None) -> Tensor:
        """As `SymbolCoder.code`: reads them."""
        rows = scales.flatten().numpy()
        values = np.zeros(len(rows), dtype=np.int64)
        order = _order(rows)
        try:
            for row, places in _groups(rows, order):
                entries = self._decoder.decode(self._tables.models[row], len(places))
                self._take(float(self._tables.least_bits[row][entries].sum()))
                values[places] = entries - LARGEST
            for place in order[values[order] == ESCAPE - LARGEST]:
                values[place] = self._read_escaped()
        except (AssertionError, ValueError) as error:
            raise CodecmillError("A coded picture does not belong to this model's probabilities.") from error
        return torch.from_numpy(values).view(scales.shape)

    def finish(self) -> None:
        """To be called when all parts are read.

        Raises:
            CodecmillError: something is left over, or what was read was not written like that.
        """
        if not self._decoder.maybe_exhausted():
            raise CodecmillError("A coded picture does not end where its last symbol does: the file is damaged.")

    def _take(self, bits: float) -> None:
        self._room -= bits
        if self._room < 0:
            raise CodecmillError("A coded picture has fewer symbols than its size asks for: the file is damaged.")

    def _read_escaped(self) -> int:
        is_negative = self._decoder.decode(stream.model.Uniform(2))
        digits = self._decoder.decode(stream.model.Uniform(ESCAPE_BITS)) + 1
        number = 2 ** (digits - 1)
        if digits > 1:
            number += self._decoder.decode(stream.model.Uniform(2 ** (digits - 1)))
        return -(LARGEST + number) if is_negative else LARGEST + number


def _order(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The places in the order in which they are coded: by table."""
    return np.argsort(rows.astype(np.uint8), kind="stable")


def _groups(rows: NDArray[np.int64], order: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each table that is used, and its places."""
    if len(order):
        for places in np.split(order, np.flatnonzero(np.diff(rows[order])) + 1):
            yield int(rows[places[0]]), places
