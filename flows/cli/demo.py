"""The demo: the photographs that scikit-image and scikit-learn bring along, and a config small enough for two cores."""

import importlib.util
from pathlib import Path

from flows.cli.config_file import Values
from pipelines.durable_files import write_bytes
from pipelines.errors import InputError

# Photographs only. motorcycle_right.png is left out: it shows what motorcycle_left.png shows, and one of the two in
# the test split would be half known from training.
PHOTOGRAPHS = {
    "skimage": [
        *("data/astronaut.png", "data/brick.png", "data/camera.png", "data/chelsea.png", "data/coffee.png"),
        *("data/coins.png", "data/grass.png", "data/gravel.png", "data/hubble_deep_field.jpg", "data/ihc.png"),
        *("data/moon.png", "data/motorcycle_left.png", "data/retina.jpg", "data/rocket.jpg"),
    ],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
}
FEWEST = 8
"""Below this many photographs, neither a split nor a training makes sense."""


def demo_values(root: Path) -> Values:
    """The demo's config as nested values; writes the list of photographs that it names.

    Raises:
        InputError: the packages that bring the photographs are not installed.
    """
    photographs = find_photographs()
    if len(photographs) < FEWEST:
        raise InputError(
            f"The demo takes its photographs from scikit-image and scikit-learn, but only {len(photographs)} of them "
            "are there. Install both: pip install scikit-image scikit-learn"
        )
    listed = root.absolute() / "demo" / "photos.txt"
    content = "".join(f"{path}\n" for path in photographs).encode()
    if not listed.is_file() or listed.read_bytes() != content:
        write_bytes(listed, content)
    return {
        "name": "demo",
        "root": str(root),
        "data": {
            "images": str(listed),
            "patch_size": 128,
            "max_patches_per_image": 64,
            # Hashes split so few images unevenly: these fractions leave three to validate and three to test.
            "validation_fraction": 0.16,
            "test_fraction": 0.36,
        },
        "model": {"channels": 32, "latent_channels": 12},
        "training": {
            "steps": 2400,
            "batch_size": 16,
            "crop_size": 64,
            "learning_rate": 2e-3,
            "checkpoint_interval": 400,
            "validation_interval": 400,
        },
    }


def find_photographs() -> list[Path]:
    """The photographs that are installed, without importing the packages that bring them."""
    found: list[Path] = []
    for package, names in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            paths = [Path(spec.origin).parent / name for name in names]
            found += [path for path in paths if path.is_file()]
    return found
