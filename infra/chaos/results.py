"""What the runs of a campaign end with, compared, and the campaign's report."""

import contextlib
import hashlib
import json
import sqlite3
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TIMINGS = ("train/images_per_second", "train/data_wait_fraction", "system/")


@dataclass(frozen=True)
class Kill:
    """One kill, and how the run came back from it.

    Attributes:
        stage: the first that was not done.
        victim: one of VICTIMS; the whole command where nobody of that kind was alive.
        redone: steps between the newest checkpoint and the journal's end.
        recovery: seconds from the resuming command to the first new step; None where no training was left to resume.
        orphans: processes that were alive `GONE_SECONDS` after it.
    """

    run: str
    stage: str
    victim: str
    after: float
    redone: int
    recovery: float | None
    orphans: int


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


def report_of(kills: list[Kill], differing: dict[str, list[str]], seed: int, seconds: float) -> dict[str, Any]:
    stages = {}
    for stage in ("start", "shards", "training", "evaluation", "registration", "end"):
        of_stage = [kill for kill in kills if kill.stage == stage]
        recoveries = [kill.recovery for kill in of_stage if kill.recovery is not None]
        stages[stage] = {
            "kills": len(of_stage),
            "resumed": len(of_stage),  # a run that does not resume ends the campaign
            "most_steps_redone": max((kill.redone for kill in of_stage), default=0),
            "longest_recovery": round(max(recoveries), 1) if recoveries else None,
        }
    return {
        "seed": seed,
        "seconds": round(seconds),
        "kills": len(kills),
        "runs": len(differing),
        "identical": sum(not each for each in differing.values()),
        "orphans": sum(kill.orphans for kill in kills),
        "victims": Counter(kill.victim for kill in kills),
        "stages": stages,
        "differing": {name: each for name, each in differing.items() if each},
        "each_kill": [asdict(kill) for kill in kills],
    }


def table(report: dict[str, Any]) -> str:
    lines = [f"{'killed in':14}{'kills':>6}{'resumed':>9}{'steps redone':>14}{'longest recovery':>18}"]
    for stage, row in report["stages"].items():
        recovery = f"{row['longest_recovery']} s" if row["longest_recovery"] is not None else "-"
        lines += [f"{stage:14}{row['kills']:6}{row['resumed']:9}{row['most_steps_redone']:14}{recovery:>18}"]
    lines += [
        f"{report['kills']} kills over {report['runs']} runs in {report['seconds'] / 60:.0f} min: "
        f"{report['identical']} ended identical to the undisturbed one, {report['orphans']} processes were left."
    ]
    return "\n".join(lines)
