"""A real training of codecmill, torchrun and all, and how fast its journal says that it went."""

import os
import statistics
import threading
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from infra.bench.process_tree import Stretch
from infra.bench.programs.serving import Measure, Parameters, empty_folder, figures, serve
from infra.bench.programs.small_run import on_cpu
from pipelines.config import RunConfig
from pipelines.data.shard_set import ShardSet
from pipelines.durable_files import write_json
from pipelines.run_directory import Root, RunDirectory
from pipelines.training import launch
from pipelines.training.journal import read
from pipelines.training.machine import resolve

DATA_SHARES = ("data_wait", "decoding")
"""Shares of a step's time, of those that the journal has."""

DEFAULT = RunConfig().training
"""Its intervals are those over which the time of a checkpoint and of a check of the replicas is spread."""


def prepare(parameters: Parameters) -> Measure:
    """Parameters: `shard_set`; `data` and `training`, as in a config; `skipped` first steps; `copies` trained at once.

    Copies are pinned to a core each, the first to the first, and what they reach is what they reach together.
    """
    shard_set = ShardSet.open(Path(parameters["shard_set"]))

    def measure(number: int) -> dict[str, Any]:
        with empty_folder(parameters["folder"]) as folder, Stretch() as stretch:
            trainings = [begun(folder, f"bench-{copy}", shard_set, parameters) for copy in range(parameters["copies"])]
            _train_at_once(trainings, pinned=parameters["copies"] > 1)
            stepping = [_stepping(run, parameters["skipped"]) for run in trainings]
            speed, stall = _speeds(stepping)
            lines = [line for run in trainings for line in _counted(run, parameters)]
        shares = {
            name: statistics.fmean(line.get(f"train/{name}_fraction", 0) for line in lines) for name in DATA_SHARES
        }
        more = {**shares, "checkpoint_stall": stall}
        if len(trainings) > 1:
            more["in_step"] = _in_step(stepping)
        images = parameters["copies"] * parameters["training"]["steps"] * parameters["training"]["batch_size"]
        return figures(stretch, images, images_per_second=speed, **more)

    return measure


def begun(folder: Path, name: str, shard_set: ShardSet, parameters: Parameters) -> RunDirectory:
    """A run that is ready to train, with the `data`, `training` and, if any, `model` and `seed` of the parameters."""
    run = Root(folder).run(name)
    sections = {
        section: parameters[section] for section in ("data", "training", "model", "seed") if section in parameters
    }
    run.write_config(resolve(RunConfig.model_validate(on_cpu({"name": name, "root": str(folder), **sections}))))
    write_json(run.shard_set_file, {"fingerprint": shard_set.fingerprint, "path": str(shard_set.path)})
    return run


def _train_at_once(runs: list[RunDirectory], pinned: bool) -> None:
    """Train all of them, each from a thread of its own, whose cores are those of the ranks that it starts."""
    failures: list[BaseException] = []

    def train(run: RunDirectory, core: int) -> None:
        try:
            if pinned:
                os.sched_setaffinity(0, {core})
            with run.locked() as lock:
                launch.train(run, lock, on_line=lambda line: None)
        except BaseException as error:
            failures.append(error)

    cores = sorted(os.sched_getaffinity(0))
    threads = [threading.Thread(target=train, args=(run, cores[place % len(cores)])) for place, run in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@dataclass(frozen=True)
class Stepping:
    """When the steps of a training ended, in seconds since 1970, without the first ones.

    Attributes:
        interval: steps from checkpoint to checkpoint.
    """

    times: dict[int, float]
    interval: int
    batch: int

    def durations(self) -> list[float]:
        """Seconds of each step, one after the other, but for those that a checkpoint makes longer."""
        return [self.times[b] - self.times[a] for a, b in pairwise(sorted(self.times)) if a % self.interval]

    def seconds(self, begin: float, end: float) -> tuple[float, float]:
        """Seconds of a step between two times, with what checkpoints add at the default interval; and that alone.

        A step's line is written before its checkpoint, and after the check of the replicas that comes with it.
        """
        plain, checking, saving = [], [], []
        for a, b in pairwise(sorted(self.times)):
            if self.times[a] >= begin and self.times[b] <= end:
                kind = saving if a % self.interval == 0 else checking if b % self.interval == 0 else plain
                kind.append(self.times[b] - self.times[a])
        usual = statistics.fmean(plain)
        stall = _excess(saving, plain) / DEFAULT.checkpoint_interval
        return usual + stall + _excess(checking, plain) / DEFAULT.replica_check_interval, stall


def _excess(some: list[float], usual: list[float]) -> float:
    return max(0.0, statistics.fmean(some) - statistics.median(usual)) if some else 0.0


def _counted(run: RunDirectory, parameters: Parameters) -> list[dict[str, Any]]:
    return [line for line in read(run.journal) if line["step"] > parameters["skipped"]]


def _stepping(run: RunDirectory, skipped: int) -> Stepping:
    training = run.read_config().training
    times = {line["step"]: line["time"] for line in read(run.journal) if line["step"] >= skipped}
    return Stepping(times, training.checkpoint_interval, training.batch_size)


def _speeds(trainings: list[Stepping]) -> tuple[float, float]:
    """Images a second of all together, while all of them were at work; and the share of the time of checkpoints."""
    begin = max(min(each.times.values()) for each in trainings)
    end = min(max(each.times.values()) for each in trainings)
    found = [(each.batch, *each.seconds(begin, end)) for each in trainings]
    return sum(batch / step for batch, step, _ in found), statistics.fmean(stall / step for _, step, stall in found)


def _in_step(trainings: list[Stepping]) -> float:
    """Images a second of all together if each waited for the slowest at every step, and for nothing else."""
    longest = [max(several) for several in zip(*(each.durations() for each in trainings), strict=False)]
    return sum(each.batch for each in trainings) / statistics.fmean(longest)


if __name__ == "__main__":
    serve(prepare)
