"""The report of an evaluation: one HTML page that needs nothing but itself, on a phone and a desk, by day and night."""

from base64 import b64encode
from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256
from html import escape
from statistics import median
from typing import Any

from pipelines.evaluation.cards import chosen, folder_link, sections
from pipelines.evaluation.chart import histogram
from pipelines.evaluation.contents import TABLE
from pipelines.evaluation.curve_section import curve_section
from pipelines.evaluation.equal_rates import Pieces
from pipelines.evaluation.markup import counted, data_uri, link, ms_ssim_html, name_html, psnr_html, size_html
from pipelines.evaluation.metrics import LARGEST_PSNR, SMALLEST_SIDE
from pipelines.evaluation.page import SCRIPT, SKELETON, STYLE
from pipelines.evaluation.pictures import ERROR_FACTOR, PREVIEW_SIDE, Previews
from pipelines.evaluation.results import SIDE_BY_SIDE, Evaluation, percent, printable

LABELS = {
    "run": "Run",
    "step": "Step",
    "images": "Images",
    "date": "Evaluated",
    "shard_set": "Shard set",
    "test_set_sha256": "Test set, sha256",
    "checkpoint_sha256": "Checkpoint, sha256",
    "mlflow_run": "MLflow run",
    "normalization": "Normalisation",
    "training_seconds": "Training time",
    "git_commit": "Git commit",
}

MOST_ROWS = 1000
"""Of the table, and lines of what could not be read: of a million images the page would have 300 MB."""


def html(evaluation: Evaluation, previews: Mapping[str, Previews], pieces: Sequence[Pieces] = ()) -> str:
    """The page.

    Args:
        evaluation: of at least one image.
        previews: by the `pictures` of the rows that have pictures.
        pieces: of a codec's pictures, beside the usual formats.
    """
    run = str(evaluation.about.get("run", "evaluation"))
    groups = chosen(evaluation, previews)
    where = printable(str(evaluation.about.get("images", "")))
    count = counted(len(evaluation.images), "image")
    lead = [f"Step {evaluation.step:,}", where, count, printable(str(evaluation.about.get("date", "")))]
    return SKELETON.substitute(
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_digest(SCRIPT)}'",
        title=escape(f"{printable(run)}, step {evaluation.step:,}: {evaluation.means['psnr']:.2f} dB"),
        style=STYLE,
        heading=name_html(run),
        lead=" · ".join(f"<bdi>{escape(part)}</bdi>" for part in lead if part),
        tiles=_tiles(evaluation),
        chart=histogram([(printable(row.name), row.psnr) for row in evaluation.ranked]),
        origin=_origin(evaluation.about),
        curves=curve_section(evaluation.rate_distortion, pieces) if evaluation.rate_distortion else "",
        pictures=sections(groups, previews),
        broken=_broken(evaluation),
        table=_table(evaluation, previews, {row.pictures for rows in groups.values() for row in rows}),
        notes=_notes(),
        script=SCRIPT,
    )


def _tiles(evaluation: Evaluation) -> str:
    values = [row.psnr for row in evaluation.images]
    indices = [row.ms_ssim for row in evaluation.images if row.ms_ssim is not None]
    rate = evaluation.means.get("bd_rate")
    tiles = [
        *([_tile("Bits against JPEG", percent(rate), "at equal PSNR")] if rate is not None else []),
        _tile("Mean PSNR", f"{evaluation.means['psnr']:.2f} <small>dB</small>", f"median {median(values):.2f}"),
        _tile("PSNR, worst to best", f"{min(values):.1f}&ndash;{max(values):.1f}", "dB"),
        _tile("Mean MS-SSIM", f"{evaluation.means['ms_ssim']:.4f}", f"median {median(indices):.4f}")
        if indices
        else _tile("Mean MS-SSIM", "&ndash;", "images too small"),
        _tile("Images", f"{len(values):,}", f"{len(evaluation.broken):,} unreadable" if evaluation.broken else ""),
        _tile("Parameters", _short(evaluation.parameters), f"{evaluation.parameters:,}"),
        _tile("Training steps", f"{evaluation.step:,}", _duration(evaluation.about.get("training_seconds"))),
    ]
    return "".join(tiles)


