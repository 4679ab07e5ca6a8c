"""Kills complete small runs at random moments, resumes them, and compares what they end with: `make chaos`.

One run is left alone. Every other one, under a root of its own, is killed (SIGKILL) up to `KILLS_A_RUN` times, at
random times over all its stages, and resumed with `codecmill resume` until it is done. Then its shards, weights,
optimiser moments, MLflow metrics and test results must be those of the run that was left alone. A run that fails or
hangs is recorded, with its kills and its log, and the campaign goes on with the next.
"""

import argparse
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from infra.chaos.results import UNREADABLE, Ending, Kill, report_of, table
from infra.chaos.small_runs import GONE_SECONDS, LONGEST_SECONDS, SmallRun, emptied, make_pictures, until_ctrl_c

KILLS_A_RUN = 4
STEPS = 400
VICTIMS = {"everything": 6, "the command": 2, "torchrun": 1, "one rank": 1, "a shard worker": 1}
"""Who is killed, and how often in comparison."""

MOST_FAILED = 5
"""Runs that do not come to their end, after which a campaign is given up: something is broken for all of them."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="how many [40]")
    parser.add_argument("--seed", type=int, default=0, help="of the times and the victims [0]")
    where = "folder; works in chaos/ below it, emptied first [codecmill-data]"
    parser.add_argument("--root", type=Path, default=Path("codecmill-data"), help=where)
    arguments = parser.parse_args()
    folder = emptied(arguments.root, "chaos")
    found = folder / "chaos.json"
    return until_ctrl_c("chaos", found, lambda: _campaign(folder, arguments.kills, arguments.seed, found))


def _campaign(folder: Path, wanted: int, seed: int, file: Path) -> int:
    """Disturb one run after the other; what is found is in the file after each. Returns the exit code."""
    make_pictures(folder / "pictures")
    begun = time.monotonic()
    left_alone = SmallRun(folder, "alone", STEPS)
    seconds = left_alone.finish()
    alone = left_alone.sound_result()
    print(f"Left alone, a run takes {seconds:.0f} s.", flush=True)
    chance = random.Random(seed)  # noqa: S311  # no secret
    kills: list[Kill] = []
    endings: list[Ending] = []

    def report() -> dict[str, Any]:
        found = report_of(kills, endings, wanted, left_alone.interval, seed, time.monotonic() - begun)
        file.write_text(json.dumps(found, indent=2) + "\n")
        return found

    while len(kills) < wanted and sum(bool(each.failure) for each in endings) < MOST_FAILED:
        run = SmallRun(folder, f"run-{len(endings) + 1:03d}", STEPS)
        of_run, failure = disturbed(run, min(KILLS_A_RUN, wanted - len(kills)), seconds, chance)
        kills += of_run
        endings.append(ending_of(run, failure, alone))
        print(f"{run.name}: {_told(endings[-1])}; {len(kills)} of {wanted} kills", flush=True)
        report()
    found = report()
    print(table(found))
    print(f"All of it: {file}")
    return 1 if found["failures"] else 0


def ending_of(run: SmallRun, failure: str | None, alone: Mapping[str, str]) -> Ending:
    """What a run has ended with, compared; what cannot be read of it is a failure as well."""
    if failure is None:
        try:
            return Ending(run.name, str(run.log), None, run.differences(alone), run.faults())
        except UNREADABLE as error:
            failure = f"what it should end with cannot be read ({type(error).__name__}: {error})"
    return Ending(run.name, str(run.log), failure)


def _told(ending: Ending) -> str:
    if ending.failure:
        return f"FAILED, {ending.failure}: {ending.log}"
    return "identical" if ending.is_identical else f"differs: {', '.join([*ending.differing, *ending.faults])}"


class Watch:
    """Watches a run from now on, until its command ends: how long does it take to the first new step?"""

    def __init__(self, run: SmallRun, process: "subprocess.Popen[bytes]"):
        self._run = run
        self._process = process
        self._begun = time.monotonic()
        self._known = run.last_step()
        self._first_step: float | None = None

    def take_as_known(self, step: int) -> None:
        """Steps up to this one are none of what is waited for."""
        self._known = step

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def until(self, seconds: float) -> int | None:
        """Returns the command's exit code, or None where it still runs when so many seconds have passed."""
        while (code := self._process.poll()) is None and self.seconds < seconds:
            if self._first_step is None and self._run.last_step() > self._known:
                self._first_step = self.seconds
            time.sleep(0.05)
        return code

    def judged(self, kill: Kill, code: int | None) -> Kill:
        """The kill before this watch, with what has become of the run: still at work, or ended with a code."""
        recovery = self._first_step
        if recovery is None and code == 0:
            recovery = self.seconds
        redone = self._run.redone(kill.reached, kill.starts)
        return replace(kill, resumed=code in (None, 0), redone=redone, recovery=recovery)


