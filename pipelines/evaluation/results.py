"""What an evaluation found, as values and as `evaluation.json`."""

import re
import unicodedata
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from pipelines.config import MOST_STEPS
from pipelines.durable_files import read_json
from pipelines.errors import CodecmillError
from pipelines.evaluation.contents import REPORT, RESULT, TABLE
from pipelines.evaluation.formats import JPEG
from pipelines.evaluation.metrics import LARGEST_PSNR, SMALLEST_SIDE, Decibels, Index, Quality, means
from pipelines.evaluation.pictures import ERROR_FACTOR
from pipelines.evaluation.rate_distortion import Point, RateDistortion

FORMAT_VERSION = 1
SIDE_BY_SIDE = "side_by_side.png"
"""Original, reconstruction and error of an image."""


@dataclass(frozen=True)
class ImageRow:
    """One evaluated picture.

    Attributes:
        name: as it was given.
        width, height: in pixels.
        psnr: in dB, at most `metrics.LARGEST_PSNR`.
        ms_ssim: None where a side is under `metrics.SMALLEST_SIDE` pixels.
        pictures: the folder of its pictures, below the evaluation's; None where none were written.
    """

    name: str
    width: Annotated[int, Field(ge=1)]
    height: Annotated[int, Field(ge=1)]
    psnr: Decibels
    ms_ssim: Index | None
    pictures: Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z-]+$")] | None


