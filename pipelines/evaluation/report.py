"""The report of an evaluation: one HTML page that needs nothing but itself, on a phone and a desk, by day and night."""

from base64 import b64encode
from collections.abc import Iterable, Mapping
from hashlib import sha256
from html import escape
from statistics import median
from typing import Any
from urllib.parse import quote

from pipelines.evaluation.chart import histogram
from pipelines.evaluation.metrics import LARGEST_PSNR, SMALLEST_SIDE
from pipelines.evaluation.page import SCRIPT, SKELETON, STYLE
from pipelines.evaluation.pictures import ERROR_FACTOR, PREVIEW_SIDE, Previews
from pipelines.evaluation.results import TABLE, Evaluation, ImageRow, printable

CARDS = 8
"""Worst images that are shown large, and best ones."""

WIDE = 200
"""Pixels from which on a picture is shown under a slider: below it the captions would not fit."""

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


def html(evaluation: Evaluation, previews: Mapping[str, Previews]) -> str:
    """The page.

    Args:
        evaluation: of at least one image.
        previews: by the `pictures` of the rows that have pictures.
    """
    run = str(evaluation.about.get("run", "evaluation"))
    where = printable(str(evaluation.about.get("images", "")))
    count = _counted(len(evaluation.images), "image")
    lead = [f"Step {evaluation.step:,}", where, count, printable(str(evaluation.about.get("date", "")))]
    return SKELETON.substitute(
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_digest(SCRIPT)}'",
        title=escape(f"{printable(run)}, step {evaluation.step:,}: {evaluation.means['psnr']:.2f} dB"),
        style=STYLE,
        heading=_name(run),
        lead=" · ".join(f"<bdi>{escape(part)}</bdi>" for part in lead if part),
        tiles=_tiles(evaluation),
        chart=histogram([(printable(row.name), row.psnr) for row in evaluation.ranked]),
        origin=_origin(evaluation.about),
        pictures=_pictures(evaluation, previews),
        broken=_broken(evaluation),
        table=_table(evaluation, previews),
        notes=_notes(),
        script=SCRIPT,
    )


