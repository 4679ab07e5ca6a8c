"""Shards by litdata's optimize, with its own encoding of PNG; it starts its worker processes each time."""

import os
from collections.abc import Iterator
from pathlib import Path

import litdata  # pyright: ignore[reportMissingImports]  # of the peers' environment

from infra.bench.programs.creating import patches, rounds_of
from infra.bench.programs.serving import Measure, Parameters, serve

A_SHEET = 24
"""Patches."""


def cut(file: str) -> Iterator[dict[str, litdata.Image]]:
    """All samples of one photograph."""
    for image in patches([file]):
        yield {"image": litdata.Image(image=image, format="png")}


def keep_together(folder: str) -> None:
    """Have litdata keep below a folder what it would leave in the temporary folder of the machine."""
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = f"{folder}-chunks"
    os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = f"{folder}-data"


def prepare(parameters: Parameters) -> Measure:
    """Parameters: `files`; `folder`; `workers`, processes."""
    keep_together(parameters["folder"])

    def create(files: list[str], folder: Path) -> tuple[int, Path]:
        litdata.optimize(
            fn=cut,
            inputs=files,
            output_dir=str(folder / "optimized"),
            chunk_bytes="64MB",
            num_workers=parameters["workers"],
            verbose=False,
        )
        return len(files) * A_SHEET, folder

    return rounds_of(create, parameters)


if __name__ == "__main__":
    serve(prepare)
