"""The report's cards: a picture beside or under its reconstruction, its error, its figures and its files."""

from collections.abc import Mapping
from html import escape
from urllib.parse import quote

from pipelines.evaluation.contents import PICTURES
from pipelines.evaluation.markup import data_uri, link, ms_ssim_html, psnr_html, size_html
from pipelines.evaluation.pictures import ERROR_FACTOR, PREVIEW_SIDE, Previews
from pipelines.evaluation.results import Evaluation, ImageRow, printable

CARDS = 8
"""Worst images that are shown large, and best ones."""

WIDE = 200
"""Pixels from which on a picture is shown under a slider: below it the captions would not fit."""


SWITCH = (
    '<p class="switch" role="group" aria-label="How to compare">'
    '<button type="button" value="side" aria-pressed="true">Side by side</button>'
    '<button type="button" value="slide" aria-pressed="false">Slider</button></p>'
)


def chosen(evaluation: Evaluation, previews: Mapping[str, Previews]) -> dict[str, list[ImageRow]]:
    """The images that get a card, under the title that they stand under: worst first, then best first."""
    rows = [row for row in evaluation.ranked if row.pictures in previews]
    if not rows:
        return {}
    if len(rows) <= 2 * CARDS:
        return {"Pictures, worst first": rows}
    return {"Worst images": rows[:CARDS], "Best images": rows[: -CARDS - 1 : -1]}


def sections(groups: Mapping[str, list[ImageRow]], previews: Mapping[str, Previews]) -> str:
    """A section for each title; the first has the switch between slider and side by side, for all of them."""
    parts = []
    for place, (title, rows) in enumerate(groups.items()):
        cards = "".join(_card(row, previews[str(row.pictures)]) for row in rows)
        parts.append(
            f'<section aria-labelledby="pictures-{place}"><div class="heading"><h2 id="pictures-{place}">{title}</h2>'
            f"{'' if place else SWITCH}</div>{cards}</section>"
        )
    return "".join(parts)


def folder_link(row: ImageRow) -> str:
    """The folder of an image's pictures, relative to the report."""
    return f"{PICTURES}/{quote(str(row.pictures))}"


def _card(row: ImageRow, previews: Previews) -> str:
    name = escape(printable(row.name))
    folder = folder_link(row)
    scale = min(1, PREVIEW_SIDE / max(row.width, row.height))
    shown = max(round(row.width * scale), min(96, 8 * row.width))
    tiny = shown > row.width

    def figure(kind: str, caption: str, content: bytes) -> str:
        # Sizes are stated so that the page does not jump while it loads.
        size = f'width="{max(1, round(row.width * scale))}" height="{max(1, round(row.height * scale))}"'
        image = f'<img {size} alt="{caption} of {name}" src="{data_uri(content)}"{" class=tiny" if tiny else ""}>'
        return (
            f'<figure class="{kind}">{link(f"{folder}/{kind}.png", image)}<figcaption>{caption}</figcaption></figure>'
        )

    error = f"Absolute error &times; {ERROR_FACTOR}"
    files = {"original": "Original", "reconstruction": "Reconstruction", "error": error, "side_by_side": "Side by side"}
    return (
        f'<article class="card" id="{row.pictures}"><header><h3><bdi>{name}</bdi></h3>'
        f"<p><strong>{psnr_html(row)} dB</strong> · MS-SSIM {ms_ssim_html(row)} · {size_html(row)}</p></header>"
        f'<div class="views{" wide" if shown >= WIDE else ""}" style="--shown: {shown}px"><div class="compare">'
        f"{figure('original', 'Original', previews.original)}"
        f"{figure('reconstruction', 'Reconstruction', previews.reconstruction)}"
        f'<input type="range" min="0" max="100" step="0.5" value="50" '
        f'aria-label="Original against reconstruction of {name}">'
        '<span class="handle" aria-hidden="true"></span></div>'
        f"{figure('error', error, previews.error)}</div>"
        f'<p class="files">PNG, full size: '
        f"{' '.join(link(f'{folder}/{kind}.png', label) for kind, label in files.items())}</p></article>"
    )
