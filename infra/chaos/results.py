"""What the runs of a campaign end with, compared with one that was left alone, and the campaign's report."""

import contextlib
import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TIMINGS = ("train/images_per_second", "train/data_wait_fraction", "train/decoding_fraction", "system/")
UNREADABLE = (OSError, KeyError, ValueError, StopIteration, sqlite3.Error)
"""What is raised where the things that a run should end with are missing or broken."""

STAGES = ("start", "shards", "training", "evaluation", "registration", "end")


@dataclass(frozen=True)
class Kill:
    """One kill, and how the run came back from it.

    Attributes:
        stage: the first that was not done.
        victim: one of VICTIMS; the whole command where nobody of that kind was alive.
        after: seconds from the start of the command that was killed.
        reached: the last step in the journal, once all ranks were gone.
        starts: how often ranks had begun by then.
        orphans: processes that were alive `GONE_SECONDS` after it.
        resumed: whether what followed, the resuming command or the same one by itself, went on to the run's end, or
            until the next kill.
        redone: steps that were done again; None where no rank began before the end or the next kill.
        recovery: seconds from the resuming command (from the kill, where the same command went on) to the first new
            step, or to the end where no new step was left; None where the next kill came before.
    """

    run: str
    stage: str
    victim: str
    after: float
    reached: int
    starts: int
    orphans: int
    resumed: bool = False
    redone: int | None = None
    recovery: float | None = None


@dataclass(frozen=True)
class Ending:
    """How a disturbed run ended.

    Attributes:
        failure: why it did not come to its end, if so.
        differing: in what it ended otherwise than the run that was left alone.
        faults: what is wrong with its end, whatever the other one ended with.
        log: what its commands have printed.
    """

    run: str
    log: str
    failure: str | None = None
    differing: Sequence[str] = ()
    faults: Sequence[str] = ()

    @property
    def is_identical(self) -> bool:
        return not (self.failure or self.differing or self.faults)


def result_of(root: Path, name: str) -> dict[str, str]:
    """A digest of everything that a run ends with, by what it is; timings apart."""
    run = root / "runs" / name
    last = max(run.glob("checkpoints/step_*"))
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (*last.glob("*.safetensors"), last / "training_state.json", *root.glob("shards/*/*.tar"))
    }
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database:
        rows = database.execute("SELECT key, step, value FROM metrics ORDER BY key, step, timestamp").fetchall()
        status = database.execute("SELECT status FROM runs").fetchall()
        versions = database.execute("SELECT version FROM model_versions").fetchall()
    figures = [row for row in rows if not row[0].startswith(TIMINGS)]
    doubled = [key for key, count in Counter((key, step) for key, step, _ in rows).items() if count > 1]
    evaluation = json.loads(next(run.glob("evaluation/*/evaluation.json")).read_text())
    return digests | {
        "step": last.name,
        "metrics in MLflow": hashlib.sha256(json.dumps(figures).encode()).hexdigest(),
        "one value a step in MLflow": str(doubled),
        "status in MLflow": str(status),
        "registered versions": str(versions),
        "alias": json.loads((run / "promotion.json").read_text())["alias"],
        "evaluation": json.dumps([row["psnr"] for row in evaluation["images"]]),
    }


def faults_of(database: Path, steps: int) -> list[str]:
    """What is wrong with a finished run in MLflow's database, a sentence each, with no other run to compare it with.

    There is one run, it is FINISHED, no metric has two values for a step, and those of training have one for each.
    """
    with contextlib.closing(sqlite3.connect(database)) as opened:
        points = opened.execute("SELECT key, step FROM metrics").fetchall()
        statuses = [status for (status,) in opened.execute("SELECT status FROM runs")]
    faults = [] if statuses == ["FINISHED"] else [f"MLflow has runs that are {statuses}, and not one, FINISHED."]
    doubled = sorted(point for point, count in Counter(points).items() if count > 1)
    faults += [f"MLflow has more than one value of {key} for step {step}." for key, step in doubled]
    reached: dict[str, set[int]] = {"train/loss": set()}
    for key, step in points:
        reached.setdefault(key, set()).add(step)
    for key in sorted(key for key in reached if key.startswith("train/")):
        if reached[key] != set(range(1, steps + 1)):
            faults.append(f"MLflow has {key} of {len(reached[key])} steps, and not of each up to {steps}.")
    return faults


