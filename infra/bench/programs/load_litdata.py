"""Loading by litdata's StreamingDataset and StreamingDataLoader; it decodes to tensors by itself."""

import time
from pathlib import Path
from typing import Any

import litdata  # pyright: ignore[reportMissingImports]  # of the peers' environment

from infra.bench.programs.reading import BATCH, of_tensors, timed
from infra.bench.programs.serving import Measure, Parameters, serve


class Photographs(litdata.StreamingDataset):
    """Prepares each sample where it is read, as litdata's documentation has it."""

    def __init__(self, **given: Any):
        super().__init__(**given)
        self.prepared = of_tensors()

    def __getitem__(self, at: Any) -> Any:
        return self.prepared(super().__getitem__(at)["image"])


def prepare(parameters: Parameters) -> Measure:
    folder = str(Path(parameters["formats"], "litdata"))

    def measure(number: int) -> dict[str, float]:
        started = time.perf_counter()
        data = Photographs(input_dir=folder, shuffle=True, drop_last=True, seed=number)
        loader = litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=parameters["workers"], drop_last=True)
        return timed(started, iter(loader), parameters["patches"])

    return measure


if __name__ == "__main__":
    serve(prepare)
