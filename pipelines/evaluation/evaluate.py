"""A model against pictures: reconstruct, measure, and leave figures, pictures and a report in a folder."""

import csv
import io
import operator
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipelines.codec.picture_codec import PictureCodec
from pipelines.config import EvaluationConfig
from pipelines.data.images import ImageError, Normalization, decode_png, to_image, to_levels, to_tensor, to_unit
from pipelines.durable_files import built_folder, write_bytes, write_json
from pipelines.errors import CodecmillError, InputError
from pipelines.evaluation.contents import PICTURES, POINTS, REPORT, RESULT, TABLE, contents_of
from pipelines.evaluation.curve_images import fits_every_format, is_within
from pipelines.evaluation.equal_rates import Pieces, at_equal_rates
from pipelines.evaluation.metrics import Quality, compare, means
from pipelines.evaluation.pictures import Previews, folder_name, write_pictures
from pipelines.evaluation.rate_distortion import Measuring, Point, RateDistortion
from pipelines.evaluation.report import html
from pipelines.evaluation.results import Broken, Evaluation, ImageRow, bd_rates, printable, read_evaluation
from pipelines.model.build import Model
from pipelines.model.codec import TransformCodec
from pipelines.model.codec_tiles import code_in_tiles
from pipelines.model.tiling import receptive_radius, reconstruct_tiled
from pipelines.progress import Progress, report

__all__ = ["Evaluation", "evaluate", "read_evaluation", "reconstruct", "score"]

MOST_PIECES = 4
"""Images of which the report shows a piece in every format."""

NamedImage = tuple[str, Image.Image | ImageError]
"""What a picture is called, and the picture (mode RGB) or why it could not be read."""


def evaluate(
    model: Model,
    normalization: Normalization,
    images: Iterable[NamedImage],
    folder: Path,
    config: EvaluationConfig,
    about: Mapping[str, Any],
    codec: PictureCodec | None = None,
) -> Evaluation:
    """Evaluate a model, on the device and in the type of its weights, and write everything into `folder`.

    All is built beside the folder and renamed at the end, in place of what may lie there: nobody sees half of it.

    Args:
        images: read one at a time; an `ImageError` in the place of a picture is reported, and the rest goes on.
        config: the size of tiles, and of how many images pictures are written: the worst and the best.
        about: JSON values that say what is evaluated; `run`, `step` and what else `report.LABELS` knows.
        codec: the model as one that writes files, of which rate-distortion curves are measured too.

    Raises:
        InputError: there was no image that could be read.
        CodecmillError: the model's output is not finite.
    """
    started = time.monotonic()
    about = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", **about}
    with built_folder(folder) as building:
        album = _Album(building / PICTURES, config.pictures)
        rows: list[ImageRow] = []
        broken: list[Broken] = []
        measuring = Measuring(codec, config.curve_images)
        for name, original, reconstruction, quality in _reconstructions(model, normalization, images, config, broken):
            rows.append(ImageRow(name, *original.size, quality.psnr, quality.ms_ssim, None))
            album.offer(len(rows) - 1, rows[-1], original, reconstruction)
            measuring.offer(len(rows), printable(name), original)
        points, kept = measuring.points, album.kept
        images_with_pictures = tuple(replace(row, pictures=kept.get(i)) for i, row in enumerate(rows))
        parameters = _parameters(model)
        seconds = round(time.monotonic() - started, 3)
        result = Evaluation(folder, about, parameters, seconds, images_with_pictures, tuple(broken), tuple(points))
        write_bytes(building / TABLE, _csv(result).encode("utf-8"))
        if points:
            write_bytes(building / POINTS, _csv_of_points(points).encode("utf-8"))
        pieces = list(_pieces(codec, result, building)) if codec and points else []
        write_bytes(building / REPORT, html(result, album.previews, pieces).encode("utf-8"))
        write_json(building / RESULT, result.as_json() | contents_of(building).model_dump())
    return result


def _parameters(model: Model) -> int:
    """How many there are, less a codebook's `statistics`, which are zero and there to have a gradient."""
    named = model.named_parameters()
    return sum(parameter.numel() for name, parameter in named if not name.endswith(".statistics"))


def _pieces(codec: PictureCodec, result: Evaluation, folder: Path) -> Iterator[Pieces]:
    """Pieces of the worst images that pictures were written of and that fit every format."""
    worst, pixels = [], 0
    for row in result.ranked:
        size = row.width * row.height
        if (
            row.pictures
            and fits_every_format(row.width, row.height)
            and is_within(pixels + size, len(worst), MOST_PIECES)
        ):
            worst.append(row)
            pixels += size
    for place, row in enumerate(worst):
        report(Progress("evaluation", place, len(worst), "pieces at equal rates", printable(row.name)))
        original = decode_png((folder / PICTURES / str(row.pictures) / "original.png").read_bytes())
        yield at_equal_rates(codec, row.name, original)


