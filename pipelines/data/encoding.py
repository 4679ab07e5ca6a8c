"""From one source to its part of a tar: decoded, cut, encoded, written whole or not at all, in any process."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import IO, Any

from isal import isal_zlib
from PIL import Image

from pipelines.config import Section
from pipelines.data.images import ImageError, open_image, open_mask
from pipelines.data.moments import Moments
from pipelines.data.parts import Part, describe, part_file, read_part, writing_part
from pipelines.data.patches import Box, PatchSettings, choose_patches, enlarge, enlarged_size
from pipelines.data.picture_limits import MAX_PIXELS
from pipelines.data.png_writing import Compression, write_png
from pipelines.data.shard_format import Split, canonical
from pipelines.data.tar_members import lay_out
from pipelines.errors import CodecmillError


class UnreadableSourceError(CodecmillError):
    """A source could be read when its hash was taken, and cannot be read any more."""


class ChangedSourceError(CodecmillError):
    """A source is not what it was when its hash was taken."""


class Job(Section):
    """One source to be encoded for one split."""

    sha256: str
    split: Split
    path: str
    bytes: int
    """Of the image's file."""
    image_sha256: str
    mask: str | None
    mask_sha256: str | None


class EncodingOrder(Section):
    """Some sources to be encoded into a folder: all that a process must know, small, frozen and JSON."""

    folder: Path
    settings: PatchSettings
    compression: Compression
    jobs: tuple[Job, ...]


def encode_sources(order: EncodingOrder) -> None:
    """Encode each source of an order that is not encoded yet.

    One that changed or can no longer be read gets no part, and the others go on: whoever gave the order sees what is
    missing, and learns from `read_source` why.
    """
    for job in order.jobs:
        if read_part(order.folder, job.sha256, job.split) is None:
            with suppress(UnreadableSourceError, ChangedSourceError):
                _encode(job, order)


def read_source(job: Job) -> tuple[bytes, bytes | None]:
    """The content of a source and of its mask, as they were when their hashes were taken.

    Raises:
        UnreadableSourceError: one of the two cannot be read.
        ChangedSourceError: one of the two has another hash.
    """
    mask = _unchanged(job.mask, job.mask_sha256, "its mask ") if job.mask and job.mask_sha256 else None
    return _unchanged(job.path, job.image_sha256, ""), mask


def _encode(job: Job, order: EncodingOrder) -> None:
    with writing_part(part_file(order.folder, job.sha256, job.split)) as stream:
        describe(stream, _write(stream, job, order))


def _write(stream: IO[bytes], job: Job, order: EncodingOrder) -> Part:
    """Write the samples of a source, if it gives any."""
    about: dict[str, Any] = {"sha256": job.sha256, "split": job.split}
    content, mask_content = read_source(job)
    try:
        notes: list[str] = []
        image = open_image(content, order.settings.background, notes)
        mask = open_mask(mask_content) if mask_content is not None else None
    except ImageError as error:
        return Part(**about, status="broken", reason=str(error))
    if mask is not None and mask.size != image.size:
        sizes = f"{mask.width} x {mask.height} pixels, the image {image.width} x {image.height}"
        return Part(**about, status="broken", reason=f"its mask {job.mask} has {sizes}")
    about |= {"width": image.width, "height": image.height, "note": "; ".join(notes)}
    if job.split == "test":
        boxes: list[Box] = [(0, 0, *image.size)]
        about["pixels_sha256"] = _pixels_sha256(image, mask)
    elif (size := math.prod(enlarged_size(image.size, order.settings))) > MAX_PIXELS:
        reason = f"{_size(image)}, brought to a patch's side ({order.settings.small_images}), would be {size:,}"
        # Not broken: for the test split it may be whole.
        return Part(**about, status="skipped", reason=f"{reason}, and more than {MAX_PIXELS:,}")
    else:
        image, mask = enlarge(image, mask, order.settings)
        boxes = choose_patches(image, order.settings, job.sha256)
    if not boxes:
        return Part(**about, status="skipped", reason=_why_no_patch(image, order.settings))
    return Part(**about, status="used", **_write_samples(stream, job, _cut(image, mask, boxes), order.compression))


def _unchanged(path: str, sha256: str, what: str) -> bytes:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        which = f"{what}{path} " if what else "it "
        reason = error.strerror or str(error)
        raise UnreadableSourceError(f"{which}could no longer be read when its turn came: {reason}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ChangedSourceError(
            f"{path} changed while the shards were being made. Run again once it stays as it is; what is encoded is "
            "kept."
        )
    return content


def _why_no_patch(image: Image.Image, settings: PatchSettings) -> str:
    side = settings.patch_size
    if min(image.size) < side:
        return f"{_size(image)} are smaller than a patch of {side}"
    return f"no patch has a detail of {settings.min_detail:g} (data.min_detail)"


def _size(image: Image.Image) -> str:
    return f"its {image.width} x {image.height} pixels"


def _pixels_sha256(image: Image.Image, mask: Image.Image | None) -> str:
    digest = hashlib.sha256(f"{image.width} {image.height} ".encode())
    digest.update(image.tobytes())
    digest.update(mask.tobytes() if mask else b"")
    return digest.hexdigest()


@dataclass(frozen=True)
class _Cut:
    box: Box
    image: Image.Image
    mask: Image.Image | None


def _cut(image: Image.Image, mask: Image.Image | None, boxes: list[Box]) -> Iterator[_Cut]:
    for box in boxes:
        yield _Cut(box, image.crop(box), mask.crop(box) if mask else None)


def _write_samples(stream: IO[bytes], job: Job, cuts: Iterator[_Cut], compression: Compression) -> dict[str, Any]:
    """Write a sample for each cut; returns what a `Part` tells of them."""
    spans: list[list[int]] = []
    moments = Moments()
    end = 0
    for number, cut in enumerate(cuts):
        left, top, right, bottom = cut.box
        info = {"source": job.sha256, "box": [left, top, right - left, bottom - top], "split": job.split}
        sample = {"json": canonical(info), "png": write_png(cut.image, compression)}
        if cut.mask is not None:
            sample["mask.png"] = write_png(cut.mask, compression)
        pieces, places = lay_out(f"{job.sha256[:16]}_{number:05d}", sample)
        stream.writelines(pieces)
        size = sum(map(len, pieces))
        checksum = reduce(lambda crc, piece: isal_zlib.crc32(piece, crc), pieces, 0)
        spans.append([end, size, *places["json"], *places.get("mask.png", (0, 0)), *places["png"], checksum])
        end += size
        moments.add(cut.image)
    about = {"pixels": moments.pixels, "sums": moments.sums, "squares": moments.squares}
    return {"tar_bytes": end, "samples": len(spans), "spans": spans, **about}
