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

import numpy as np
from PIL import Image

from infra.chaos.results import Kill, report_of, result_of, table

PROJECT = Path(__file__).parents[2]
KILLS_A_RUN = 4
GONE_SECONDS = 30.0
MARK = "CODECMILL_CHAOS"
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
        found = result_of(folder / name, name)
        differing[name] = [what for what in alone if alone[what] != found.get(what)]
        print(f"{name}: {'differs: ' + ', '.join(differing[name]) if differing[name] else 'identical'}", flush=True)
    report = report_of(kills, differing, arguments.seed, time.monotonic() - begun)
    (folder / "chaos.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
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
    return result_of(folder / "alone", "alone"), time.monotonic() - begun


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


if __name__ == "__main__":
    sys.exit(main())