def score(
    model: Model,
    normalization: Normalization,
    images: Iterable[NamedImage],
    config: EvaluationConfig,
    codec: PictureCodec | None = None,
) -> dict[str, float]:
    """Only the means, as `Evaluation.means` has them; nothing is written.

    Args:
        codec: as in `evaluate`.

    Raises:
        InputError: there was no image that could be read.
        CodecmillError: the model's output is not finite.
    """
    qualities: list[Quality] = []
    measuring = Measuring(codec, config.curve_images)
    for name, original, _, quality in _reconstructions(model, normalization, images, config, []):
        qualities.append(quality)
        measuring.offer(len(qualities), printable(name), original)
    points = tuple(measuring.points)
    return means(qualities) | (bd_rates(RateDistortion(points)) if points else {})


@torch.inference_mode()
def reconstruct(model: Model, normalization: Normalization, image: Image.Image, tile_size: int) -> Image.Image:
    """What the model makes of a picture (mode RGB) of any size, in tiles above `tile_size` pixels.

    It is the same as whole where a tile is four times as large as the model's `receptive_radius`, which is some
    51 + 56 `residual_blocks` pixels at 3 downsamplings and doubles with each more: tiles share half of their side at
    most, so that more depth than 3 blocks may show at the edges of those of 1024. Of a codec it always is, and what a
    file decodes to, up to rounding.

    Raises:
        CodecmillError: the model's output is not finite, or the GPU has no room for a tile.
    """
    weight = next(model.parameters())

    def normalised(levels: Tensor) -> Tensor:
        return normalization.normalize_(to_unit(levels.to(weight.device), weight.dtype))

    def levels_of(y: Tensor) -> Tensor:
        y = normalization.denormalize(y)
        if not y.isfinite().all():
            raise CodecmillError(
                "The model's output is not finite: its training has diverged. "
                "Train again with a smaller training.learning_rate, or evaluate an earlier checkpoint."
            )
        return to_levels(y).cpu()

    def through_model(levels: Tensor) -> Tensor:
        return levels_of(model(normalised(levels)).image)

    levels, overlap = to_tensor(image)[None], 0
    try:
        if isinstance(model, TransformCodec):
            return to_image(code_in_tiles(model, normalised, levels_of, levels, tile_size)[0])
        if max(image.size) > tile_size:
            probe = weight.new_zeros(1, 3, model.stride, model.stride)
            overlap = min(2 * receptive_radius(model, probe), tile_size // 2)
        output = reconstruct_tiled(through_model, levels, tile_size, overlap, model.stride)
    except torch.OutOfMemoryError as error:
        raise CodecmillError(
            f"The GPU has no room for a picture of {image.width} x {image.height} pixels in tiles of "
            f"evaluation.tile_size {tile_size} ({str(error).split('. GPU')[0]}): use a smaller --evaluation.tile_size."
        ) from error
    return to_image(output[0])


def _reconstructions(
    model: Model,
    normalization: Normalization,
    images: Iterable[NamedImage],
    config: EvaluationConfig,
    broken: list[Broken],
) -> Iterator[tuple[str, Image.Image, Image.Image, Quality]]:
    """Name, original, reconstruction and figures of each image that can be read; `broken` takes the others."""
    total = operator.length_hint(images)
    was_training = model.training
    model.eval()
    done = 0
    try:
        for place, (name, original) in enumerate(images, 1):
            if isinstance(original, ImageError):
                broken.append(Broken(name, str(original)))
                continue
            reconstruction = reconstruct(model, normalization, original, config.tile_size)
            quality = compare(original, reconstruction)
            yield name, original, reconstruction, quality
            done += 1
            report(Progress("evaluation", place, total, "images", printable(name), {"psnr": quality.psnr}))
    finally:
        model.train(was_training)
    if not done:
        reason = f" {broken[0].reason}" if broken else ""
        raise InputError(f"There is no image to evaluate.{reason} Name others with --evaluation.images.")


class _Album:
    """The pictures of the worst and the best images so far; what drops out of both is removed again."""

    def __init__(self, folder: Path, size: int):
        self.folder = folder
        self.worst = size - size // 2
        self.best = size // 2
        self.previews: dict[str, Previews] = {}
        self.kept: dict[int, str] = {}
        self._psnr: dict[int, float] = {}

    def offer(self, number: int, row: ImageRow, original: Image.Image, reconstruction: Image.Image) -> None:
        """Write the pictures of an image if it belongs here."""
        ranked = sorted([*self._psnr.items(), (number, row.psnr)], key=lambda item: item[1])
        stays = dict(ranked[: self.worst] + ranked[max(self.worst, len(ranked) - self.best) :])
        if number in stays:
            name = folder_name(number + 1, row.name)
            self.previews[name] = write_pictures(self.folder / name, original, reconstruction)
            self.kept[number] = name
        for former in [other for other in self.kept if other not in stays]:
            name = self.kept.pop(former)
            del self.previews[name]
            shutil.rmtree(self.folder / name)
        self._psnr = stays


def _csv(evaluation: Evaluation) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["image", "width", "height", "psnr_db", "ms_ssim", "pictures"])
    for row in evaluation.images:
        index = "" if row.ms_ssim is None else f"{row.ms_ssim:.6f}"
        writer.writerow([printable(row.name), row.width, row.height, f"{row.psnr:.4f}", index, row.pictures or ""])
    return file.getvalue()


def _csv_of_points(points: Sequence[Point]) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, [field.name for field in fields(Point)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    return file.getvalue()
