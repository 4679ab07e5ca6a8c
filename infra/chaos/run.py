"""Kills complete small runs at random moments, resumes them, and compares what they end with: `make chaos`.

One run is left alone. Every other one, under a root of its own, is killed (SIGKILL) up to `KILLS_A_RUN` times, at
random times over all its stages, and resumed with `codecmill resume` until it is done. Then its shards, weights,
optimiser moments, MLflow metrics and test results must be those of the run that was left alone.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PROJECT = Path(__file__).parents[2]
KILLS_A_RUN = 4
GONE_SECONDS = 30.0
MARK = "CODECMILL_CHAOS"
TIMINGS = ("train/images_per_second", "train/data_wait_fraction", "system/")
VICTIMS = {"everything": 6, "the command": 2, "torchrun": 1, "one rank": 1, "a shard worker": 1}
"""Who is killed, and how often in comparison."""


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="how many [40]")
    parser.add_argument("--seed", type=int, default=0, help="of the times and the victims [0]")
    parser.add_argument("--root", type=Path, default=Path("codecmill-data/chaos"), help="folder [codecmill-data/chaos]")
    arguments = parser.parse_args()
    folder = arguments.root.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    _make_pictures(folder / "pictures")
    begun = time.monotonic()
    alone, seconds = _undisturbed(folder)
    print(f"Left alone, a run takes {seconds:.0f} s.", flush=True)
    chance = random.Random(arguments.seed)  # noqa: S311  # no secret
    kills: list[Kill] = []
    differing: dict[str, list[str]] = {}
    while len(kills) < arguments.kills:
        name = f"run-{len(differing) + 1:03d}"
        wanted = min(KILLS_A_RUN, arguments.kills - len(kills))
        kills += _disturbed(folder, name, wanted, seconds, chance)
        found = _result(folder / name, name)
        differing[name] = [what for what in alone if alone[what] != found.get(what)]
        print(f"{name}: {'differs: ' + ', '.join(differing[name]) if differing[name] else 'identical'}", flush=True)
    report = _report(kills, differing, arguments.seed, time.monotonic() - begun)
    (folder / "chaos.json").write_text(json.dumps(report, indent=2) + "\n")
    print(_table(report))
    print(f"All of it: {folder / 'chaos.json'}")
    return 0 if report["identical"] == report["runs"] and not report["orphans"] else 1


def _make_pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(24):
        noise = np.random.Generator(np.random.Philox(number))
        y, x = np.mgrid[0:144, 0:160] / noise.uniform(10, 60)
        planes = [128 + 90 * np.sin(x * noise.uniform(0.5, 3) + y * noise.uniform(0.5, 3)) for _ in range(3)]
        pixels = np.stack(planes, axis=-1) + noise.normal(0, 5, (144, 160, 3))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{number:02d}.png")


def _command(folder: Path, name: str, resumes: bool) -> list[str]:
    if resumes:
        return [sys.executable, "-m", "flows", "resume", name, "--root", str(folder / name)]
    flags = {
        "name": name,
        "root": folder / name,
        "data.images": folder / "pictures",
        "data.patch_size": 64,
        "model.channels": 16,
        "training.steps": 400,
        "training.batch_size": 8,
        "training.crop_size": 32,
        "training.processes": 2,
        "training.precision": "float32",
        "training.checkpoint_interval": 25,
        "training.validation_interval": 50,
        "training.keep_latest": 2,
    }
    return [sys.executable, "-m", "flows", "run", *(f"--{flag}={value}" for flag, value in flags.items())]


def _start(folder: Path, name: str, resumes: bool) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT", "MLFLOW"))}
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            _command(folder, name, resumes),
            cwd=PROJECT,
            env=environment | {MARK: f"{folder}/{name}"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _undisturbed(folder: Path) -> tuple[dict[str, str], float]:
    begun = time.monotonic()
    process = _start(folder, "alone", resumes=False)
    if process.wait() != 0:
        raise SystemExit(f"The run that is left alone failed: {folder / 'alone.log'}")
    return _result(folder / "alone", "alone"), time.monotonic() - begun


def _disturbed(folder: Path, name: str, wanted: int, usual: float, chance: random.Random) -> list[Kill]:
    """Run to the end with some kills on the way; those that come after the end are not counted."""
    kills: list[Kill] = []
    pending: dict[str, Any] | None = None
    while True:
        run = folder / name / "runs" / name
        started = time.monotonic()
        known = _last_step(run)
        process = _start(folder, name, resumes=(run / "config.json").is_file())
        kill_at = started + chance.uniform(0, usual) if len(kills) + (pending is not None) < wanted else None
        first_step = None
        while process.poll() is None and (kill_at is None or time.monotonic() < kill_at):
            if first_step is None and _last_step(run) > known:
                first_step = time.monotonic() - started
            time.sleep(0.05)
        if pending is not None:
            kills.append(Kill(**pending, recovery=first_step))
            pending = None
        if process.poll() is None:
            pending = _kill(folder, name, process, chance, time.monotonic() - started)
        elif process.returncode == 0:
            return kills
        else:
            raise SystemExit(f"{name} failed by itself, exit code {process.returncode}: {folder / f'{name}.log'}")


def _kill(
    folder: Path, name: str, process: subprocess.Popen[bytes], chance: random.Random, after: float
) -> dict[str, Any]:
    run = folder / name / "runs" / name
    victim, victims = _chosen(f"{folder}/{name}", process.pid, chance)
    stage = _stage(run)
    for each in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    if victim in ("torchrun", "one rank", "a shard worker"):
        process.wait()  # it may go on by itself, which is what a retry is for, or end with an error
    process.wait()
    deadline = time.monotonic() + GONE_SECONDS
    while (left := _marked(f"{folder}/{name}")) and time.monotonic() < deadline:
        time.sleep(0.1)
    checkpoints = [
        int(each.name[5:]) for each in run.glob("checkpoints/step_*") if (each / "checkpoint.json").is_file()
    ]
    redone = _last_step(run) - max(checkpoints, default=0)
    about = {"run": name, "stage": stage, "victim": victim, "after": round(after, 2)}
    return about | {"redone": redone, "orphans": len(left)}


def _chosen(mark: str, command: int, chance: random.Random) -> tuple[str, list[int]]:
    """Who is to be killed: a kind of process, and its process ids."""
    alive = _marked(mark)
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


def _marked(mark: str) -> dict[int, str]:
    """The command lines of all living processes that a run's commands have started, by process id."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def _stage(run: Path) -> str:
    if not (run / "shard_set.json").is_file():
        return "shards" if (run / "config.json").is_file() else "start"
    if _last_step(run) < 400:
        return "training"
    if not list(run.glob("evaluation/*/evaluation.json")):
        return "evaluation"
    return "end" if (run / "promotion.json").is_file() else "registration"


def _last_step(run: Path) -> int:
    with contextlib.suppress(OSError):
        lines = (run / "metrics.jsonl").read_bytes().splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                return int(json.loads(line)["step"])
    return 0


def _result(root: Path, name: str) -> dict[str, str]:
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


def _report(kills: list[Kill], differing: dict[str, list[str]], seed: int, seconds: float) -> dict[str, Any]:
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


def _table(report: dict[str, Any]) -> str:
    lines = [f"{'killed in':14}{'kills':>6}{'resumed':>9}{'steps redone':>14}{'longest recovery':>18}"]
    for stage, row in report["stages"].items():
        recovery = f"{row['longest_recovery']} s" if row["longest_recovery"] is not None else "-"
        lines += [f"{stage:14}{row['kills']:6}{row['resumed']:9}{row['most_steps_redone']:14}{recovery:>18}"]
    lines += [
        f"{report['kills']} kills over {report['runs']} runs in {report['seconds'] / 60:.0f} min: "
        f"{report['identical']} ended identical to the undisturbed one, {report['orphans']} processes were left."
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
