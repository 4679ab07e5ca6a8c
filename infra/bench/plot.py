"""Curves over two logarithmic axes as an SVG drawing that stands alone, readable on light and dark pages."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from pipelines.evaluation.curve_chart import moved_apart

WIDTH, HEIGHT = 780, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 260, 40, 52
COLOURS = ("#0b6bcb", "#c2410c", "#15803d", "#7c3aed", "#be185d", "#525252")
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.title{font-weight:600}.rule{stroke:#ddd}"
    "polyline{fill:none;stroke-width:2}"
)
MARKS = (1, 2, 5)
APART = 17
"""Pixels between two names, at least."""

Points = Sequence[tuple[float, float]]


def chart(title: str, curves: Mapping[str, Points], across: str, up: str) -> str:
    """One line a curve with a dot for each of its points, all of them positive, and its name at its end.

    Args:
        across, up: labels of the axes.
    """
    if not any(curves.values()):
        raise ValueError(f"There is no point to draw in '{title}'.")
    x = _Axis([point[0] for points in curves.values() for point in points], LEFT, WIDTH - RIGHT)
    y = _Axis([point[1] for points in curves.values() for point in points], HEIGHT - BOTTOM, TOP)
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/><style>{STYLE}</style>']
    parts += [_line(x.at(value), TOP, x.at(value), HEIGHT - BOTTOM) for value in x.marks()]
    parts += [_text(x.at(value), HEIGHT - BOTTOM + 18, f"{value:g}", "middle") for value in x.marks()]
    parts += [_line(LEFT, y.at(value), WIDTH - RIGHT, y.at(value)) for value in y.marks()]
    parts += [_text(LEFT - 8, y.at(value) + 4, f"{value:g}", "end") for value in y.marks()]
    for number, points in enumerate(curves.values()):
        parts.append(_curve(COLOURS[number % len(COLOURS)], [(x.at(a), y.at(b)) for a, b in points]))
    parts += _names({name: y.at(points[-1][1]) for name, points in curves.items()})
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, across, "middle"))
    parts.append(f'<text class="title" x="12" y="22">{escape(title)}: {escape(up)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return f'{head} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>\n'


class _Axis:
    """Values to places by their logarithms, from one end of the marks to the other."""

    def __init__(self, values: Sequence[float], begin: float, end: float):
        self._low, self._high = _mark_below(min(values)), _mark_above(max(values))
        self._begin, self._end = begin, end

    def at(self, value: float) -> float:
        share = math.log(value / self._low) / math.log(self._high / self._low)
        return self._begin + share * (self._end - self._begin)

    def marks(self) -> list[float]:
        """1, 2 and 5 of each power of ten; only 1 where these would be many."""
        lowest, highest = math.floor(math.log10(self._low)), math.ceil(math.log10(self._high))
        factors = MARKS if highest - lowest < 4 else (1,)
        found = [factor * 10.0**power for power in range(lowest, highest + 1) for factor in factors]
        return [value for value in found if self._low * 0.999 <= value <= self._high * 1.001]


def _mark_below(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return max(factor * power for factor in MARKS if factor * power <= value * 1.001)


def _mark_above(value: float) -> float:
    """Above `value` itself, so that an axis is never empty."""
    power = 10.0 ** math.floor(math.log10(value))
    return min(factor * power for factor in (*MARKS, 10) if factor * power > value * 1.001)


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="rule" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _curve(colour: str, places: Sequence[tuple[float, float]]) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in places)
    return f'<polyline points="{path}" stroke="{colour}"/><g fill="{colour}">{dots}</g>'


def _names(ends: Mapping[str, float]) -> list[str]:
    """Each curve's name at its end, in its colour, moved apart where they would lie on each other."""
    found = []
    for number, name, y in moved_apart(ends, APART):
        colour = COLOURS[number % len(COLOURS)]
        found.append(f'<text x="{WIDTH - RIGHT + 10}" y="{y + 4:.1f}" style="fill:{colour}">{escape(name)}</text>')
    return found