def disturbed(run: SmallRun, wanted: int, usual: float, chance: random.Random) -> tuple[list[Kill], str | None]:
    """Run to the end with some kills on the way; those that come after the end are not counted.

    Args:
        wanted: kills, at most.
        usual: seconds of a run that is left alone; each kill comes at random within as many.

    Returns:
        The kills, and why the run did not come to its end, if so.
    """
    kills: list[Kill] = []
    while True:
        with run.under_way() as process:
            watch = Watch(run, process)
            due = chance.uniform(0, usual) if len(kills) < wanted else math.inf
            code = watch.until(min(due, LONGEST_SECONDS))
            if kills:
                kills[-1] = watch.judged(kills[-1], code)
            if code is None and due < LONGEST_SECONDS:
                kill, watch = _kill(run, process, chance, watch.seconds)
                # It may go on by itself, which is what a retry is for, or end with an error.
                code = watch.until(LONGEST_SECONDS)
                kills.append(replace(kill, orphans=0 if code is None else run.orphans()))
                if code:
                    continue
                kills[-1] = watch.judged(kills[-1], code)
            if code is not None:
                return kills, f"exit code {code}" if code else None
            run.end(process)
            kills[-1:] = [replace(kill, resumed=False) for kill in kills[-1:]]
            return kills, f"it did not end within {LONGEST_SECONDS:.0f} s"


def _kill(run: SmallRun, process: "subprocess.Popen[bytes]", chance: random.Random, after: float) -> tuple[Kill, Watch]:
    """Kill somebody; returns what is known of it at once, and a watch on what follows."""
    victim, victims = _chosen(run, process.pid, chance)
    stage, starts, ranks = run.stage(), len(run.beginnings()), run.ranks()
    for each in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    watch = Watch(run, process)
    # Ranks that end with their command, or with another rank, may do a step yet.
    while victim != "a shard worker" and ranks & run.ranks() and watch.seconds < GONE_SECONDS:
        time.sleep(0.05)
    reached = run.last_step()
    watch.take_as_known(reached)
    return Kill(run.name, stage, victim, round(after, 2), reached, starts, orphans=0), watch


def _chosen(run: SmallRun, command: int, chance: random.Random) -> tuple[str, list[int]]:
    """Who is to be killed: a kind of process, and its process ids."""
    alive = run.alive()
    kinds = {
        "everything": list(alive),
        "the command": [command],
        "torchrun": _running("pipelines.training.agent", alive),
        "one rank": sorted(run.ranks())[-1:],
        "a shard worker": _running("pipelines.data.encoding_worker", alive)[:1],
    }
    present = [kind for kind in VICTIMS if kinds[kind]]
    kind = chance.choices(present, [VICTIMS[each] for each in present])[0]
    return kind, kinds[kind]


def _running(module: str, alive: dict[int, str]) -> list[int]:
    return [process for process, words in alive.items() if module in words]


if __name__ == "__main__":
    sys.exit(main())
