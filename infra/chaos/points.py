"""Steps through the crash points of a small run one by one: `make chaos-points`, hours for all of them.

A recorded run tells every write, fsync, rename, link, removal, log call and collective of codecmill's, with the process
and the function that makes it. For each, at its first and at its last time, before and after, a fresh run is killed at
that very point (SIGKILL to all of its processes), resumed, and compared with the recorded one, which was left alone.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infra.chaos.results import UNREADABLE
from infra.chaos.small_runs import CHECKPOINTS, SmallRun, emptied, make_pictures, until_ctrl_c

STEPS = 32
INTERVAL = STEPS // CHECKPOINTS
"""Steps between checkpoints, the most that may be done again."""

CRASHING = Path(__file__).parent / "crashing"


@dataclass(frozen=True)
class Outcome:
    """What became of a run that was killed at a point.

    Attributes:
        reached: whether the point came at all; threads may pass it another number of times.
        redone: steps that were done again; None where there was none left to do.
        differing: in what the resumed run ended otherwise, and what is wrong with its end; None where it did not end.
    """

    point: dict[str, Any]
    reached: bool
    stage: str = ""
    redone: int | None = None
    orphans: int = 0
    differing: list[str] | None = None

    @property
    def is_fine(self) -> bool:
        return not self.reached or (self.differing == [] and not self.orphans and (self.redone or 0) <= INTERVAL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, help="how many, drawn from all of them [all]")
    parser.add_argument("--seed", type=int, default=0, help="of the draw [0]")
    where = "folder; works in points/ below it, emptied first [codecmill-data]"
    parser.add_argument("--root", type=Path, default=Path("codecmill-data"), help=where)
    arguments = parser.parse_args()
    folder = emptied(arguments.root, "points")
    found = folder / "points.json"
    return until_ctrl_c("chaos-points", found, lambda: _campaign(folder, arguments.points, arguments.seed, found))


def _campaign(folder: Path, wanted: int | None, seed: int, file: Path) -> int:
    """Kill a run at one point after the other; what is found is in the file after each. Returns the exit code."""
    make_pictures(folder / "pictures")
    record = folder / "record.jsonl"
    left_alone = SmallRun(folder, "alone", STEPS)
    seconds = left_alone.finish(_environment({"CODECMILL_CRASH_RECORD": str(record)}))
    alone = left_alone.sound_result()
    points = points_of(record)
    chosen = random.Random(seed).sample(points, min(len(points), wanted or len(points)))  # noqa: S311
    print(f"Left alone, a run takes {seconds:.0f} s and has {len(points)} crash points; {len(chosen)} are tried.")
    outcomes: list[Outcome] = []
    begun = time.monotonic()
    for number, point in enumerate(chosen, start=1):
        outcomes.append(_crashed(SmallRun(folder, f"point-{number:04d}", STEPS), point, alone))
        file.write_text(json.dumps([asdict(each) for each in outcomes], indent=2) + "\n")
        left = (time.monotonic() - begun) / number * (len(chosen) - number)
        print(f"{number} of {len(chosen)}, {left / 60:.0f} min left: {_told(outcomes[-1])}", flush=True)
    print(table(outcomes))
    print(f"All of it: {file}")
    return 0 if all(each.is_fine for each in outcomes) else 1


def _environment(more: dict[str, str]) -> dict[str, str]:
    return {"PYTHONPATH": str(CRASHING)} | more


def points_of(record: Path) -> list[dict[str, Any]]:
    """Every distinct call at its first and at its last time, before and after it, in the order of the recording."""
    last: dict[tuple[str, str, str], int] = {}
    for line in record.read_text().splitlines():
        each = json.loads(line)
        if each["role"] != "service":
            last[each["role"], each["kind"], each["place"]] = each["number"]
    return [
        {"role": role, "kind": kind, "place": place, "number": number, "moment": moment}
        for (role, kind, place), count in last.items()
        for number in sorted({1, count})
        for moment in ("before", "after")
    ]


def _crashed(run: SmallRun, point: dict[str, Any], alone: dict[str, str]) -> Outcome:
    with run.under_way(_environment({"CODECMILL_CRASH_POINT": json.dumps(point)})) as process:
        code = process.wait()
    if code == 0:
        shutil.rmtree(run.root)
        return Outcome(point, False)
    stage, orphans = run.stage(), run.orphans()
    if code != -signal.SIGKILL:
        print(f"{run.name} was not killed, but failed by itself, exit code {code}: {run.log}", flush=True)
        return Outcome(point, True, stage, orphans=orphans)
    reached, starts = run.last_step(), len(run.beginnings())
    differing = None
    try:
        run.finish()
        differing = run.differences(alone) + run.faults()
    except (SystemExit, *UNREADABLE) as error:
        print(f"{run.name} did not come to its end: {error}", flush=True)
    outcome = Outcome(point, True, stage, run.redone(reached, starts), orphans, differing)
    if outcome.is_fine:
        shutil.rmtree(run.root)
    return outcome


def _told(outcome: Outcome) -> str:
    point = outcome.point
    where = f"{point['moment']} {point['kind']} {point['number']} of {point['role']} in {point['place']}"
    if not outcome.reached:
        return f"{where}: not reached"
    how = "not resumed" if outcome.differing is None else ", ".join(outcome.differing) or "identical"
    too_many = f", {outcome.redone} steps done again" if (outcome.redone or 0) > INTERVAL else ""
    left = f", {outcome.orphans} processes left" if outcome.orphans else ""
    return f"{where} ({outcome.stage}): {how}{too_many}{left}"


def table(outcomes: list[Outcome]) -> str:
    """A line for each kind of call."""
    lines = [f"{'killed at':12}{'points':>8}{'reached':>9}{'resumed':>9}{'identical':>11}{'most redone':>13}"]
    for kind in Counter(each.point["kind"] for each in outcomes):
        of = [each for each in outcomes if each.point["kind"] == kind]
        reached = [each for each in of if each.reached]
        resumed = sum(each.differing is not None for each in reached)
        identical = sum(each.differing == [] for each in reached)
        redone = max((each.redone or 0 for each in reached), default=0)
        lines.append(f"{kind:12}{len(of):8}{len(reached):9}{resumed:9}{identical:11}{redone:13}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
