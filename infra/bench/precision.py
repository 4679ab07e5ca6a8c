"""Whether half the digits cost anything: the loss that trainings reach in bf16, over float32's: `python -m
infra.bench.precision`, some six minutes on two cores.

The same samples in the same order from the same first weights, for some seeds. A single step's loss is that of its few
samples, so the last ones are taken together.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from flows.cli.demo import find_photographs
from infra.bench.programs.train import begun
from pipelines.config import RunConfig
from pipelines.data.shards import create_shards
from pipelines.training import launch
from pipelines.training.journal import read

SEEDS = (0, 1, 2)
STEPS, LAST = 800, 200
MODELS = {"autoencoder": {}, "codec": {"entropy": "hyperprior"}}


def main() -> int:
    """Train all of them, and print the ratios."""
    with tempfile.TemporaryDirectory(prefix="codecmill-precision-") as scratch:
        root = Path(scratch)
        (root / "photographs.txt").write_text("".join(f"{file.absolute()}\n" for file in find_photographs()))
        for model, choices in MODELS.items():
            for seed in SEEDS:
                reached = {
                    each: _trained(root, f"{model}-{seed}-{each}", choices, seed, each) for each in ("float32", "bf16")
                }
                for what in reached["float32"]:
                    ours, theirs = reached["bf16"][what], reached["float32"][what]
                    print(
                        f"{model}, seed {seed}, {what}: {ours:.6g} over {theirs:.6g} is {ours / theirs:.4f}", flush=True
                    )
    return 0


def _trained(root: Path, name: str, model: dict[str, str], seed: int, precision: str) -> dict[str, float]:
    """The mean loss of a training's last steps, and that of the validation split at its end."""
    parameters = {
        "seed": seed,
        "data": {"images": str(root / "photographs.txt"), "patch_size": 128},
        "model": model,
        "training": {
            "steps": STEPS,
            "batch_size": 16,
            "crop_size": 64,
            "precision": precision,
            "validation_interval": STEPS,
            "checkpoint_interval": STEPS,
        },
    }
    shard_set = create_shards(RunConfig.model_validate({"root": str(root), **parameters}))
    run = begun(root, name, shard_set, parameters)
    with run.locked() as lock:
        launch.train(run, lock, on_line=lambda line: None)
    lines = list(read(run.journal))
    losses = [line["train/loss"] for line in lines if line["step"] > STEPS - LAST]
    return {"last steps": statistics.fmean(losses), "validation": lines[-1]["validation/loss"]}


if __name__ == "__main__":
    sys.exit(main())