def _tiles(evaluation: Evaluation) -> str:
    values = [row.psnr for row in evaluation.images]
    indices = [row.ms_ssim for row in evaluation.images if row.ms_ssim is not None]
    tiles = [
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
    return f"<code>{_name(str(value))}</code>" if is_digest else _name(str(value))


def _pictures(evaluation: Evaluation, previews: Mapping[str, Previews]) -> str:
    shown = [row for row in evaluation.ranked if row.pictures in previews]
    if not shown:
        return ""
    if len(shown) <= 2 * CARDS:
        return _section("pictures", "Pictures, worst first", shown, previews, with_switch=True)
    return _section("worst", "Worst images", shown[:CARDS], previews, with_switch=True) + _section(
        "best", "Best images", shown[: -CARDS - 1 : -1], previews, with_switch=False
    )


def _section(
    key: str, title: str, rows: Iterable[ImageRow], previews: Mapping[str, Previews], with_switch: bool
) -> str:
    switch = (
        '<p class="switch" role="group" aria-label="How to compare">'
        '<button type="button" value="side" aria-pressed="true">Side by side</button>'
        '<button type="button" value="slide" aria-pressed="false">Slider</button></p>'
    )
    cards = "".join(_card(row, previews[str(row.pictures)]) for row in rows)
    return (
        f'<section aria-labelledby="{key}"><div class="heading"><h2 id="{key}">{title}</h2>'
        f"{switch if with_switch else ''}</div>{cards}</section>"
    )


def _card(row: ImageRow, previews: Previews) -> str:
    name = escape(printable(row.name))
    folder = f"pictures/{quote(str(row.pictures))}"
    scale = min(1, PREVIEW_SIDE / max(row.width, row.height))
    shown = max(round(row.width * scale), min(96, 8 * row.width))
    tiny = shown > row.width

    def figure(kind: str, caption: str, content: bytes) -> str:
        # Sizes are stated so that the page does not jump while it loads.
        size = f'width="{max(1, round(row.width * scale))}" height="{max(1, round(row.height * scale))}"'
        image = f'<img {size} alt="{caption} of {name}" src="{_data(content)}"{" class=tiny" if tiny else ""}>'
        return (
            f'<figure class="{kind}">{_link(f"{folder}/{kind}.png", image)}<figcaption>{caption}</figcaption></figure>'
        )

    error = f"Absolute error &times; {ERROR_FACTOR}"
    files = {"original": "Original", "reconstruction": "Reconstruction", "error": error, "side_by_side": "Side by side"}
    return (
        f'<article class="card" id="{row.pictures}"><header><h3><bdi>{name}</bdi></h3>'
        f"<p><strong>{_psnr(row)} dB</strong> · MS-SSIM {_index(row)} · {_size(row)}</p></header>"
        f'<div class="views{" wide" if shown >= WIDE else ""}" style="--shown: {shown}px"><div class="compare">'
        f"{figure('original', 'Original', previews.original)}"
        f"{figure('reconstruction', 'Reconstruction', previews.reconstruction)}"
        f'<input type="range" min="0" max="100" step="0.5" value="50" '
        f'aria-label="Original against reconstruction of {name}">'
        '<span class="handle" aria-hidden="true"></span></div>'
        f"{figure('error', error, previews.error)}</div>"
        f'<p class="files">PNG, full size: '
        f"{' '.join(_link(f'{folder}/{kind}.png', label) for kind, label in files.items())}</p></article>"
    )


def _table(evaluation: Evaluation, previews: Mapping[str, Previews]) -> str:
    carded = {row.pictures for row in _carded(evaluation, previews)}
    rows = []
    for place, row in enumerate(evaluation.ranked, 1):
        thumbnail, name = "", f"<bdi>{escape(printable(row.name))}</bdi>"
        if row.pictures in previews:
            content = _data(previews[str(row.pictures)].thumbnail)
            thumbnail = f'<img alt="" width="48" height="36" loading="lazy" src="{content}">'
            folder = f"pictures/{quote(str(row.pictures))}/side_by_side.png"
            name = _link(f"#{row.pictures}" if row.pictures in carded else folder, name)
        rows.append(
            f'<tr><td class="number place">{place}</td><td class="thumbnail">{thumbnail}</td><td>{name}</td>'
            f'<td class="number size">{_size(row)}</td>'
            f'<td class="number">{_psnr(row)}</td><td class="number">{_index(row)}</td></tr>'
        )
    head = (
        '<th class="number place" scope="col">Rank</th><th scope="col" aria-label="Picture"></th>'
        '<th scope="col">Image</th>'
        '<th class="number size" scope="col">Size</th><th class="number" scope="col">PSNR, dB</th>'
        '<th class="number" scope="col">MS-SSIM</th>'
    )
    return (
        f'<p class="lead">Worst first. The same figures as a file: {_link(TABLE, TABLE)}.</p>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _carded(evaluation: Evaluation, previews: Mapping[str, Previews]) -> list[ImageRow]:
    shown = [row for row in evaluation.ranked if row.pictures in previews]
    return shown if len(shown) <= 2 * CARDS else shown[:CARDS] + shown[-CARDS:]


def _broken(evaluation: Evaluation) -> str:
    if not evaluation.broken:
        return ""
    items = "".join(f"<li>{_name(row.name)}: {escape(printable(row.reason))}</li>" for row in evaluation.broken)
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


def _name(text: str) -> str:
    return f"<bdi>{escape(printable(text))}</bdi>"


def _psnr(row: ImageRow) -> str:
    return f"≥ {LARGEST_PSNR:g}" if row.psnr >= LARGEST_PSNR else f"{row.psnr:.2f}"


def _size(row: ImageRow) -> str:
    return f"{row.width:,} &times; {row.height:,}"


def _index(row: ImageRow) -> str:
    return "&ndash;" if row.ms_ssim is None else f"{row.ms_ssim:.4f}"


def _link(target: str, content: str) -> str:
    return f'<a href="{escape(target)}">{content}</a>'


def _data(webp: bytes) -> str:
    return f"data:image/webp;base64,{b64encode(webp).decode()}"


def _digest(script: str) -> str:
    return b64encode(sha256(script.encode()).digest()).decode()


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


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
