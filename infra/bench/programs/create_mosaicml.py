"""Shards by MosaicML streaming's MDSWriter, with its own encoding of PNG."""

from pathlib import Path

from streaming import MDSWriter  # pyright: ignore[reportMissingImports]  # of the peers' environment

from infra.bench.programs.creating import patches, rounds_of
from infra.bench.programs.serving import Measure, Parameters, serve


def create(files: list[str], folder: Path) -> tuple[int, Path]:
    count = 0
    with MDSWriter(out=str(folder / "mds"), columns={"image": "png"}) as writer:
        for image in patches(files):
            writer.write({"image": image})
            count += 1
    return count, folder


def prepare(parameters: Parameters) -> Measure:
    """Parameters: `files`; `folder`."""
    return rounds_of(create, parameters)


if __name__ == "__main__":
    serve(prepare)
