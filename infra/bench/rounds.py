"""Rounds: all contenders of a group one after another, again and again; those that others disturbed are done again."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from infra.bench.contender import Contender, Measurement, Program

MOST_DISTURBED = 0.10
"""Share of the machine's CPU that others may take in a round."""
LOOP = 2_000_000
"""Numbers that are added to see how fast the machine is: some 20 to 50 ms."""


@dataclass(frozen=True)
class Round:
    """A measurement of each contender, by name."""

    by_name: Mapping[str, Measurement]

    @property
    def disturbance(self) -> float:
        """Share of the machine's CPU time that others took."""
        capacity = sum(each.capacity for each in self.by_name.values())
        return sum(each.others for each in self.by_name.values()) / capacity if capacity else 0.0


@dataclass(frozen=True)
class Rounds:
    """The rounds of a group that count.

    Attributes:
        left_out: disturbances of those that were done again.
        loops: seconds of one and the same loop, before each measurement.
    """

    kept: Sequence[Round]
    left_out: Sequence[float] = field(default_factory=list)
    loops: Sequence[float] = field(default_factory=list)

    def of(self, name: str) -> list[Measurement]:
        return [each.by_name[name] for each in self.kept]

    def values(self, name: str, value: Callable[[Measurement], float]) -> list[float]:
        return [value(each) for each in self.of(name)]

    def ratios(self, name: str, other: str, value: Callable[[Measurement], float]) -> list[float]:
        """One contender's value over another's, round by round: what slows a whole round cancels."""
        pairs = zip(self.of(name), self.of(other), strict=True)
        return [value(one) / value(two) for one, two in pairs]

    @property
    def remark(self) -> str:
        """What is to be said of others on the machine."""
        shares = ", ".join(f"{100 * each.disturbance:.0f} %" for each in self.kept)
        text = f"Others took {shares} of the CPU in the {len(self.kept)} round(s) that count"
        if self.left_out:
            text += f"; {len(self.left_out)} more, in which they took up to {100 * max(self.left_out):.0f} %, do not"
        disturbed = sum(each.disturbance > MOST_DISTURBED for each in self.kept)
        if disturbed:
            text += f". **{disturbed} of those that count were disturbed by more than {MOST_DISTURBED:.0%}**"
        if self.loops:
            most = max(self.loops) / min(self.loops)
            text += f". One and the same loop, timed before each, took up to {most:.2g} times its shortest"
        return text + "."


@contextmanager
def started(programs: Sequence[Program], folder: Path) -> Iterator[list[Contender]]:
    """All contenders of a group, each prepared before the next begins; they end with the context."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        found = []
        for program in programs:
            log = folder / f"{''.join(c if c.isalnum() else '-' for c in program.name)}.log"
            contender = stack.enter_context(Contender(program, log))
            contender.wait_ready()
            found.append(contender)
        yield found


def measured(title: str, programs: Sequence[Program], rounds: int, repeats: int, folder: Path) -> Rounds:
    """Measure some contenders interleaved; every other round goes backwards, so that none is always the first.

    Args:
        title: of the group, for the lines that tell how far it is.
        rounds: that count.
        repeats: how many more there may be, in place of disturbed ones.
        folder: for the contenders' logs.
    """
    done: list[Round] = []
    loops: list[float] = []
    print(f"{title}: preparing {len(programs)} contender(s)", flush=True)
    with started(programs, folder) as contenders:
        while len(done) < rounds + repeats and sum(each.disturbance <= MOST_DISTURBED for each in done) < rounds:
            order = contenders if len(done) % 2 == 0 else contenders[::-1]
            found: dict[str, Measurement] = {}
            for contender in order:
                loops.append(_loop_seconds())
                found[contender.program.name] = contender.measure(len(done))
                _tell(title, len(done) + 1, contender.program.name, found[contender.program.name])
            done.append(Round({program.name: found[program.name] for program in programs}))
    best = sorted(done, key=lambda each: each.disturbance)
    return Rounds(best[:rounds], [each.disturbance for each in best[rounds:]], loops)


def _loop_seconds() -> float:
    """How long a fixed piece of work takes just now: what other guests of the host take shows in nothing else."""
    began = time.perf_counter()
    sum(range(LOOP))
    return time.perf_counter() - began


def _tell(title: str, number: int, name: str, found: Measurement) -> None:
    speed = found.more.get("images_per_second", found.per_second)
    print(
        f"{title}, round {number}: {name}: {speed:.4g} a second, {found.cpu_milliseconds:.3g} CPU ms each, "
        f"{found.memory_mib:.0f} MiB, others {found.others / max(found.capacity, 1e-9):.0%}",
        flush=True,
    )
