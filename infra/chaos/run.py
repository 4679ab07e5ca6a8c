"""Kills complete small runs at random moments, resumes them, and compares what they end with: `make chaos`.

One run is left alone. Every other one, under a root of its own, is killed (SIGKILL) up to `KILLS_A_RUN` times, at
random times over all its stages, and resumed with `codecmill resume` until it is done. Then its shards, weights,
optimiser moments, MLflow metrics and test results must be those of the run that was left alone.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from infra.chaos.results import Kill, report_of, result_of, table
from infra.chaos.small_runs import SmallRun, make_pictures

KILLS_A_RUN = 4
STEPS = 400
VICTIMS = {"everything": 6, "the command": 2, "torchrun": 1, "one rank": 1, "a shard worker": 1}
"""Who is killed, and how often in comparison."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="how many [40]")
    parser.add_argument("--seed", type=int, default=0, help="of the times and the victims [0]")
    parser.add_argument("--root", type=Path, default=Path("codecmill-data/chaos"), help="folder [codecmill-data/chaos]")
    arguments = parser.parse_args()
    folder = arguments.root.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    make_pictures(folder / "pictures")
    begun = time.monotonic()
    seconds = SmallRun(folder, "alone", STEPS).finish()
    alone = result_of(folder / "alone", "alone")
    print(f"Left alone, a run takes {seconds:.0f} s.", flush=True)
    chance = random.Random(arguments.seed)  # noqa: S311  # no secret
    kills: list[Kill] = []
    differing: dict[str, list[str]] = {}
    report = report_of(kills, differing, arguments.seed, 0)
    with contextlib.suppress(KeyboardInterrupt):  # what has been found by then is told
        while len(kills) < arguments.kills:
            run = SmallRun(folder, f"run-{len(differing) + 1:03d}", STEPS)
            kills += _disturbed(run, min(KILLS_A_RUN, arguments.kills - len(kills)), seconds, chance)
            differing[run.name] = run.differences(alone)
            found = f"differs: {', '.join(differing[run.name])}" if differing[run.name] else "identical"
            print(f"{run.name}: {found}; {len(kills)} of {arguments.kills} kills", flush=True)
            report = report_of(kills, differing, arguments.seed, time.monotonic() - begun)
            (folder / "chaos.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    print(f"All of it: {folder / 'chaos.json'}")
    is_done = report["kills"] == arguments.kills
    return 0 if is_done and report["identical"] == report["runs"] and not report["orphans"] else 1


def _disturbed(run: SmallRun, wanted: int, usual: float, chance: random.Random) -> list[Kill]:
    """Run to the end with some kills on the way; those that come after the end are not counted."""
    kills: list[Kill] = []
    pending: dict[str, Any] | None = None
    while True:
        started, known = time.monotonic(), run.last_step()
        process = run.start()
        kill_at = started + chance.uniform(0, usual) if len(kills) + (pending is not None) < wanted else None
        first_step = None
        while process.poll() is None and (kill_at is None or time.monotonic() < kill_at):
            if first_step is None and run.last_step() > known:
                first_step = time.monotonic() - started
            time.sleep(0.05)
        if pending is not None:
            kills.append(Kill(**pending, recovery=first_step))
            pending = None
        if process.poll() is None:
            pending = _kill(run, process, chance, time.monotonic() - started)
        elif process.returncode == 0:
            return kills
        else:
            raise SystemExit(f"{run.name} failed by itself, exit code {process.returncode}: {run.log}")


def _kill(run: SmallRun, process: subprocess.Popen[bytes], chance: random.Random, after: float) -> dict[str, Any]:
    victim, victims = _chosen(run, process.pid, chance)
    stage = run.stage()
    for each in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    process.wait()  # it may go on by itself, which is what a retry is for, or end with an error
    orphans = run.orphans()
    about = {"run": run.name, "stage": stage, "victim": victim, "after": round(after, 2)}
    return about | {"redone": run.redone(), "orphans": orphans}


def _chosen(run: SmallRun, command: int, chance: random.Random) -> tuple[str, list[int]]:
    """Who is to be killed: a kind of process, and its process ids."""
    alive = run.alive()
    torchrun = [process for process, words in alive.items() if "pipelines.training.agent" in words]
    ranks = [process for process, words in alive.items() if "pipelines.training.worker" in words]
    kinds = {
        "everything": list(alive),
        "the command": [command],
        "torchrun": torchrun,
        "one rank": sorted(set(ranks) - set(torchrun))[-1:],
        "a shard worker": [process for process, words in alive.items() if "spawn_main" in words][:1],
    }
    present = [kind for kind in VICTIMS if kinds[kind]]
    kind = chance.choices(present, [VICTIMS[each] for each in present])[0]
    return kind, kinds[kind]


if __name__ == "__main__":
    sys.exit(main())
