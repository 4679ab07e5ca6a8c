"""Measures how long it takes to open what has grown large."""

import shutil

from infra.bench.results import Column, Group
from infra.bench.workplace import OURS, Workplace
from infra.chaos.small_runs import make_pictures

SHARDS, CHECKPOINTS = 10_000, 1_000

TEXT = f"""A shard set of {SHARDS:,} shards is opened, with a look at the size of each file, and the newest of
{CHECKPOINTS:,} checkpoints is found and verified: what a resumed training does before its first step, imports apart."""


def measure_opening(place: Workplace) -> Group:
    pictures = place.work / "few-pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    make_pictures(pictures)
    program = place.of_ours(OURS, "open_many", images=str(pictures), shards=SHARDS, checkpoints=CHECKPOINTS)
    rounds = place.measured("opening", [program], place.scale.rounds)
    group = Group("Opening", TEXT)
    latest = Column("the newest checkpoint, s", lambda each: each.more["latest_seconds"])
    group.add(rounds, [Column("the shard set, s", lambda each: each.seconds), latest])
    group.figure("opening_10000_shards_seconds", [each.seconds for each in rounds.of(OURS)])
    group.figure("latest_of_1000_checkpoints_seconds", [each.more["latest_seconds"] for each in rounds.of(OURS)])
    return group
