"""Loading by MosaicML streaming's StreamingDataset, in torch's DataLoader."""

import io
import time
from pathlib import Path
from typing import Any

from PIL import Image
from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]  # of the peers' environment
from streaming.base.util import clean_stale_shared_memory  # pyright: ignore[reportMissingImports]
from torch.utils.data import DataLoader

from infra.bench.programs.reading import BATCH, of_pictures, timed
from infra.bench.programs.serving import Measure, Parameters, serve


class Photographs(StreamingDataset):
    """Decodes as its own encoding 'png' does, which would not have stored the bytes that it is given."""

    def __init__(self, **given: Any):
        super().__init__(**given)
        self.prepared = of_pictures()

    def __getitem__(self, at: int) -> Any:
        return self.prepared(Image.open(io.BytesIO(super().__getitem__(at)["image"])))


def prepare(parameters: Parameters) -> Measure:
    clean_stale_shared_memory()
    local = str(Path(parameters["formats"], "mosaicml"))

    def measure(number: int) -> dict[str, float]:
        started = time.perf_counter()
        data = Photographs(local=local, shuffle=True, batch_size=BATCH)
        loader = DataLoader(data, BATCH, num_workers=parameters["workers"], drop_last=True)
        try:
            return timed(started, iter(loader), parameters["patches"])
        finally:
            del loader, data
            clean_stale_shared_memory()

    return measure


if __name__ == "__main__":
    serve(prepare)
