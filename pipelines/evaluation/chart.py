"""The distribution of PSNR as an SVG drawing, coloured by the page that it stands in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 34, 70
STRIP = 14
"""Between the bars and the axis: a stroke for each image."""

MOST_STROKES = 2000
"""Of more images every second, third, ... has one: they lie on each other, and a page has to hold them."""


@dataclass(frozen=True)
class _Axis:
    """Values to places, and the marks in between."""

    low: float
    high: float
    step: float
    begin: float
    end: float

    def at(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        count = round((self.high - self.low) / self.step)
        return [self.low + i * self.step for i in range(count + 1)]


def histogram(named: Sequence[tuple[str, float]]) -> str:
    """How many images have which PSNR, with a stroke for each image and the mean marked.

    Args:
        named: at least one image: what to call it, and its PSNR in dB.
    """
    values = [value for _, value in named]
    width = _bin_width(values)
    low = math.floor(min(values) / width) * width
    bins = max(1, math.floor((max(values) - low) / width + 1e-9) + 1)
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / width + 1e-9), bins - 1)] += 1
    every = math.ceil(bins / 6)
    across = _Axis(low, low + bins * width, width, LEFT, WIDTH - RIGHT)
    unit = nice(max(counts) / 4, least=1)
    up = _Axis(0, math.ceil(max(counts) / unit) * unit, unit, HEIGHT - BOTTOM, TOP)
    parts = [
        *_counts(up),
        *(_bar(across, up, low + i * width, width, count) for i, count in enumerate(counts) if count),
        *(_stroke(across, name, value) for name, value in named[:: math.ceil(len(named) / MOST_STROKES)]),
        *(_label(across, tick, width) for tick in across.ticks()[::every]),
        _mean(across, fmean(values)),
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">PSNR in dB</text>',
        f'<text class="axis" x="{LEFT - 40}" y="16">Images</text>',
    ]
    summary = f"Histogram of the PSNR of {len(values)} images, from {min(values):.2f} to {max(values):.2f} dB"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{summary}">{"".join(parts)}</svg>'


def _bin_width(values: Sequence[float]) -> float:
    """1, 2 or 5 times a power of ten, for some more bins than the count's square root."""
    spread = max(values) - min(values)
    return nice(spread / min(24, 4 + 1.5 * math.sqrt(len(values))), least=0.1)


def nice(value: float, least: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is no less than both."""
    value = max(value, least)
    power = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def _counts(up: _Axis) -> list[str]:
    lines = []
    for tick in up.ticks():
        y = up.at(tick)
        lines.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y:.1f}" dy=".35em" text-anchor="end">{tick:g}</text>')
    return lines


def _bar(across: _Axis, up: _Axis, value: float, width: float, count: int) -> str:
    x, y = across.at(value) + 1, up.at(count)
    size = f'width="{across.at(value + width) - x - 1:.1f}" height="{up.at(0) - y:.1f}"'
    images = "1 image" if count == 1 else f"{count} images"
    title = f"<title>{value:.4g} to {value + width:.4g} dB: {images}</title>"
    return f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" {size}>{title}</rect>'


def _stroke(across: _Axis, name: str, value: float) -> str:
    x, y = across.at(value), HEIGHT - BOTTOM
    title = f"<title>{escape(name)}: {value:.2f} dB</title>"
    return f'<line class="stroke" x1="{x:.1f}" x2="{x:.1f}" y1="{y + 3}" y2="{y + STRIP}">{title}</line>'


def _label(across: _Axis, value: float, width: float) -> str:
    places = max(0, -math.floor(math.log10(width) + 1e-9))
    x, y = across.at(value), HEIGHT - BOTTOM + STRIP
    anchor = "end" if x > WIDTH - RIGHT - 1 else "middle"  # at the edge its second half would be cut off
    return f'<text x="{x:.1f}" y="{y + 6}" dy=".9em" text-anchor="{anchor}">{value:.{places}f}</text>'


def _mean(across: _Axis, value: float) -> str:
    x = across.at(value)
    anchor = "start" if x < LEFT + 60 else "end" if x > WIDTH - RIGHT - 60 else "middle"
    text = f'<text class="mean" x="{x:.1f}" y="{TOP - 10}" text-anchor="{anchor}">mean {value:.2f}</text>'
    return f'<line class="mean" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{HEIGHT - BOTTOM}"/>{text}'
