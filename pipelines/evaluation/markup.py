"""Pieces of the report's HTML; whatever comes from outside is escaped here."""

from base64 import b64encode
from html import escape

from pipelines.evaluation.metrics import LARGEST_PSNR
from pipelines.evaluation.results import ImageRow, printable


def name_html(text: str) -> str:
    return f"<bdi>{escape(printable(text))}</bdi>"


def psnr_html(row: ImageRow) -> str:
    return f"≥ {LARGEST_PSNR:g}" if row.psnr >= LARGEST_PSNR else f"{row.psnr:.2f}"


def size_html(row: ImageRow) -> str:
    return f"{row.width:,} &times; {row.height:,}"


def ms_ssim_html(row: ImageRow) -> str:
    return "&ndash;" if row.ms_ssim is None else f"{row.ms_ssim:.4f}"


def link(target: str, content: str) -> str:
    return f'<a href="{escape(target)}">{content}</a>'


def data_uri(content: bytes, kind: str = "webp") -> str:
    return f"data:image/{kind};base64,{b64encode(content).decode()}"


def counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
