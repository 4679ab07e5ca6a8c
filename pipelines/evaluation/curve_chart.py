"""Rate-distortion curves as an SVG drawing, coloured by the page that it stands in."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from pipelines.evaluation.chart import nice
from pipelines.evaluation.rate_distortion import CurvePoint

WIDTH, HEIGHT = 560, 360
LEFT, RIGHT, TOP, BOTTOM = 52, 96, 30, 48
RATES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Marks of the axis of rates, which is logarithmic: curves of codecs are nearly straight there."""


def curve_chart(curves: Mapping[str, Sequence[CurvePoint]], metric: str, label: str) -> str:
    """One line a codec, with a dot for each setting; the first codec's is the strong one.

    Args:
        metric: a field of `CurvePoint`; points without it are left out.
        label: of its axis.
    """
    lines = {
        codec: [(point.bits_per_pixel, value) for point in points if (value := getattr(point, metric)) is not None]
        for codec, points in curves.items()
    }
    lines = {codec: sorted(points) for codec, points in lines.items() if points}
    if not lines:
        return ""
    rates = [math.log(rate) for points in lines.values() for rate, _ in points]
    values = [value for points in lines.values() for _, value in points]
    left, right = min(rates), max(max(rates), min(rates) + 0.1)
    bottom, top = min(values), max(max(values), min(values) + 1e-3)

    def x(rate: float) -> float:
        return LEFT + (math.log(rate) - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = [_grid_line(x(rate), f"{rate:g}") for rate in RATES if left <= math.log(rate) <= right]
    parts += [_grid_row(y(value), value) for value in _marks(bottom, top)]
    for number, (codec, points) in enumerate(lines.items()):
        parts.append(_curve(number, codec, [(x(rate), y(value)) for rate, value in points]))
    parts += _names({codec: y(points[-1][1]) for codec, points in lines.items()})
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">Bits per pixel</text>')
    parts.append(f'<text class="axis" x="4" y="14">{escape(label)}</text>')
    named = ", ".join(lines)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)} of {named}">{"".join(parts)}</svg>'
    )


def _marks(low: float, high: float) -> list[float]:
    """Round values between two others, four to nine of them."""
    step = nice((high - low) / 8, least=0.01)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _grid_line(x: float, label: str) -> str:
    return (
        f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>'
    )


def _grid_row(y: float, value: float) -> str:
    return (
        f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
    )


def _curve(number: int, codec: str, places: list[tuple[float, float]]) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places)
    return f'<g class="curve curve-{number}"><title>{escape(codec)}</title><polyline points="{path}"/>{dots}</g>'


def _names(ends: Mapping[str, float]) -> list[str]:
    """Each codec's name at the end of its curve, moved apart where they would lie on each other."""
    return [
        f'<text class="curve curve-{number}" x="{WIDTH - RIGHT + 8}" y="{y + 4:.1f}">{escape(codec)}</text>'
        for number, codec, y in moved_apart(ends, 15)
    ]


def moved_apart(ends: Mapping[str, float], least: float) -> Iterator[tuple[int, str, float]]:
    """Number, name and height of each curve's name, from the top on, `least` or more of the drawing's units apart."""
    lowest = -math.inf
    for number, name in sorted(enumerate(ends), key=lambda each: ends[each[1]]):
        lowest = max(ends[name], lowest + least)
        yield number, name, lowest