def _tile(label: str, value: str, remark: str = "") -> str:
    return f"<div><dt>{label}</dt><dd>{value}</dd>{f'<dd>{remark}</dd>' if remark else ''}</div>"


def _origin(about: Mapping[str, Any]) -> str:
    known = [key for key in LABELS if about.get(key) not in (None, "")]
    others = [key for key in sorted(about) if key not in LABELS and about[key] not in (None, "")]
    return "".join(
        f"<dt>{escape(LABELS.get(key, printable(key.replace('_', ' ').capitalize())))}</dt>"
        f"<dd>{_value(key, about[key])}</dd>"
        for key in [*known, *others]
    )


def _value(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return "<br>".join(f"{escape(printable(str(name)))} {_value('', part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_value("", part) for part in value)
    if key == "training_seconds":
        return _duration(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    is_digest = key.endswith(("sha256", "commit", "shard_set", "mlflow_run"))
    return f"<code>{name_html(str(value))}</code>" if is_digest else name_html(str(value))


def _table(evaluation: Evaluation, previews: Mapping[str, Previews], with_card: Collection[str | None]) -> str:
    ranked = list(enumerate(evaluation.ranked, 1))
    lead = f"Worst first. The same figures as a file: {link(TABLE, TABLE)}."
    if len(ranked) > MOST_ROWS:
        half = MOST_ROWS // 2
        ranked = ranked[:half] + ranked[-half:]
        lead = f"The {half} worst, then the {half} best. All as a file: {link(TABLE, TABLE)}."
    rows = []
    for place, row in ranked:
        thumbnail, name = "", name_html(row.name)
        if row.pictures in previews:
            content = data_uri(previews[str(row.pictures)].thumbnail)
            thumbnail = f'<img alt="" width="48" height="36" loading="lazy" src="{content}">'
            name = link(f"#{row.pictures}" if row.pictures in with_card else f"{folder_link(row)}/{SIDE_BY_SIDE}", name)
        rows.append(
            f'<tr><td class="number place">{place}</td><td class="thumbnail">{thumbnail}</td><td>{name}</td>'
            f'<td class="number size">{size_html(row)}</td>'
            f'<td class="number">{psnr_html(row)}</td><td class="number">{ms_ssim_html(row)}</td></tr>'
        )
    head = (
        '<th class="number place" scope="col">Rank</th><th scope="col" aria-label="Picture"></th>'
        '<th scope="col">Image</th>'
        '<th class="number size" scope="col">Size</th><th class="number" scope="col">PSNR, dB</th>'
        '<th class="number" scope="col">MS-SSIM</th>'
    )
    return (
        f'<p class="lead">{lead}</p>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _broken(evaluation: Evaluation) -> str:
    if not evaluation.broken:
        return ""
    lines = [f"{name_html(row.name)}: {escape(printable(row.reason))}" for row in evaluation.broken[:MOST_ROWS]]
    if len(evaluation.broken) > MOST_ROWS:
        lines.append(f"and {len(evaluation.broken) - MOST_ROWS:,} more")
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f'<section aria-labelledby="broken"><h2 id="broken">Not evaluated</h2><ul>{items}</ul></section>'


def _notes() -> str:
    return (
        f"<p>PSNR is 10 log<sub>10</sub>(255² / MSE) over all pixels and channels of the 8-bit RGB picture; "
        f"{LARGEST_PSNR:g} dB stands for a reconstruction that equals its original or is nearer than that. "
        f"MS-SSIM is that of Wang et al. (2003) on RGB; it is not defined for pictures with a side under "
        f"{SMALLEST_SIDE} pixels. Means are taken over images.</p>"
        f"<p>The pictures on this page are compressed previews of at most {PREVIEW_SIDE} pixels; judge details by the "
        f"PNG files beside this page. Absolute errors are multiplied by {ERROR_FACTOR}.</p>"
    )


def _digest(script: str) -> str:
    return b64encode(sha256(script.encode()).digest()).decode()


def _short(count: int) -> str:
    """A count in three digits: 1.23 M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} <small>{name}</small>"
    return str(count)


def _duration(seconds: Any) -> str:
    """Seconds in words; nothing where they are not known."""
    if not isinstance(seconds, int | float):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
