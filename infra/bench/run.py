"""`make bench` and `make bench-quick`: codecmill beside its peers, in one run that anyone can repeat.

Measures the making of shards, loading, the training step, whole trainings, several ranks, opening and the DAG, each
contender in a process of its own, interleaved, on the CPU also where there are GPUs; writes a report and its figures to
ROOT/bench/latest.md and latest.json. The quick one compares its figures with `expected.toml`, says which fell, and then
ends with 1.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from flows.cli.demo import find_photographs
from infra.bench.codec import measure_codec
from infra.bench.creation import measure_creation, measure_floor
from infra.bench.curves import measure_curves
from infra.bench.dag import measure_dag
from infra.bench.expectations import Expectation, fallen, read_expectations
from infra.bench.loading import measure_loading, store
from infra.bench.machine_facts import all_versions, machine
from infra.bench.opening import measure_opening
from infra.bench.peers_environment import peers_python
from infra.bench.report import Circumstances, figures_of, write_report
from infra.bench.results import Group
from infra.bench.scale import FULL, QUICK, SCALES
from infra.bench.training import measure_pipeline, measure_ranks, measure_step
from infra.bench.workplace import Workplace
from pipelines.data.sources import find_images
from pipelines.errors import CodecmillError, InputError
from pipelines.run_directory import Root

GROUPS = ("creation", "floor", "loading", "step", "pipeline", "ranks", "codec", "opening", "dag", "curves")


def main() -> int:
    arguments = _arguments()
    try:
        # Before minutes of measuring: a mistake in it would end them all the same.
        compares = arguments.scale == QUICK.name and not arguments.only
        expected = read_expectations() if compares else None
        place = _workplace(arguments)
        groups = _measure(place, arguments.only or GROUPS)
    except KeyboardInterrupt:
        print("codecmill bench: interrupted; what was measured by then is in the report", file=sys.stderr)
        return 130
    except CodecmillError as error:
        print(f"codecmill bench: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0 if expected is None else _compared(groups, expected)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default=FULL.name, help=f"how much [{FULL.name}]")
    parser.add_argument("--root", type=Path, default=Path("codecmill-data"), help="folder [codecmill-data]")
    parser.add_argument("--photographs", help="glob, folder or .txt list, instead of those that packages bring along")
    parser.add_argument("--torch-index", help="a wheel index for the peers' torch, as TORCH_INDEX of the Makefile")
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--repeats", type=int, help="rounds of a group to do again where others disturb, at most")
    return parser.parse_args()


def _workplace(arguments: argparse.Namespace) -> Workplace:
    folder = arguments.root.absolute() / "bench"
    if arguments.photographs:
        found = find_images(arguments.photographs, "--photographs", Root(arguments.root))
        photographs = [Path(image.path) for image in found.images]
    else:
        photographs = find_photographs()
    peers = peers_python(folder / "peers-venv", arguments.torch_index)
    scale = SCALES[arguments.scale]
    if arguments.repeats is not None:  # on a machine that is never quiet, they would change nothing
        scale = replace(scale, repeats=arguments.repeats)
    return Workplace(folder, peers, photographs, scale)


def _measure(place: Workplace, wanted: tuple[str, ...]) -> list[Group]:
    """All groups that are wanted; the report is written after each, so that an interruption loses one at most."""
    about = {"begun": datetime.now(UTC), "machine": machine(), "versions": all_versions(place.peers)}
    groups: list[Group] = []
    shutil.rmtree(place.work, ignore_errors=True)
    try:
        place.sheets(max(place.scale.patches, place.scale.cut, place.scale.scaled))
        started = time.monotonic()
        for measure in _wanted(place, wanted):
            groups.append(measure())
            minutes = (time.monotonic() - started) / 60
            write_report(place.folder, Circumstances(minutes=minutes, scale=place.scale, **about), groups)
    finally:
        shutil.rmtree(place.work, ignore_errors=True)
    print(f"\nAll of it: {place.folder / 'latest.md'}, after {(time.monotonic() - started) / 60:.1f} minutes")
    for name, value in figures_of(groups).items():
        print(f"    {name:45} {value:.3g}")
    return groups


def _wanted(place: Workplace, wanted: tuple[str, ...]) -> Iterator[Callable[[], Group]]:
    stored = store(place)
    known: dict[str, Callable[[], Group]] = {
        "creation": lambda: measure_creation(place),
        "floor": lambda: measure_floor(place, stored.samples),
        "loading": lambda: measure_loading(place, stored),
        "step": lambda: measure_step(place),
        "pipeline": lambda: measure_pipeline(place, stored),
        "ranks": lambda: measure_ranks(place, stored),
        "codec": lambda: measure_codec(place, stored),
        "opening": lambda: measure_opening(place),
        "dag": lambda: measure_dag(place),
        "curves": lambda: measure_curves(place),
    }
    for name in GROUPS:
        if name in wanted and not (name == "curves" and not place.scale.curves):
            if name == "ranks" and place.cores < 2:
                print("Several ranks are not measured: there is one core only.", flush=True)
            else:
                yield known[name]


def _compared(groups: list[Group], expected: Mapping[str, Expectation]) -> int:
    sentences = fallen(figures_of(groups), expected)
    for sentence in sentences:
        print(sentence)
    print("Some figures fell." if sentences else "No figure fell behind infra/bench/expected.toml.")
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
