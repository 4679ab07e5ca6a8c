"""Measures training: the bare step, whole trainings against what step and loader allow, and several ranks."""

from typing import Any

from infra.bench.contender import Measurement, Program
from infra.bench.loading import WORKERS, Stored
from infra.bench.programs.small_run import on_cpu
from infra.bench.results import MEMORY, Column, Group, cpu_milliseconds, images_per_second, per_second
from infra.bench.rounds import Rounds
from infra.bench.workplace import Workplace
from pipelines.config import RunConfig
from pipelines.training.machine import has_compiler, resolve

BATCH, CROP = 32, 128
SKIPPED_BY_RANKS = 5
"""First steps of each of several trainings, or ranks, that are not counted."""

IMAGES = Column("images/s", images_per_second)
CPU = Column("CPU ms/image", lambda each: None if "images_per_second" in each.more else each.cpu_milliseconds)
IN_STEP = Column("images/s in step", lambda each: each.more.get("in_step"))
WAIT = Column("wait for data, % of the step", lambda each: _percent(each, "data_wait"))
DECODING = Column("decoding between steps, %", lambda each: _percent(each, "decoding"))
STALL = Column("checkpoints, % of the time", lambda each: _percent(each, "checkpoint_stall"))

STEP, PLAIN, COMPILED = "default settings", "plain float32, eager", "default settings, compiled"
BARE, LOADER = "bare step", "loader alone"
WHOLE, CACHED = "training", "training with data.decoded_cache"
TWO_RANKS, INDEPENDENT, ONE_RANK = "2 ranks, a core each", "2 trainings, a core each", "1 rank, one core"
VIRTUAL = "2 ranks, a core each, 2 virtual ranks"
ALONE, VIRTUAL_ALONE = "1 rank, one thread, batch 32", "1 rank, one thread, batch 32, 2 virtual ranks"


def _percent(found: Measurement, name: str) -> float | None:
    return 100 * found.more[name] if name in found.more else None


def measure_step(place: Workplace) -> Group:
    """The bare step, as the trainer takes it by default here, against a loop that one would write by hand."""
    programs = [_step(place, STEP, plain=False), _step(place, PLAIN, plain=True)]
    if place.scale.thorough and has_compiler():
        programs.append(_step(place, COMPILED, plain=False, compile=True))
    rounds = place.measured("step", programs, place.scale.rounds)
    chosen = resolve(RunConfig.model_validate(on_cpu({}))).training
    text = (
        f"Forward, backward, clipping and Adam, batches of {BATCH} crops of {CROP} pixels in memory. The default "
        f"settings are here: {chosen.precision}, channels_last {chosen.channels_last}, compile {chosen.compile}, "
        f"{chosen.threads} threads."
    )
    group = Group("The step", text)
    group.add(rounds, [IMAGES, CPU, MEMORY])
    group.figure("step_over_fp32_eager", rounds.ratios(STEP, PLAIN, per_second))
    return group


def _step(place: Workplace, name: str, plain: bool, **training: Any) -> Program:
    chosen = {"batch_size": BATCH, "crop_size": CROP, **training}
    return place.of_ours(name, "step", training=chosen, plain=plain, steps=place.scale.stepped)


PIPELINE_TEXT = """Whole trainings by torchrun, with loading, journal, checks and checkpoints at the default
interval, on all cores, after their first {settled} steps. Attainable is 1 / (1 / bare step + the loader's CPU
seconds an image / cores)."""


