"""The journal in a store: pieces of one length, of which only the last ones are sent with a checkpoint.

A journal grows by a line a step, and S3 lets nobody append: sent whole with each checkpoint, that of a million steps
would have cost the store hundreds of gigabytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipelines.durable_files import whole_lines, write_pieces
from pipelines.run_directory import RunDirectory
from pipelines.storage import keys
from pipelines.storage.store import Store

PIECE_BYTES = 16 * 2**20
"""Some 35,000 steps: most runs have one piece, which is the journal under its own name."""
_MARK_BYTES = 4096
"""The last of them have a step's time, and are others where that step was trained anew."""


class JournalSending:
    """Brings the journal in a store level with that of a run; may be called again and again."""

    def __init__(self, run: RunDirectory, store: Store):
        self._run = run
        self._store = store
        self._level = 0
        """How many whole pieces, from the first on, the store has as they are here."""
        self._mark = b""
        """How the last of them ends."""

    def send(self, copy: Path) -> None:
        """Send the whole lines that the store has not got, while the training may write more.

        Args:
            copy: a name that is free, for a piece that does not change while it is sent.
        """
        file = self._run.journal
        if not file.is_file():
            return
        end = whole_lines(file)
        with file.open("rb") as journal:
            if self._level and _mark(journal, self._level) != self._mark:
                self._level = 0
            there = [] if self._level else keys.journal_pieces(self._store, self._run.path.name)
            last = max(0, end - 1) // PIECE_BYTES
            for number in range(self._level, last + 1):
                with _copied(journal, number, end, copy):
                    key = keys.of_journal(self._run.path.name, number)
                    if there and not self._store.has(key, copy):
                        # What followed it was of another training; the last first, so that no piece has a wrong one
                        # after it at any moment.
                        self._remove(there, number)
                    self._store.send(copy, key)
            self._remove(there, last)
            self._level = end // PIECE_BYTES
            self._mark = _mark(journal, self._level)

    def _remove(self, there: list[int], after: int) -> None:
        while there and there[-1] > after:
            self._store.remove(keys.of_journal(self._run.path.name, there[-1]))
            there.pop()


def bring_journal(run: RunDirectory, store: Store) -> None:
    """Bring a run's journal from a store, in the place of the one that is here.

    Raises:
        MissingObject: the store has none. StoreError: it cannot be had. DiskFullError: there is no room for it here.
    """
    write_pieces(run.journal, _pieces(run.path.name, store))


def _pieces(name: str, store: Store) -> Iterator[bytes]:
    for number in range(1 + len(keys.journal_pieces(store, name))):
        piece = store.read(keys.of_journal(name, number))
        yield piece
        if len(piece) != PIECE_BYTES:  # the last, or a whole journal, as they were sent formerly
            return


def _mark(journal: BinaryIO, pieces: int) -> bytes:
    journal.seek(max(0, pieces * PIECE_BYTES - _MARK_BYTES))
    return journal.read(_MARK_BYTES if pieces else 0)


@contextmanager
def _copied(journal: BinaryIO, number: int, end: int, copy: Path) -> Iterator[Path]:
    """A piece of the journal, of which what lies before `end` counts, in a file of its own."""
    journal.seek(number * PIECE_BYTES)
    try:
        copy.write_bytes(journal.read(min(PIECE_BYTES, end - journal.tell())))
        yield copy
    finally:
        copy.unlink(missing_ok=True)
