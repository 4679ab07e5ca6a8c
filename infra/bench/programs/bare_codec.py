"""What the parts cost alone: opening the photographs, encoding and decoding PNG, with nothing written or shuffled."""

import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image, decode_png, encode_png, read_file
from torchvision.transforms.functional import pil_to_tensor

from infra.bench.process_tree import Stretch
from infra.bench.programs.creating import patches, png
from infra.bench.programs.serving import Measure, Parameters, figures, serve


def prepare(parameters: Parameters) -> Measure:
    """Parameters: `files`, the sheets; `samples`, a folder of PNG files; `part`, which of the parts below."""
    torch.set_num_threads(1)
    do, things, count = _PARTS[parameters["part"]](parameters)

    def measure(number: int) -> dict[str, float]:
        with Stretch() as stretch:
            for thing in things:
                do(thing)
        return figures(stretch, count)

    return measure


Part = tuple[Callable[[Any], object], list[Any], int]
"""What is done to each of some things, and how many patches that makes."""


def _cut(parameters: Parameters) -> Part:
    files = parameters["files"]
    return lambda file: list(patches([file])), files, sum(1 for _ in patches(files))


def _open_by_torchvision(parameters: Parameters) -> Part:
    files = parameters["files"]
    return (
        lambda file: decode_image(read_file(file), ImageReadMode.RGB),
        files,
        sum(1 for _ in patches(files)),
    )


def _encode(level: int | None) -> Callable[[Parameters], Part]:
    def part(parameters: Parameters) -> Part:
        images = list(patches(parameters["files"]))
        return lambda image: png(image, level), images, len(images)

    return part


def _encode_by_torchvision(parameters: Parameters) -> Part:
    images = [pil_to_tensor(image) for image in patches(parameters["files"])]
    return lambda image: encode_png(image, 1), images, len(images)


def _stored(parameters: Parameters) -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(parameters["samples"]).rglob("*.png"))]


def _decode(parameters: Parameters) -> Part:
    contents = _stored(parameters)
    return lambda content: Image.open(io.BytesIO(content)).load(), contents, len(contents)


def _decode_by_torchvision(parameters: Parameters) -> Part:
    tensors = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in _stored(parameters)]
    return lambda tensor: decode_png(tensor), tensors, len(tensors)


def _inflate(parameters: Parameters) -> Part:
    streams = [_compressed(content) for content in _stored(parameters)]
    return zlib.decompress, streams, len(streams)


def _compressed(content: bytes) -> bytes:
    """The zlib stream of a PNG file: its IDAT chunks joined."""
    found, at = [], 8
    while at < len(content):
        size, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        if kind == b"IDAT":
            found.append(content[at + 8 : at + 8 + size])
        at += size + 12
    return b"".join(found)


_PARTS: dict[str, Callable[[Parameters], Part]] = {
    "open and cut, Pillow": _cut,
    "open, torchvision": _open_by_torchvision,
    "encode, Pillow's default": _encode(None),
    "encode, Pillow level 1": _encode(1),
    "encode, torchvision level 1": _encode_by_torchvision,
    "decode, Pillow": _decode,
    "decode, torchvision": _decode_by_torchvision,
    "decode, zlib's inflate alone": _inflate,
}

if __name__ == "__main__":
    serve(prepare)