@dataclass(frozen=True)
class Broken:
    """A picture that could not be read, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Evaluation:
    """A complete evaluation on disk.

    Attributes:
        folder: where its files are.
        about: what was evaluated and where it comes from: run, step, digests, ...; JSON values.
        parameters: of the model, a count.
        seconds: that the evaluation took.
        images: in the order in which they were given.
        broken: what could not be read.
        points: of a codec's rate-distortion curve and the formats' beside it; none of other models.
    """

    folder: Path
    about: dict[str, Any]
    parameters: int
    seconds: float
    images: tuple[ImageRow, ...]
    broken: tuple[Broken, ...]
    points: tuple[Point, ...] = ()

    @property
    def step(self) -> int:
        return self.about.get("step", 0)

    @property
    def report(self) -> Path:
        return self.folder / REPORT

    @cached_property
    def rate_distortion(self) -> RateDistortion | None:
        """The curves of a codec; None of other models."""
        return RateDistortion(self.points) if self.points else None

    @cached_property
    def means(self) -> dict[str, float]:
        """`psnr` in dB, and `ms_ssim` over the images that have one; left out where none has.

        Of a codec also `bd_rate` and `bd_rate_ms_ssim_db`, in percent of JPEG's bits, where the curves overlap.
        """
        found = means(Quality(row.psnr, row.ms_ssim) for row in self.images)
        return found | (bd_rates(self.rate_distortion) if self.rate_distortion else {})

    @property
    def ranked(self) -> list[ImageRow]:
        """All images, the lowest PSNR first."""
        return sorted(self.images, key=lambda row: row.psnr)

    @property
    def worst(self) -> ImageRow:
        return self.ranked[0]

    @property
    def best(self) -> ImageRow:
        return self.ranked[-1]

    def as_json(self) -> dict[str, Any]:
        """The content of `evaluation.json`."""
        return {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "psnr": self.means["psnr"],
            "median_psnr": median(row.psnr for row in self.images),
            "ms_ssim": self.means.get("ms_ssim"),
            "definitions": {
                "psnr": f"dB; {LARGEST_PSNR:g} stands for equal pictures and all nearer than that",
                "ms_ssim": f"null where a side is under {SMALLEST_SIDE} pixels; the mean is over the others",
                "error": f"absolute error times {ERROR_FACTOR}",
            },
            "about": self.about,
            "parameters": self.parameters,
            "seconds": self.seconds,
            "images": [asdict(row) for row in self.images],
            "broken": [asdict(row) for row in self.broken],
            "points": [asdict(point) for point in self.points],
        }

    def in_a_line(self) -> str:
        """The means: `30.00 dB PSNR, MS-SSIM 0.9700 on 5 images`."""
        figures = [f"{self.means['psnr']:.2f} dB PSNR"]
        if "ms_ssim" in self.means:
            figures.append(f"MS-SSIM {self.means['ms_ssim']:.4f}")
        if "bd_rate" in self.means:
            figures.append(f"BD-rate {percent(self.means['bd_rate'])} against JPEG")
        count = len(self.images)
        return f"{', '.join(figures)} on {'one image' if count == 1 else f'{count} images'}"

    def _about_images(self) -> str:
        if len(self.images) == 1:
            return f"One image, {code(self.worst.name)}."
        return f"{len(self.images)} images; the worst is {code(self.worst.name)}, the best {code(self.best.name)}."

    def markdown(self) -> str:
        """A summary for people, where only text is shown."""
        lines = [f"# {code(str(self.about.get('run', 'Evaluation')))} at step {self.step:,}", ""]
        lines += ["| | mean | worst | best |", "|---|---|---|---|"]
        lines += [f"| PSNR | **{self.means['psnr']:.2f} dB** | {self.worst.psnr:.2f} dB | {self.best.psnr:.2f} dB |"]
        indices = [row.ms_ssim for row in self.images if row.ms_ssim is not None]
        if indices:
            lines += [f"| MS-SSIM | **{self.means['ms_ssim']:.4f}** | {min(indices):.4f} | {max(indices):.4f} |"]
        lines += ["", self._about_images()]
        if self.rate_distortion:
            lines += ["", *_table_of_rates(self.rate_distortion)]
        if self.broken:
            lines += [f"{len(self.broken)} could not be read, such as {code(self.broken[0].name)}."]
        return "\n".join([*lines, "", f"Report with pictures: {code(str(self.report.absolute()))}", ""])


def bd_rates(found: RateDistortion) -> dict[str, float]:
    """The metrics that a codec is promoted by, as `Evaluation.means` has them."""
    rates = {"bd_rate": found.bd_rate(JPEG), "bd_rate_ms_ssim_db": found.bd_rate(JPEG, "ms_ssim")}
    return {name: rate for name, rate in rates.items() if rate is not None}


def _table_of_rates(found: RateDistortion) -> list[str]:
    lines = [f"Bits for the same quality, images: {len(found.images)}", ""]
    lines += ["| against | by PSNR | by MS-SSIM |", "|---|---|---|"]
    return lines + [
        f"| {anchor} | {percent(found.bd_rate(anchor))} | {percent(found.bd_rate(anchor, 'ms_ssim'))} |"
        for anchor in found.anchors
    ]


def percent(rate: float | None) -> str:
    """A BD-rate as people read it."""
    return "–" if rate is None else f"{rate:+.1f} %".replace("-", "−")  # noqa: RUF001  # a true minus and a dash


class _About(BaseModel):
    model_config = ConfigDict(extra="allow")

    step: Annotated[int, Field(ge=0, le=MOST_STEPS)] = 0


class _Written(BaseModel):
    """What is read of `evaluation.json`."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    format_version: int
    about: _About
    parameters: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]
    images: Annotated[tuple[ImageRow, ...], Field(min_length=1)]
    broken: tuple[Broken, ...]
    points: tuple[Point, ...] = ()


def read_evaluation(folder: Path) -> Evaluation | None:
    """The complete evaluation in a folder; None where there is none, or one that is damaged or of another version."""
    try:
        value = _Written.model_validate(read_json(folder / RESULT))
    except (CodecmillError, ValidationError):
        return None
    if value.format_version != FORMAT_VERSION or not all((folder / name).is_file() for name in (REPORT, TABLE)):
        return None
    about = value.about.model_dump()
    return Evaluation(folder, about, value.parameters, value.seconds, value.images, value.broken, value.points)


def printable(name: str) -> str:
    """A file's name on one line: what cannot be shown, or would turn the line around, is escaped."""
    return "".join(c if _is_shown(c) else c.encode("unicode_escape", "backslashreplace").decode() for c in name)


def _is_shown(character: str) -> bool:
    """Python takes no space but one for printable, nor what joins Persian's and Hindi's letters or keeps them apart."""
    return character.isprintable() or character in "\u200c\u200d" or unicodedata.category(character) == "Zs"


def code(text: str) -> str:
    """Untrusted text as Markdown code, also inside a table."""
    shown = printable(text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest else ""
    return f"{fence}{pad}{shown}{pad}{fence}"
