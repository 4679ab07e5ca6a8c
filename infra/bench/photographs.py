"""The photographs that everybody gets: sheets of pieces of those that packages bring along, the same on any machine.

The packages have few photographs, and small ones. So pieces of 256 pixels are cut from them at random places, mirrored
and turned, and put together to sheets of 1536x1024 pixels: the size and the format of a photograph, as many as are
wanted, and with exactly 24 patches each that all contenders cut alike.
"""

import hashlib
import json
import random
from pathlib import Path

from PIL import Image

from pipelines.data.images import open_image
from pipelines.errors import InputError

PATCH = 256
COLUMNS, ROWS = 6, 4
A_SHEET = COLUMNS * ROWS
"""Patches."""

QUALITY = 95
"""Of the JPEG files, as cameras have it."""

TURNS = (
    None,
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.ROTATE_180,
)


def sheets(folder: Path, photographs: list[Path], patches: int) -> list[Path]:
    """At least `patches` patches' worth of sheets in `folder`, made where they are missing.

    Args:
        photographs: what they are cut from; too small ones and grey ones are left out.

    Raises:
        InputError: none of the photographs can serve.
    """
    count = -(-patches // A_SHEET)
    named = json.dumps([str(path) for path in photographs]).encode()
    wanted = folder / hashlib.sha256(named).hexdigest()[:12]
    files = [wanted / f"{number:04d}.jpg" for number in range(count)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        originals = _usable(photographs)
        wanted.mkdir(parents=True, exist_ok=True)
        for file in missing:
            begun = file.with_suffix(".tmp")
            _sheet(originals, int(file.stem)).save(begun, "JPEG", quality=QUALITY)
            begun.rename(file)
    return files


def _usable(photographs: list[Path]) -> list[Image.Image]:
    opened = (open_image(path) for path in photographs if _is_coloured(path))
    usable = [image for image in opened if min(image.size) >= PATCH]
    if not usable:
        raise InputError(
            f"None of the {len(photographs)} photographs has colours and at least {PATCH} pixels a side. "
            "Name a folder of others with --photographs."
        )
    return usable


def _is_coloured(path: Path) -> bool:
    with Image.open(path) as image:
        return image.mode not in ("L", "1", "I;16")


def _sheet(originals: list[Image.Image], number: int) -> Image.Image:
    chance = random.Random(number)  # noqa: S311  # no secret
    sheet = Image.new("RGB", (COLUMNS * PATCH, ROWS * PATCH))
    for place in range(A_SHEET):
        original = chance.choice(originals)
        left, top = chance.randint(0, original.width - PATCH), chance.randint(0, original.height - PATCH)
        piece = original.crop((left, top, left + PATCH, top + PATCH))
        turn = chance.choice(TURNS)
        if turn is not None:
            piece = piece.transpose(turn)
        sheet.paste(piece, (place % COLUMNS * PATCH, place // COLUMNS * PATCH))
    return sheet
