"""The patches that are loaded, once in each peer's format: PNG files, ShardWriter's tars, MDS, litdata's chunks.

All of them get the bytes that codecmill's shard set holds, so that everybody decodes the same files.
"""

from pathlib import Path
from typing import Any

import litdata  # pyright: ignore[reportMissingImports]  # of the peers' environment
import webdataset as wds
from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

from infra.bench.programs.create_litdata import keep_together
from infra.bench.programs.serving import Measure, Parameters, serve

TARS = 16
"""So that two workers get as much each."""


def prepare(parameters: Parameters) -> Measure:
    """Parameters: `samples`, a folder of PNG files; `formats`, where to; `copies`, how often each is stored; `folder`.

    An epoch must be longer than what is measured, or the peers would be seen to start epochs; so few patches are
    stored several times.
    """
    files = sorted(Path(parameters["samples"]).rglob("*.png")) * parameters["copies"]
    formats = Path(parameters["formats"])
    keep_together(parameters["folder"])

    def measure(number: int) -> dict[str, Any]:
        _write_files(files, formats / "folder" / "photographs")
        _write_tars(files, formats / "webdataset")
        _write_mds(files, formats / "mosaicml")
        litdata.optimize(
            fn=_sample,
            inputs=[str(file) for file in files],
            output_dir=str(formats / "litdata"),
            chunk_bytes="64MB",
            num_workers=1,
            verbose=False,
        )
        return {"count": len(files), "seconds": 0.0, "cpu_seconds": 0.0}

    return measure


def _write_files(files: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, file in enumerate(files):
        (folder / f"{number:06d}.png").write_bytes(file.read_bytes())


def _write_tars(files: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    with wds.ShardWriter(f"{folder}/%04d.tar", maxcount=-(-len(files) // TARS), verbose=0) as writer:  # pyright: ignore
        for number, file in enumerate(files):
            writer.write({"__key__": f"{number:06d}", "png": file.read_bytes()})


def _write_mds(files: list[Path], folder: Path) -> None:
    with MDSWriter(out=str(folder), columns={"image": "bytes"}) as writer:
        for file in files:
            writer.write({"image": file.read_bytes()})


def _sample(file: str) -> dict[str, Any]:
    return {"image": litdata.Image(bytes=Path(file).read_bytes())}


if __name__ == "__main__":
    serve(prepare)
