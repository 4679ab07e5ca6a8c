"""From one source to its part of a tar: decoded, cut, encoded, written whole or not at all, in any process."""

import hashlib
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from pipelines.config import Section
from pipelines.data.images import ImageError, open_image, open_mask
from pipelines.data.moments import Moments
from pipelines.data.patches import Box, PatchSettings, choose_patches, enlarge
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
    image_sha256: str
    mask: str | None
    mask_sha256: str | None


class EncodingOrder(Section):
    """Some sources to be encoded into a folder: all that a process must know, small, frozen and JSON."""

    folder: Path
    settings: PatchSettings
    compression: Compression
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Part:
    """What became of one source, and where the samples lie in its part; the columns of `spans` are those of SPAN."""

    sha256: str
    split: Split
    status: Literal["used", "skipped", "broken"]
    reason: str = ""
    width: int = 0
    height: int = 0
    tar_bytes: int = 0
    pixels: int = 0
    sums: list[int] = field(default_factory=lambda: [0, 0, 0])
    squares: list[int] = field(default_factory=lambda: [0, 0, 0])
    pixels_sha256: str | None = None
    samples: int = 0
    note: str = ""
    spans: list[list[int]] = field(default_factory=list)


_PART = TypeAdapter(Part)


def part_files(folder: Path, sha256: str, split: str) -> tuple[Path, Path]:
    """The tar part (without the end-of-archive blocks) and its description, which is written last."""
    return folder / f"{sha256}.{split}.tar-part", folder / f"{sha256}.{split}.json"


def read_part(folder: Path, sha256: str, split: str) -> Part | None:
    """The complete part of a source, or None."""
    tar, description = part_files(folder, sha256, split)
    try:
        part = _PART.validate_json(description.read_bytes())
        return part if tar.stat().st_size == part.tar_bytes else None
    except (OSError, ValidationError):
        return None


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
    tar, description = part_files(order.folder, job.sha256, job.split)
    temporary = [file.with_name(f".tmp-{os.getpid()}-{file.name}") for file in (tar, description)]
    try:
        part = _write_tar(temporary[0], job, order)
        temporary[0].replace(tar)
        temporary[1].write_bytes(canonical(vars(part)))
        temporary[1].replace(description)
    finally:
        for file in temporary:
            file.unlink(missing_ok=True)


def _write_tar(file: Path, job: Job, order: EncodingOrder) -> Part:
    settings = order.settings
    about: dict[str, Any] = {"sha256": job.sha256, "split": job.split}
    content, mask_content = read_source(job)
    file.touch()
    try:
        notes: list[str] = []
        image = open_image(content, settings.background, notes)
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
    else:
        image, mask = enlarge(image, mask, settings)
        boxes = choose_patches(image, settings, job.sha256)
    if not boxes:
        return Part(**about, status="skipped", reason=_why_no_patch(image, settings))
    return _write_samples(file, job, _cut(image, mask, boxes), order.compression, about)


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
        return f"its {image.width} x {image.height} pixels are smaller than a patch of {side}"
    return f"no patch has a detail of {settings.min_detail:g} (data.min_detail)"


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


def _write_samples(file: Path, job: Job, cuts: Iterator[_Cut], compression: Compression, about: dict[str, Any]) -> Part:
    spans: list[list[int]] = []
    moments = Moments()
    end = 0
    with file.open("wb") as stream:
        for number, cut in enumerate(cuts):
            left, top, right, bottom = cut.box
            info = {"source": job.sha256, "box": [left, top, right - left, bottom - top], "split": job.split}
            sample = {"json": canonical(info), "png": write_png(cut.image, compression)}
            if cut.mask is not None:
                sample["mask.png"] = write_png(cut.mask, compression)
            pieces, places = lay_out(f"{job.sha256[:16]}_{number:05d}", sample)
            stream.writelines(pieces)
            size = sum(map(len, pieces))
            checksum = reduce(lambda crc, piece: zlib.crc32(piece, crc), pieces, 0)
            spans.append([end, size, *places["json"], *places.get("mask.png", (0, 0)), *places["png"], checksum])
            end += size
            moments.add(cut.image)
    return Part(**about, **vars(moments), status="used", tar_bytes=end, samples=len(spans), spans=spans)
