"""The report's section of a codec: its curves beside those of the usual formats, and pieces at equal rates."""

import math
from collections.abc import Sequence
from html import escape
from io import BytesIO

from PIL import Image

from pipelines.evaluation.contents import POINTS
from pipelines.evaluation.curve_chart import curve_chart
from pipelines.evaluation.curve_images import MOST_PIXELS
from pipelines.evaluation.equal_rates import Pieces
from pipelines.evaluation.markup import counted, data_uri, link, name_html
from pipelines.evaluation.rate_distortion import OURS, RateDistortion
from pipelines.evaluation.results import percent, printable

MOST_ROWS = 50
"""Pictures whose own BD-rates are listed; the file has all."""


def curve_section(found: RateDistortion, pieces: Sequence[Pieces]) -> str:
    """The section, as HTML."""
    charts = [
        curve_chart(found.curves, "psnr", "PSNR in dB"),
        curve_chart(found.curves_of("ms_ssim"), "ms_ssim", "MS-SSIM in dB"),
    ]
    return (
        '<section aria-labelledby="rates"><h2 id="rates">Rate and distortion</h2>'
        f'<p class="lead">Whole files, means over {counted(len(found.images), "image")} at each setting, '
        f"the first ones, of {MOST_PIXELS // 10**6} megapixels together at most. "
        f"The points as a file: {link(POINTS, POINTS)}.</p>"
        f'<div class="pair">{"".join(f"<div>{chart}</div>" for chart in charts)}</div>{_formats(found)}</section>'
        f"{_pieces(pieces)}{_images(found)}"
    )


def _formats(found: RateDistortion) -> str:
    rows = []
    for codec in found.curves:
        encode, decode = found.seconds(codec)
        rates = [percent(found.bd_rate(codec, metric)) if codec != OURS else "" for metric in ("psnr", "ms_ssim")]
        cells = "".join(f'<td class="number">{cell}</td>' for cell in (*rates, f"{encode:.2f} s", f"{decode:.2f} s"))
        rows.append(f"<tr><td>{escape(codec)}</td>{cells}</tr>")
    head = "".join(
        f'<th class="number" scope="col">{title}</th>'
        for title in ("Bits at equal PSNR", "Bits at equal MS-SSIM", "Encoding", "Decoding")
    )
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col">Format</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="lead">Bits that {OURS} takes, against those of the format (BD-rate; below zero is better). Times '
        "are medians for one image.</p>"
    )


def _pieces(pieces: Sequence[Pieces]) -> str:
    if not pieces:
        return ""
    return (
        '<section aria-labelledby="pieces"><h2 id="pieces">At equal rates</h2>'
        f'<p class="lead">Where {OURS} errs most, the worst images first; figures are of the whole images.</p>'
        f"{''.join(_card(each) for each in pieces)}</section>"
    )


def _card(pieces: Pieces) -> str:
    figures = [_figure("Original", "", pieces.original)]
    figures += [
        _figure(piece.codec, f"{piece.bits_per_pixel:.3f} bpp, {piece.psnr:.2f} dB", piece.picture)
        for piece in pieces.decoded
    ]
    return (
        f'<article class="card"><header><h3>{name_html(pieces.name)}</h3></header>'
        f'<div class="pieces">{"".join(figures)}</div></article>'
    )


def _figure(title: str, remark: str, picture: Image.Image) -> str:
    content = BytesIO()
    picture.save(content, format="WEBP", lossless=True)
    size = f'width="{picture.width}" height="{picture.height}"'
    shown = data_uri(content.getvalue())
    text = f"<strong>{escape(title)}</strong>{f'<br>{remark}' if remark else ''}"
    return f'<figure><img {size} alt="{escape(title)}" src="{shown}"><figcaption>{text}</figcaption></figure>'


def _images(found: RateDistortion) -> str:
    """Each picture's own BD-rates, the worst first."""
    rows = {name: [found.bd_rate(anchor, image=name) for anchor in found.anchors] for name in found.images}

    def worst_first(name: str) -> float:
        against_the_first = rows[name][0]
        return math.inf if against_the_first is None else -against_the_first

    ranked = sorted(rows, key=worst_first)[:MOST_ROWS]
    body = "".join(
        f"<tr><td>{name_html(printable(name))}</td>"
        + "".join(f'<td class="number">{percent(rate)}</td>' for rate in rows[name])
        + "</tr>"
        for name in ranked
    )
    head = "".join(f'<th class="number" scope="col">against {escape(anchor)}</th>' for anchor in found.anchors)
    return (
        '<section aria-labelledby="each-rate"><h2 id="each-rate">Bits at equal PSNR, image by image</h2>'
        f'<div class="scroll"><table><thead><tr><th scope="col">Image</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )
