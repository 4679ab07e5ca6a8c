"""What an entropy model asks of the coder of its symbols: the same call writes them and reads them."""

from typing import Protocol

from torch import Tensor


class SymbolCoder(Protocol):
    """Writes symbols, or reads them: whoever asks need not know which, and so asks for the same in the same order."""

    def code(self, scales: Tensor, symbols: Tensor | None) -> Tensor:
        """Symbols of one part of a file.

        Args:
            scales: rows of `laplace.frequency_tables`, int64, any shape.
            symbols: integers of that shape to write, int64; None where they are to be read.

        Returns:
            The symbols that a reader gets, int64: those beyond the largest that can be written are that.
        """
        ...
