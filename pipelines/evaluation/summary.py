"""The evaluation as Markdown, for Prefect's page: the figures, a codec's curves, and the worst pictures embedded."""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pipelines.data.images import ImageError, decode_png
from pipelines.evaluation.contents import PICTURES
from pipelines.evaluation.curve_chart import curve_chart
from pipelines.evaluation.markup import data_uri
from pipelines.evaluation.page import STYLE
from pipelines.evaluation.pictures import COMPARED, preview_side_by_side
from pipelines.evaluation.results import Evaluation, ImageRow, code, printable

log = logging.getLogger("codecmill.evaluation")

SHOWN = 3


def summary(evaluation: Evaluation, links: str = "") -> str:
    """`Evaluation.markdown`, the curves, then for the worst images original, reconstruction and error side by side.

    Args:
        links: a paragraph between the figures and the pictures.
    """
    parts = [evaluation.markdown(), *([f"{links}\n"] if links else [])]
    if evaluation.rate_distortion:
        chart = curve_chart(evaluation.rate_distortion.curves, "psnr", "PSNR in dB")
        if chart:
            parts.append(f"![PSNR over bits per pixel]({data_uri(_standalone(chart), 'svg+xml')})\n")
    for row, shown in worst_pictures(evaluation, SHOWN):
        parts.append(f"{code(row.name)}, {row.psnr:.2f} dB\n\n![]({data_uri(shown)})\n")
    return "\n".join(parts)


def worst_pictures(evaluation: Evaluation, count: int) -> Iterator[tuple[ImageRow, bytes]]:
    """The worst images that have pictures, each with original, reconstruction and error side by side, as small WebP.

    Whatever has been removed or damaged since is left out, with a warning: the figures stand without it.
    """
    for row in islice((row for row in evaluation.ranked if row.pictures), count):
        try:
            yield row, _preview(evaluation.folder / PICTURES / str(row.pictures))
        except (ImageError, OSError) as error:
            log.warning("The pictures of %s are not shown: %s", printable(row.name), error)


def _preview(folder: Path) -> bytes:
    """From the three pictures: the one of all three is three times as wide, for some too wide to be decoded."""
    return preview_side_by_side(decode_png((folder / f"{kind}.png").read_bytes()) for kind in COMPARED)


def _standalone(chart: str) -> bytes:
    """A drawing of the report as a picture by itself, which no page gives colours and type."""
    style = f"<style>{STYLE}svg {{ background: var(--card); font-family: system-ui, sans-serif; }}</style>"
    tag, _, drawing = chart.partition(">")
    return f'{tag} xmlns="http://www.w3.org/2000/svg">{style}{drawing}'.encode()
