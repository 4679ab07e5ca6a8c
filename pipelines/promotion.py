"""Who is champion: a comparison of two evaluations on the same test set, and the sentence that says why."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan, nan
from typing import Literal

from pipelines.config import SMALLEST_MS_SSIM
from pipelines.errors import CodecmillError

UNITS = {"psnr": " dB", "ms_ssim": "", "bd_rate": " %", "bd_rate_ms_ssim": " %"}

BD_RATES = ("bd_rate", "bd_rate_ms_ssim")
"""In percent of JPEG's bits: less is better."""

BY_DECIBELS = {"bd_rate_ms_ssim": "bd_rate_ms_ssim_db"}
"""What scores call a metric whose name they used for another scale, MS-SSIM's own, until 2026-11-27."""

TOO_SMALL = f"no image of the test split has {SMALLEST_MS_SSIM} pixels on its shorter side"
MAY_LACK = {
    "ms_ssim": TOO_SMALL,
    "bd_rate": "its curve and JPEG's have no quality in common",
    "bd_rate_ms_ssim": f"its curve and JPEG's have no quality in common, or {TOO_SMALL}",
}
"""Metrics that an evaluation may end without, and why."""


@dataclass(frozen=True)
class Scores:
    """How a registered version did on a test set.

    Attributes:
        version: its number in the registry.
        metrics: over the test set: `psnr` in dB and `ms_ssim` from 0 to 1, the means, and of codecs `BD_RATES`, named
            as `BY_DECIBELS` says.
        test_set_sha256: which test set.
        curve_images: of how many of its images, at most, `BD_RATES` are; 0 where they were not measured, None where
            that is not known.
    """

    version: int
    metrics: Mapping[str, float]
    test_set_sha256: str
    curve_images: int | None = None

    def are_of(self, test_set_sha256: str, metric: str, curve_images: int) -> bool:
        """Whether the metric is of the same images, or would be if it had a value, and on the scale of today."""
        same_curves = metric not in BD_RATES or self.curve_images == curve_images
        same_scale = metric not in BY_DECIBELS or metric not in self.metrics
        return self.test_set_sha256 == test_set_sha256 and same_curves and same_scale


@dataclass(frozen=True)
class Decision:
    """The alias that a version gets, and why, in one sentence."""

    alias: Literal["champion", "candidate"]
    reason: str


def decide(candidate: Scores, champion: Scores | None, metric: str, margin: float) -> Decision:
    """Whether a version becomes champion: it must be better, and by at least `margin` in the metric's unit.

    Raises:
        CodecmillError: the two were evaluated on different test sets (evaluate the champion on the new one first), or
            one of them has no such metric.
    """
    mine = _value(candidate, metric)
    shown = f"{metric} {mine:.4f}{UNITS.get(metric, '')}"
    if isnan(mine):
        return Decision(
            "candidate", f"Version {candidate.version} has no usable {metric}: {_reason(candidate, metric)}."
        )
    if champion is None:
        return Decision("champion", f"Version {candidate.version} is the first champion, with {shown}.")
    if champion.version == candidate.version:
        return Decision("champion", f"Version {candidate.version} is the champion already, with {shown}.")
    if champion.test_set_sha256 != candidate.test_set_sha256:
        raise CodecmillError(
            f"Version {candidate.version} and champion {champion.version} were evaluated on different test sets "
            f"({candidate.test_set_sha256[:12]} and {champion.test_set_sha256[:12]}). "
            "Evaluate the champion on the new test set first."
        )
    theirs = _value(champion, metric)
    against = f"champion version {champion.version} with {theirs:.4f}{UNITS.get(metric, '')}"
    asked = f"a margin of {margin:g}{UNITS.get(metric, '')}"
    gain = theirs - mine if metric in BD_RATES else mine - theirs
    if isnan(theirs) or (gain > 0 and gain >= margin):
        return Decision("champion", f"Version {candidate.version} with {shown} beats {against}, asked for {asked}.")
    return Decision("candidate", f"Version {candidate.version} with {shown} does not beat {against} by {asked}.")


def _reason(scores: Scores, metric: str) -> str:
    return "it is not a number" if BY_DECIBELS.get(metric, metric) in scores.metrics else MAY_LACK[metric]


def _value(scores: Scores, metric: str) -> float:
    name = BY_DECIBELS.get(metric, metric)
    if metric in MAY_LACK and name not in scores.metrics:
        return nan
    if name not in scores.metrics:
        known = ", ".join(sorted(scores.metrics)) or "none"
        raise CodecmillError(f"Version {scores.version} was not evaluated with {metric}; its metrics: {known}.")
    return scores.metrics[name]
