"""What programs that make shards have in common: the peers' way to cut the photographs, and how a round is timed."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from infra.bench.process_tree import Stretch
from infra.bench.programs.serving import Measure, Parameters, bytes_below, empty_folder, figures

PATCH = 256
WARM_UP = 3
"""Files of the first round, which is not measured: what is imported late is imported then."""

Create = Callable[[list[str], Path], tuple[int, Path]]
"""Makes shards of some files below a folder; returns the number of patches, and the folder that holds the shards."""


def rounds_of(create: Create, parameters: Parameters) -> Measure:
    """What measures `create`, once warm."""
    files = parameters["files"]
    with empty_folder(parameters["folder"]) as folder:
        create(files[:WARM_UP], folder)

    def measure(number: int) -> dict[str, float]:
        with empty_folder(parameters["folder"]) as folder:
            with Stretch() as stretch:
                count, made = create(files, folder)
            return figures(stretch, count, bytes=bytes_below(made))

    return measure


def patches(files: list[str]) -> Iterator[Image.Image]:
    """The patches of some photographs, side by side, RGB: Pillow opens, converts and crops, as documentations do."""
    for file in files:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        for top in range(0, image.height - PATCH + 1, PATCH):
            for left in range(0, image.width - PATCH + 1, PATCH):
                yield image.crop((left, top, left + PATCH, top + PATCH))


def png(image: Image.Image, level: int | None = None) -> bytes:
    """A picture as PNG, with Pillow's default effort or another level of zlib's."""
    stream = io.BytesIO()
    image.save(stream, "PNG", **({} if level is None else {"compress_level": level}))
    return stream.getvalue()
