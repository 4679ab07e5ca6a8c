"""Pictures to `.cmill` files and back, by a codec that a few steps have trained: it is as large as a good one."""

from pathlib import Path
from typing import Any

import torch

from infra.bench.process_tree import Stretch
from infra.bench.programs.serving import Measure, Parameters, figures, serve
from infra.bench.programs.train import begun
from pipelines.codec.container import parse
from pipelines.codec.opening import codec_of
from pipelines.codec.picture_codec import PictureCodec
from pipelines.data.images import open_image
from pipelines.data.shard_set import ShardSet
from pipelines.training import launch

QUALITY = 50.0


def prepare(parameters: Parameters) -> Measure:
    """Parameters: `shard_set`; `data`, `model` and `training`, as in a config; `files`; `part`, encode or decode."""
    codec = _trained(parameters)
    torch.set_num_threads(1)
    step = codec.step_of(QUALITY)
    pictures = [open_image(Path(file)) for file in parameters["files"]]
    pixels = sum(picture.width * picture.height for picture in pictures)
    coded = [codec.encode(picture, step) for picture in pictures]
    bits = 8 * sum(map(len, coded)) / pixels

    def measure(number: int) -> dict[str, Any]:
        with Stretch() as stretch:
            if parameters["part"] == "encode":
                for picture in pictures:
                    codec.encode(picture, step)
            else:
                for content in coded:
                    codec.decode(parse(content, "a picture"))
        return figures(stretch, pixels, bits_per_pixel=bits)

    return measure


def _trained(parameters: Parameters) -> PictureCodec:
    run = begun(Path(parameters["folder"]), "codec", ShardSet.open(Path(parameters["shard_set"])), parameters)
    with run.locked() as lock:
        return codec_of(launch.train(run, lock, on_line=lambda line: None))


if __name__ == "__main__":
    serve(prepare)
