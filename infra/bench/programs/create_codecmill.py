"""Shards by codecmill: hashing, statistics, checksums, index and manifest included."""

from pathlib import Path

from infra.bench.programs.creating import rounds_of
from infra.bench.programs.serving import Measure, Parameters, serve
from pipelines.config import RunConfig
from pipelines.data.shards import create_shards


def prepare(parameters: Parameters) -> Measure:
    """Parameters: `files`; `folder`; `workers`, processes."""

    def create(files: list[str], folder: Path) -> tuple[int, Path]:
        listed = folder / "photographs.txt"
        listed.write_text("".join(f"{file}\n" for file in files))
        shard_set = create_shards(config_of(folder, listed, parameters["workers"]))
        return sum(shard_set.counts("train")), shard_set.path

    return rounds_of(create, parameters)


def config_of(root: Path, listed: Path, workers: int) -> RunConfig:
    """All photographs cut into training patches, so that everybody has the same ones."""
    data = {"images": str(listed), "workers": workers, "validation_fraction": 0.0, "test_fraction": 0.0}
    return RunConfig.model_validate({"name": "bench", "root": str(root), "data": data})


if __name__ == "__main__":
    serve(prepare)
