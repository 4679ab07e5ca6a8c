"""What a verification has read so far, and what it has found to be wrong."""

from pathlib import Path

from pipelines.config import Section
from pipelines.file_digests import difference
from pipelines.progress import Progress, report


class Problem(Section):
    """A file that is not as it was: `how` is the rest of a sentence that begins with its path."""

    file: Path
    how: str
    way_out: str


class Ledger:
    """Counts files and bytes, collects problems and notes, and says how far it is.

    Attributes:
        expected: files that will be read, as far as is known.
        notes: what is worth knowing and not wrong.
    """

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.files = self.bytes = 0
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def begin(self, file: Path) -> None:
        """One more file is being read."""
        self.files += 1
        self.expected = max(self.expected, self.files)
        report(Progress("verifying", self.files - 1, self.expected, "files", file.name))

    def end(self) -> None:
        report(Progress("verifying", self.files, self.files, "files"))

    def heard(self, count: int) -> None:
        self.bytes += count

    def check(self, file: Path, size: int | None, sha256: str, way_out: str) -> bool:
        """Compare a file with what was recorded of it; returns whether it is the same."""
        self.begin(file)
        how = difference(file, size, sha256, self.heard)
        if how:
            self.wrong(file, how, way_out)
        return how is None

    def wrong(self, file: Path, how: str, way_out: str) -> None:
        self.problems.append(Problem(file=file, how=how, way_out=way_out))

    def note(self, note: str) -> None:
        """Once, however many checkpoints it is about."""
        if note not in self.notes:
            self.notes.append(note)