def measure_pipeline(place: Workplace, stored: Stored) -> Group:
    small = {"shard_set": str(stored.small_set)}
    loading = {"workers": WORKERS, "patches": place.scale.loaded, "as_levels": True}
    cache = {"decoded_cache": 100_000}
    programs = [
        _step(place, BARE, plain=False),
        place.of_ours(LOADER, "load_codecmill", **small, **loading),
        _training(place, stored, WHOLE),
        _training(place, stored, CACHED, data=cache),
    ]
    rounds = place.measured("pipeline", programs, place.scale.trainings)
    group = Group("The pipeline", PIPELINE_TEXT.format(settled=place.scale.settled))
    group.add(rounds, [IMAGES, CPU, WAIT, DECODING, STALL, MEMORY])
    group.figure("pipeline_over_attainable", _over_attainable(rounds, place.cores))
    group.figure("pipeline_over_bare_step_cached", rounds.ratios(CACHED, BARE, images_per_second))
    group.figure("checkpoint_stall_percent", [100 * each.more["checkpoint_stall"] for each in rounds.of(WHOLE)])
    return group


def _over_attainable(rounds: Rounds, cores: int) -> list[float]:
    found = []
    for bare, loader, whole in zip(rounds.of(BARE), rounds.of(LOADER), rounds.of(WHOLE), strict=True):
        attainable = 1 / (1 / bare.per_second + cpu_milliseconds(loader) / 1000 / cores)
        found.append(images_per_second(whole) / attainable)
    return found


RANKS_TEXT = """Whole trainings with one thread a rank and 16 images a rank and step. Two independent trainings, each
pinned to a core, are what two ranks would reach if they had nothing to tell each other, and `in step`, if of each two
steps the shorter waited for the longer: no gradient of the whole batch is there before."""


def measure_ranks(place: Workplace, stored: Stored) -> Group:
    half = {"batch_size": BATCH // 2}
    two = {"processes": 2}
    programs = [
        _training(place, stored, TWO_RANKS, cores=2, training=two),
        _training(place, stored, INDEPENDENT, copies=2, training=half),
        _training(place, stored, ONE_RANK, cores=1, training=half),
        _training(place, stored, VIRTUAL, cores=2, training=two | {"virtual_ranks": 2}),
    ]
    if place.scale.thorough:
        programs.append(_training(place, stored, ALONE))
        programs.append(_training(place, stored, VIRTUAL_ALONE, training={"virtual_ranks": 2}))
    rounds = place.measured("ranks", programs, place.scale.trainings)
    group = Group("Several ranks", RANKS_TEXT)
    group.add(rounds, [IMAGES, IN_STEP, WAIT, DECODING, MEMORY])
    group.figure("two_ranks_over_two_independent", rounds.ratios(TWO_RANKS, INDEPENDENT, images_per_second))
    in_step = [each.more["in_step"] for each in rounds.of(INDEPENDENT)]
    reached = rounds.values(TWO_RANKS, images_per_second)
    group.figure("two_ranks_over_two_in_step", [a / b for a, b in zip(reached, in_step, strict=True)])
    group.figure("two_ranks_over_one", rounds.ratios(TWO_RANKS, ONE_RANK, images_per_second))
    group.figure("virtual_ranks_over_plain_two_processes", rounds.ratios(VIRTUAL, TWO_RANKS, images_per_second))
    if place.scale.thorough:
        values = rounds.ratios(VIRTUAL_ALONE, ALONE, images_per_second)
        group.figure("virtual_ranks_over_plain_one_process", values)
    return group


def _training(
    place: Workplace,
    stored: Stored,
    name: str,
    copies: int = 1,
    cores: int | None = None,
    data: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
) -> Program:
    """A program that trains; by default one rank, one thread where there are several trainings or ranks."""
    fills_cache = name in (WHOLE, CACHED)
    skipped = place.scale.settled if fills_cache else SKIPPED_BY_RANKS
    chosen: dict[str, Any] = {
        "steps": skipped + place.scale.trained,
        "batch_size": BATCH,
        "crop_size": CROP,
        "processes": 1,
        "checkpoint_interval": max(2, place.scale.trained // 3),
        "keep_latest": 1,
    }
    if not fills_cache:
        chosen["threads"] = 1
    parameters = {"data": {"workers": WORKERS} | (data or {}), "training": chosen | (training or {})}
    common = {"shard_set": str(stored.small_set), "skipped": skipped, "copies": copies}
    return place.of_ours(name, "train", cores=cores, **parameters, **common)
