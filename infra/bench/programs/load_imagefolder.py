"""Loading by torchvision's ImageFolder and torch's DataLoader."""

import time
from pathlib import Path

from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from infra.bench.programs.reading import BATCH, of_pictures, timed
from infra.bench.programs.serving import Measure, Parameters, serve


def prepare(parameters: Parameters) -> Measure:
    def measure(number: int) -> dict[str, float]:
        started = time.perf_counter()
        data = ImageFolder(str(Path(parameters["formats"], "folder")), of_pictures())
        loader = DataLoader(data, BATCH, shuffle=True, num_workers=parameters["workers"], drop_last=True)
        return timed(started, (images for images, _ in loader), parameters["patches"])

    return measure


if __name__ == "__main__":
    serve(prepare)
