"""Shards by webdataset's ShardWriter, with Pillow's PNG of a level that is given."""

from pathlib import Path

import webdataset as wds

from infra.bench.programs.creating import patches, png, rounds_of
from infra.bench.programs.serving import Measure, Parameters, serve


def prepare(parameters: Parameters) -> Measure:
    """Parameters: `files`; `folder`; `level` of zlib, null for Pillow's default."""

    def create(files: list[str], folder: Path) -> tuple[int, Path]:
        count = 0
        with wds.ShardWriter(f"{folder}/%06d.tar", verbose=0) as writer:  # pyright: ignore
            for image in patches(files):
                writer.write({"__key__": f"{count:08d}", "png": png(image, parameters["level"])})
                count += 1
        return count, folder

    return rounds_of(create, parameters)


if __name__ == "__main__":
    serve(prepare)
