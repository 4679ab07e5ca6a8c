"""Loading by webdataset's WebDataset and WebLoader, as its documentation has it: shuffle, decode, map, batch."""

import time
from pathlib import Path

import webdataset as wds

from infra.bench.programs.reading import BATCH, of_pictures, timed
from infra.bench.programs.serving import Measure, Parameters, serve


def prepare(parameters: Parameters) -> Measure:
    tars = sorted(str(path) for path in Path(parameters["formats"], "webdataset").glob("*.tar"))

    def measure(number: int) -> dict[str, float]:
        started = time.perf_counter()
        data = (
            wds.WebDataset(tars, shardshuffle=len(tars), seed=number)  # pyright: ignore
            .shuffle(1000)
            .decode("pil")
            .to_tuple("png")
            .map_tuple(of_pictures())
            .batched(BATCH, partial=False)
        )
        batches = iter(wds.WebLoader(data, batch_size=None, num_workers=parameters["workers"]))  # pyright: ignore
        return timed(started, (images for (images,) in batches), parameters["patches"])

    return measure


if __name__ == "__main__":
    serve(prepare)
