"""Measures the making of shards: codecmill and its peers on one core, codecmill on two, and the parts alone."""

from infra.bench.contender import Program
from infra.bench.results import CPU, MEMORY, SPEED, Column, Group, bytes_each, cpu_milliseconds, per_second
from infra.bench.workplace import OURS, Workplace

DEFAULT = "webdataset ShardWriter, Pillow's default PNG"
LEVEL_1 = "webdataset ShardWriter, Pillow level 1"
ONE, TWO = "codecmill, 1 process on 1 core", "codecmill, 2 processes on 2 cores"
SIZE = Column("kB on disk/patch", bytes_each)

TEXT = """Photographs (JPEG, 1.6 megapixels) cut into PNG patches of 256 pixels, {patches} a round; each contender
has one core. codecmill also hashes the sources, keeps statistics and checksums, and syncs to the disk; litdata's
time includes the start of its worker process."""

FLOOR = """The parts alone, on one core and in memory: no contender that uses them can be faster."""


def measure_creation(place: Workplace) -> Group:
    files = place.sheets(place.scale.cut)
    programs = [
        place.of_ours(OURS, "create_codecmill", cores=1, files=files, workers=1),
        place.of_peers(DEFAULT, "create_webdataset", cores=1, files=files, level=None),
        place.of_peers(LEVEL_1, "create_webdataset", cores=1, files=files, level=1),
        place.of_peers("MosaicML MDSWriter", "create_mosaicml", cores=1, files=files),
        place.of_peers("litdata optimize", "create_litdata", cores=1, files=files, workers=1),
    ]
    rounds = place.measured("creation", programs, place.scale.rounds)
    group = Group("Shard creation", TEXT.format(patches=rounds.of(OURS)[0].count))
    group.add(rounds, [SPEED, CPU, SIZE, MEMORY])
    group.figure("creation_per_core_over_webdataset_default", rounds.ratios(OURS, DEFAULT, per_second))
    group.figure("creation_per_core_over_webdataset_level1", rounds.ratios(OURS, LEVEL_1, per_second))
    # By CPU time: waiting for the disk does not count, and others on the machine hardly do.
    group.figure("creation_cpu_over_webdataset_default", rounds.ratios(OURS, DEFAULT, cpu_milliseconds))
    group.figure("creation_cpu_over_webdataset_level1", rounds.ratios(OURS, LEVEL_1, cpu_milliseconds))
    group.figure("bytes_over_pillow_default", rounds.ratios(OURS, DEFAULT, lambda each: bytes_each(each) or 0.0))
    if place.cores > 1:
        _measure_scaling(place, group)
    return group


def _measure_scaling(place: Workplace, group: Group) -> None:
    """One process against two, on more photographs, since processes take a while to start."""
    files = place.sheets(place.scale.scaled)
    programs = [
        place.of_ours(ONE, "create_codecmill", cores=1, files=files, workers=1),
        place.of_ours(TWO, "create_codecmill", cores=2, files=files, workers=2),
    ]
    rounds = place.measured("creation by two", programs, place.scale.trainings)
    group.add(rounds, [SPEED, CPU, MEMORY])
    group.figure("creation_two_processes_over_one", rounds.ratios(TWO, ONE, per_second))


def measure_floor(place: Workplace, samples: str) -> Group:
    """Args:
    samples: a folder of PNG files, codecmill's.
    """
    files = place.sheets(min(place.scale.cut, 96))
    parts = [
        *("open and cut, Pillow", "open, torchvision"),
        *("encode, Pillow's default", "encode, Pillow level 1", "encode, torchvision level 1"),
        *("decode, Pillow", "decode, torchvision", "decode, zlib's inflate alone"),
    ]
    programs: list[Program] = [
        place.of_peers(part, "bare_codec", cores=1, files=files, samples=samples, part=part) for part in parts
    ]
    rounds = place.measured("floor", programs, place.scale.trainings)
    group = Group("The floor", FLOOR)
    group.add(rounds, [Column("ms/patch", lambda each: 1000 / each.per_second), CPU])
    return group
