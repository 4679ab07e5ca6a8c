"""One changed byte anywhere in what a run stands on is named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make
from test_pipeline import clean_environment
from test_training import PROJECT, begin, train

from pipelines.run_directory import RunDirectory
from pipelines.verification import verify
from pipelines.weights import read_weights
from tasks.checkpoints import record_shard_set, shard_set_at
from tasks.values import HeldRun


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> RunDirectory:
    """A run that began with the weights of another, on images of its own."""
    root = tmp_path_factory.mktemp("verified")
    shutil.copytree(photos, root / "images")
    data = {"images": str(root / "images"), "patch_size": 32, "workers": 1, "validation_fraction": 0.2}
    training = {"steps": 4, "batch_size": 4, "crop_size": 16, "precision": "float32", "checkpoint_interval": 2}
    model = {"channels": 8, "latent_channels": 4, "downsamplings": 2}
    values: dict[str, Any] = {"root": str(root), "data": data, "model": model, "training": training}
    first = begin(make(values, name="first"))
    last = train(first)
    run = begin(make(values, name="second", training={"start_from": str(last.path)}))
    held = HeldRun(path=run.path, lock=-1)
    record_shard_set(held, shard_set_at(Path(json.loads(run.shard_set_file.read_text())["path"])))
    train(run)
    assert read_weights(run.start_weights / "model.safetensors")
    return run


def test_what_is_as_it_was_passes_and_is_counted(trained: RunDirectory):
    found = verify(trained, sources=True)
    assert found.faults == ()
    tars = list(trained.root.shards.glob("*/*.tar"))
    assert found.files == 2 * 4 + 1 + 1 + 3 * len(tars) + 12  # checkpoints, parent, manifest, shards, images


@pytest.mark.parametrize(
    "pattern",
    [
        "runs/second/checkpoints/step_00000002/model.safetensors",
        "runs/second/checkpoints/step_00000004/training_state.safetensors",
        "runs/second/checkpoints/step_00000004/training_state.json",
        "runs/second/checkpoints/step_00000004/checkpoint.json",
        "runs/second/start_from/model.safetensors",
        "shards/*/manifest.json",
        "shards/*/train-000000.tar",
        "shards/*/train-000000.index",
        "shards/*/train-000000.sources.jsonl",
        "shards/*/test-*.tar",
        "images/photo 03.png",
    ],
)
def test_one_changed_byte_is_named(trained: RunDirectory, pattern: str):
    file = next(trained.root.path.glob(pattern))
    before = file.read_bytes()
    digits = [place for place in range(len(before) // 2, len(before)) if before[place : place + 1].isdigit()]
    place = digits[0] if file.suffix in (".json", ".jsonl") and digits else len(before) // 2
    changed = bytearray(before)
    changed[place] ^= 1
    file.write_bytes(changed)
    try:
        faults = verify(trained, sources=True).faults
        assert any(str(file) in fault for fault in faults), faults
        file.unlink()
        assert any(str(file.name) in fault or str(file.parent) in fault for fault in verify(trained, True).faults)
    finally:
        file.write_bytes(before)
    assert verify(trained, sources=True).faults == ()


def test_the_command_says_what_is_wrong_and_ends_with_1(trained: RunDirectory):
    command = [sys.executable, "-m", "flows", "verify", "second", "--root", str(trained.root.path), "--sources"]
    options: dict[str, Any] = {"cwd": PROJECT, "env": clean_environment(), "capture_output": True, "text": True}
    done = subprocess.run(command, **options, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "are what was written" in done.stdout
    image = trained.root.path / "images" / "photo 05.png"
    before = image.read_bytes()
    image.write_bytes(before[:-1])
    try:
        done = subprocess.run([*command, "--json"], **options, timeout=60)
    finally:
        image.write_bytes(before)
    assert done.returncode == 1
    (fault,) = json.loads(done.stdout)["faults"]
    assert str(image) in fault
    assert "The verification of 'second' found 1 faults." in done.stderr
