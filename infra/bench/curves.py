"""Measures how the speed goes with the amount of data: the same with 1, 10 and 100 times as many photographs."""

from infra.bench.loading import WORKERS, cut
from infra.bench.plot import chart
from infra.bench.results import CPU, SPEED, Group, Spread, per_second
from infra.bench.rounds import Rounds
from infra.bench.workplace import OURS, Workplace

SHARD_WRITERS = {"Pillow's default PNG": None, "Pillow level 1": 1}
LABELS = {"creation": "patches a second, one core", "loading": "patches a second, two threads"}

TEXT = """How the speed goes with the number of patches: what costs the same for few patches as for many shows in
the smallest set. One round a point; ShardWriter is webdataset's."""


def measure_curves(place: Workplace) -> Group:
    """Draws `creation.svg` and `loading.svg` in the benchmark's folder, too."""
    group = Group("More data", TEXT)
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {what: {} for what in LABELS}
    for patches in place.scale.curves:
        for what, rounds in (("creation", _creation(place, patches)), ("loading", _loading(place, patches))):
            group.add(rounds, [SPEED, CPU], title=f"{what.capitalize()}, {patches:,} patches")
            for name in rounds.kept[0].by_name:
                speed = Spread.of(rounds.values(name, per_second)).median
                curves[what].setdefault(name, []).append((patches, speed))
    for what, found in curves.items():
        (place.folder / f"{what}.svg").write_text(chart(what.capitalize(), found, "patches", LABELS[what]))
        group.tables.append(f"![{what}: {LABELS[what]}, by the number of patches]({what}.svg)")
    return group


def _creation(place: Workplace, patches: int) -> Rounds:
    files = place.sheets(patches)
    programs = [place.of_ours(OURS, "create_codecmill", cores=1, files=files, workers=1)]
    for name, level in SHARD_WRITERS.items():
        program = place.of_peers(f"ShardWriter, {name}", "create_webdataset", cores=1, files=files, level=level)
        programs.append(program)
    return place.measured(f"creation of {patches} patches", programs, rounds=1)


def _loading(place: Workplace, patches: int) -> Rounds:
    parameters = {"workers": WORKERS, "patches": place.scale.loaded, "shard_set": str(cut(place, patches).path)}
    return place.measured(f"loading of {patches} patches", [place.of_ours(OURS, "load_codecmill", **parameters)], 1)