def report_of(
    kills: Sequence[Kill], endings: Sequence[Ending], wanted: int, interval: int, seed: int, seconds: float
) -> dict[str, Any]:
    """All that a campaign has found, as JSON; it is passed where `failures` is empty.

    Args:
        wanted: kills that were asked for.
        interval: steps between checkpoints, the most that may be done again.
    """
    identical = {ending.run for ending in endings if ending.is_identical}
    return {
        "seed": seed,
        "seconds": round(seconds),
        "kills": len(kills),
        "runs": len(endings),
        "identical": len(identical),
        "orphans": sum(kill.orphans for kill in kills),
        "checkpoint_interval": interval,
        "victims": Counter(kill.victim for kill in kills),
        "stages": {stage: _row([kill for kill in kills if kill.stage == stage], identical) for stage in STAGES},
        "failures": failures_of(kills, endings, wanted, interval),
        "each_run": [asdict(ending) for ending in endings],
        "each_kill": [asdict(kill) for kill in kills],
    }


def _row(kills: Sequence[Kill], identical: set[str]) -> dict[str, Any]:
    recoveries = [kill.recovery for kill in kills if kill.recovery is not None]
    return {
        "kills": len(kills),
        "resumed": sum(kill.resumed for kill in kills),
        "identical": sum(kill.run in identical for kill in kills),
        "most_steps_redone": max((kill.redone or 0 for kill in kills), default=0),
        "longest_recovery": round(max(recoveries), 1) if recoveries else None,
    }


def failures_of(kills: Sequence[Kill], endings: Sequence[Ending], wanted: int, interval: int) -> list[str]:
    """Why a campaign is not passed, a sentence each."""
    found = [f"Only {len(kills)} of {wanted} kills were done."] if len(kills) < wanted else []
    for ending in endings:
        if ending.failure:
            found.append(f"{ending.run} did not come to its end: {ending.failure}. Its log is {ending.log}.")
        if ending.differing:
            found.append(f"{ending.run} ended otherwise than the run left alone: {', '.join(ending.differing)}.")
        found += [f"{ending.run}: {fault}" for fault in ending.faults]
    for kill in kills:
        what = f"{kill.run}, killed in the stage '{kill.stage}' ({kill.victim}),"
        if not kill.resumed:
            found.append(f"{what} was not resumed.")
        if kill.redone is not None and kill.redone > interval:
            found.append(f"{what} did {kill.redone} steps again; the checkpoint interval is {interval}.")
        if kill.orphans:
            found.append(f"{what} left {kill.orphans} processes alive.")
    return found


def table(report: dict[str, Any]) -> str:
    """The report's stages, a line each, what they come to, and every failure."""
    lines = [f"{'killed in':14}{'kills':>6}{'resumed':>9}{'identical':>11}{'steps redone':>14}{'longest recovery':>18}"]
    for stage, row in report["stages"].items():
        recovery = f"{row['longest_recovery']} s" if row["longest_recovery"] is not None else "-"
        lines.append(
            f"{stage:14}{row['kills']:6}{row['resumed']:9}{row['identical']:11}{row['most_steps_redone']:14}{recovery:>18}"
        )
    lines.append(
        f"{report['kills']} kills over {report['runs']} runs in {report['seconds'] / 60:.0f} min: "
        f"{report['identical']} runs ended identical to the undisturbed one, {report['orphans']} processes were left."
    )
    return "\n".join([*lines, *(f"FAILED: {failure}" for failure in report["failures"])])
