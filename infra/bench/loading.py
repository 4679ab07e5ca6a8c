"""Measures loading: codecmill and its peers decode, crop, mirror and normalise the same PNG files, on two cores."""

from dataclasses import dataclass
from pathlib import Path

from infra.bench.programs.create_codecmill import config_of
from infra.bench.results import CPU, MEMORY, SPEED, Column, Group, Spread, cpu_milliseconds, memory
from infra.bench.rounds import Rounds, started
from infra.bench.workplace import OURS, Workplace
from pipelines.data.shard_set import ShardSet
from pipelines.data.shards import create_shards

WORKERS = 2
SMALL = 400
"""Patches of the set that is trained on."""
PEERS = {
    "webdataset WebLoader": "load_webdataset",
    "ImageFolder, DataLoader": "load_imagefolder",
    "MosaicML StreamingDataset": "load_mosaicml",
    "litdata StreamingDataLoader": "load_litdata",
}
FIRST = Column("first batch, s", lambda each: each.more.get("first_batch_seconds"))

TEXT = """PNG patches of 256 pixels, the same bytes for all: a random crop of 128, mirrored both ways at random,
normalised float32, batches of 32; {patches} patches a round, after 8 batches of warming up. Two workers each:
threads in codecmill, processes in the peers. codecmill's order, crops and checksums are those that a resumed run
has again."""


@dataclass(frozen=True)
class Stored:
    """The patches that are loaded: codecmill's shard set, their PNG files, and the peers' formats.

    Attributes:
        small_set: a shard set for trainings, of few patches, so that all of them come soon.
    """

    shard_set: Path
    small_set: Path
    samples: str
    formats: str


def store(place: Workplace) -> Stored:
    """Cut the patches once, and give the peers the same bytes, each in its own format. Not measured."""
    print(f"Storing {place.scale.patches} patches in everybody's format", flush=True)
    place.work.mkdir(parents=True, exist_ok=True)
    shard_set = cut(place, place.scale.patches)
    small_set = cut(place, min(place.scale.patches, SMALL))
    stored = Stored(shard_set.path, small_set.path, str(place.work / "samples"), str(place.work / "formats"))
    _write_files(shard_set, Path(stored.samples))
    parameters = {"samples": stored.samples, "formats": stored.formats, "copies": place.scale.copies}
    program = place.of_peers("the peers' formats", "write_samples", **parameters)
    with started([program], place.folder / "logs") as (writer,):
        writer.measure(0)
    return stored


def cut(place: Workplace, patches: int) -> ShardSet:
    """codecmill's shard set of at least so many patches."""
    listed = place.work / f"{patches}.txt"
    listed.write_text("".join(f"{file}\n" for file in place.sheets(patches)))
    return create_shards(config_of(place.work / "root", listed, place.cores))


def _write_files(shard_set: ShardSet, folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, sample in enumerate(shard_set.samples("train")):
        (folder / f"{number:06d}.png").write_bytes(sample.image)


def measure_loading(place: Workplace, stored: Stored) -> Group:
    common = {"workers": WORKERS, "patches": place.scale.loaded}
    programs = [place.of_ours(OURS, "load_codecmill", shard_set=str(stored.shard_set), **common)]
    programs += [place.of_peers(name, module, formats=stored.formats, **common) for name, module in PEERS.items()]
    rounds = place.measured("loading", programs, place.scale.rounds)
    group = Group("Loading", TEXT.format(patches=place.scale.loaded))
    group.add(rounds, [SPEED, CPU, MEMORY, FIRST])
    best = _best(rounds)
    group.text += f" The best peer in CPU time is {best}."
    group.figure("loading_cpu_over_best_peer", rounds.ratios(OURS, best, cpu_milliseconds))
    smallest = min(PEERS, key=lambda name: Spread.of(rounds.values(name, memory)).median)
    group.figure("loading_memory_over_smallest_peer", rounds.ratios(OURS, smallest, memory))
    group.figure("loading_first_batch_seconds", [each.more["first_batch_seconds"] for each in rounds.of(OURS)])
    return group


def _best(rounds: Rounds) -> str:
    """The peer with the least CPU time a patch, by its median."""
    return min(PEERS, key=lambda name: Spread.of(rounds.values(name, cpu_milliseconds)).median)
