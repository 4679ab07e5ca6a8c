"""Writes what was measured: `latest.md` to read, `latest.json` with every figure and every round."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from infra.bench.results import Group
from infra.bench.rounds import MOST_DISTURBED, Rounds
from infra.bench.scale import Scale

INTRODUCTION = f"""Each contender is a process of its own, which is asked for one round after another, all
contenders in turn. Medians, and in brackets the lowest and the highest of the rounds; ratios are taken round by
round. Compare ratios: seconds are those of this machine. CPU time is that of all processes of a contender, memory
the peak of their proportional set size. Rounds in which others took more than {MOST_DISTURBED:.0%} of the machine's
CPU are done again, a limited number of times."""


@dataclass(frozen=True)
class Circumstances:
    """When, on what, and of which versions."""

    begun: datetime
    minutes: float
    scale: Scale
    machine: dict[str, str]
    versions: dict[str, dict[str, str]]


def figures_of(groups: Sequence[Group]) -> dict[str, float]:
    """The medians of all figures, by name."""
    return {name: spread.median for group in groups for name, spread in group.figures.items()}


def write_report(folder: Path, about: Circumstances, groups: Sequence[Group]) -> None:
    """Write both files; what was measured before an interruption is whole in itself, so it may be called often."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latest.md").write_text(_markdown(about, groups))
    (folder / "latest.json").write_text(json.dumps(_values(about, groups), indent=2) + "\n")


def _markdown(about: Circumstances, groups: Sequence[Group]) -> str:
    parts = [
        "# codecmill beside its peers",
        f"{about.begun:%Y-%m-%d %H:%M} UTC, scale '{about.scale.name}', {about.minutes:.0f} minutes. "
        + ", ".join(f"{name} {value}" for name, value in about.machine.items()),
        INTRODUCTION,
        *(group.markdown() for group in groups),
        "## Versions",
        "\n".join(
            f"* {whose} environment: {', '.join(f'{name} {version}' for name, version in found.items())}"
            for whose, found in about.versions.items()
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _values(about: Circumstances, groups: Sequence[Group]) -> dict[str, Any]:
    """The figures on top, since others look for them there; below them, how they came about."""
    spreads = {name: asdict(spread) for group in groups for name, spread in group.figures.items()}
    return figures_of(groups) | {
        "about": {
            "begun": about.begun.isoformat(timespec="seconds"),
            "minutes": round(about.minutes, 1),
            "scale": asdict(about.scale),
            "machine": about.machine,
            "versions": about.versions,
        },
        "spreads": spreads,
        "groups": {group.title: [_rounds(rounds) for rounds in group.rounds] for group in groups},
    }


def _rounds(rounds: Rounds) -> dict[str, Any]:
    return {
        "others": [round(each.disturbance, 4) for each in rounds.kept],
        "others_in_those_left_out": [round(share, 4) for share in rounds.left_out],
        "loop_seconds": [round(seconds, 4) for seconds in rounds.loops],
        "measurements": {
            name: [asdict(measurement) for measurement in rounds.of(name)] for name in rounds.kept[0].by_name
        },
    }
