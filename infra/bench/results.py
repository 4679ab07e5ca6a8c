"""What a group of measurements has found: rows of a table, the figures by name, and what it all means."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from infra.bench.contender import Measurement
from infra.bench.rounds import Rounds


@dataclass(frozen=True)
class Spread:
    """A median, and the smallest and the largest of the values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        if self.low == self.high:
            return rounded(self.median)
        return f"{rounded(self.median)} ({rounded(self.low)} to {rounded(self.high)})"


def rounded(value: float) -> str:
    """Three figures that count, and all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Column:
    """One of a table: its title, and a contender's value of a round; None where it has none."""

    title: str
    value: Callable[[Measurement], float | None]


@dataclass
class Group:
    """A chapter of the report.

    Attributes:
        text: what is measured, and how, in Markdown.
        figures: the ratios and seconds that are compared and kept, by their names in `latest.json`.
    """

    title: str
    text: str
    tables: list[str] = field(default_factory=list)
    figures: dict[str, Spread] = field(default_factory=dict)
    rounds: list[Rounds] = field(default_factory=list)

    def add(self, rounds: Rounds, columns: Sequence[Column], title: str = "") -> None:
        """A table with a row for each contender, and the remark on its rounds."""
        self.rounds.append(rounds)
        rows = [[title, *(column.title for column in columns)], ["---"] * (1 + len(columns))]
        for name in rounds.kept[0].by_name:
            rows.append([name, *(_cell(rounds.of(name), column) for column in columns)])
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        self.tables.append("\n".join(lines) + f"\n\n{rounds.remark}")

    def figure(self, name: str, values: Sequence[float]) -> None:
        self.figures[name] = Spread.of(values)

    def markdown(self) -> str:
        parts = [f"## {self.title}", self.text, *self.tables]
        if self.figures:
            rows = ["| figure | median (lowest to highest round) |", "|---|---|"]
            rows += [f"| `{name}` | {spread} |" for name, spread in self.figures.items()]
            parts.append("\n".join(rows))
        return "\n\n".join(parts)


def _cell(found: Sequence[Measurement], column: Column) -> str:
    values = [value for each in found if (value := column.value(each)) is not None]
    return str(Spread.of(values)) if values else ""


def per_second(found: Measurement) -> float:
    return found.per_second


def cpu_milliseconds(found: Measurement) -> float:
    return found.cpu_milliseconds


def memory(found: Measurement) -> float:
    return found.memory_mib


def bytes_each(found: Measurement) -> float | None:
    """Kilobytes on disk of one patch."""
    return found.more["bytes"] / found.count / 1000 if "bytes" in found.more else None


def images_per_second(found: Measurement) -> float:
    """What a training says of itself; of all else, what was counted."""
    return found.more.get("images_per_second", found.per_second)


SPEED = Column("patches/s", per_second)
CPU = Column("CPU ms/patch", cpu_milliseconds)
MEMORY = Column("PSS MiB", memory)
