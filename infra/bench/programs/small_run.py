"""The small complete run by which the DAG's own cost is measured: a few steps on small pictures."""

from pathlib import Path
from typing import Any

from pipelines.config import RunConfig


def values(root: Path, images: str, number: int) -> dict[str, Any]:
    """The config of run `number`, as nested values; each number makes shards of its own."""
    return on_cpu(
        {
            "name": f"small-{number:02d}",
            "root": str(root),
            "data": {"images": images, "patch_size": 64, "max_patches_per_image": 40 + number, "test_fraction": 0.2},
            "model": {"channels": 16, "latent_channels": 8},
            "training": {"steps": 60, "batch_size": 8, "crop_size": 32},
        }
    )


def config(root: Path, images: str, number: int) -> RunConfig:
    return RunConfig.model_validate(values(root, images, number))


def on_cpu(values: dict[str, Any]) -> dict[str, Any]:
    """A config's nested values, for a training on the CPU: `auto` refuses two ranks where there is one GPU."""
    return {**values, "training": {"device": "cpu", **values.get("training", {})}}
