"""Checkpoints: whole or invisible, verified byte by byte, and the right ones kept."""

import hashlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines import checkpoint_format, checkpoints
from pipelines.config import ModelConfig
from pipelines.durable_files import json_bytes
from pipelines.errors import CodecmillError
from pipelines.run_directory import RunDirectory
from pipelines.sealed_json import read_sealed, write_sealed
from pipelines.tracking.marks import unsent_checkpoints


def save(
    run: RunDirectory,
    step: int,
    value: float = 1.0,
    best: dict[str, float] | None = None,
    weights: dict[str, torch.Tensor] | None = None,
    shard_set: str = "0" * 64,
    parent: str | None = None,
    training: dict[str, Any] | None = None,
    model: ModelConfig | None = None,
):
    about: dict[str, Any] = {
        "step": step,
        "position": step * 16,
        "model": model or ModelConfig(),
        "normalization": {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)},
        "shard_set": shard_set,
        "parent": parent,
        "config": training and {"training": training},
        "validation": {},
        "best": best,
        "versions": {"torch": "2"},
    }
    weights = weights or {"encoder.w": torch.full((3, 4), value), "decoder.b": torch.arange(5.0)}
    moments = {"exp_avg/encoder.w": torch.zeros(3, 4)}
    return checkpoints.save(run, about, weights, moments, {"optimizer": "adam", "scaler": {}})


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "r")


def test_a_saved_checkpoint_is_found_with_its_tensors_and_digests(run: RunDirectory):
    save(run, 10, value=2.5)
    found = checkpoints.latest(run)
    assert found is not None
    assert found.step == 10
    assert found.manifest.position == 160
    weights = load_file(found.path / "model.safetensors")
    assert torch.equal(weights["encoder.w"], torch.full((3, 4), 2.5))
    assert found.sha256 == hashlib.sha256((found.path / "model.safetensors").read_bytes()).hexdigest()
    assert not list(run.checkpoints.glob(".tmp-*"))


def test_the_same_tensors_make_the_same_bytes(run: RunDirectory, tmp_path: Path):
    other = RunDirectory(tmp_path / "runs" / "other")
    save(run, 10)
    save(other, 10)
    for name in ("model.safetensors", "training_state.safetensors", "training_state.json"):
        assert (run.checkpoints / "step_00000010" / name).read_bytes() == (
            other.checkpoints / "step_00000010" / name
        ).read_bytes()


def test_channels_last_tensors_are_saved_by_value(run: RunDirectory):
    weight = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    about = save(run, 1).manifest.model_dump(exclude={"files", "format_version", "run"}) | {"step": 2}
    saved = checkpoints.save(run, about, {"w": weight}, {}, {})
    assert torch.equal(load_file(saved.path / "model.safetensors")["w"], weight)


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.safetensors", "training_state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    run: RunDirectory, name: str, damage: str, caplog: pytest.LogCaptureFixture
):
    save(run, 10)
    save(run, 20)
    file = run.checkpoints / "step_00000020" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    match damage:
        case "flip":
            file.write_bytes(content)
        case "cut":
            file.write_bytes(content[:-1])
        case "remove":
            file.unlink()
    with caplog.at_level(logging.WARNING):
        found = checkpoints.latest(run)
    assert found is not None
    assert found.step == 10
    assert str(file) in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format_version": 99}', b'{"format_version": 1}', b"\xff"])
def test_a_damaged_manifest_is_passed_over(run: RunDirectory, content: bytes):
    save(run, 10)
    save(run, 20)
    (run.checkpoints / "step_00000020" / "checkpoint.json").write_bytes(content)
    found = checkpoints.latest(run)
    assert found is not None
    assert found.step == 10


def test_every_byte_of_the_manifest_counts(run: RunDirectory):
    file = save(run, 10).path / "checkpoint.json"
    content = file.read_bytes()
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CodecmillError, match=re.escape(str(file))):
            checkpoint_format.read_manifest(file.parent)
    file.write_bytes(content)
    assert checkpoint_format.read_manifest(file.parent).step == 10


def test_a_manifest_from_before_there_were_seals_is_read_and_one_that_lost_its_seal_is_not(run: RunDirectory):
    file = save(run, 10).path / "checkpoint.json"
    value, is_sealed = read_sealed(file)
    assert is_sealed
    file.write_bytes(json_bytes(value))
    assert checkpoints.open_checkpoint(file.parent).step == 10
    file.write_bytes(json_bytes(value | {"config": {}}))
    with pytest.raises(
        CodecmillError, match=r"checkpoint\.json was altered after it was written: it has lost its seal"
    ):
        checkpoints.open_checkpoint(file.parent)


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a/b", ".tmp-x", ""])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(run: RunDirectory, name: str):
    file = save(run, 10).path / "checkpoint.json"
    value, _ = read_sealed(file)
    write_sealed(file, value | {"files": {**value["files"], name: {"bytes": 1, "sha256": "0" * 64}}})
    with pytest.raises(CodecmillError, match=r"checkpoint\.json is damaged: files.*pattern"):
        checkpoints.open_checkpoint(file.parent)


def test_when_all_are_damaged_nothing_is_deleted_and_the_message_says_so(run: RunDirectory):
    save(run, 10)
    (run.checkpoints / "step_00000010" / "checkpoint.json").write_bytes(b"")
    with pytest.raises(CodecmillError, match=r"Every checkpoint in .* is damaged. Nothing was deleted"):
        checkpoints.latest(run)
    assert (run.checkpoints / "step_00000010" / "model.safetensors").is_file()


def test_a_file_swapped_for_another_of_the_same_size_is_found(run: RunDirectory):
    save(run, 10, value=1.0)
    save(run, 20, value=2.0)
    ten, twenty = (run.checkpoints / f"step_000000{n}0" / "model.safetensors" for n in (1, 2))
    twenty.write_bytes(ten.read_bytes())
    with pytest.raises(CodecmillError, match="was changed: its sha256 is"):
        checkpoints.open_checkpoint(twenty.parent)


def test_the_newest_and_the_best_are_kept(run: RunDirectory):
    best = {"step": 20.0, "psnr": 30.0}
    for step in (10, 20, 30, 40, 50):
        save(run, step, best=best if step >= 20 else None)
    newest = checkpoints.latest(run)
    assert newest is not None
    checkpoints.retain(run, newest, keep_latest=2, spared={30})
    assert checkpoints.steps_on_disk(run) == [20, 30, 40, 50]
    checkpoints.retain(run, newest, keep_latest=2)
    assert checkpoints.steps_on_disk(run) == [20, 40, 50]
    found = checkpoints.best(run)
    assert found is not None
    assert found.step == 20


ROLLBACK = {"on_nonfinite": "rollback", "checkpoint_interval": 500}


def test_copies_beside_a_checkpoint_hide_it_not_and_one_on_another_disk_stays_there(run: RunDirectory, tmp_path: Path):
    first, newest = (save(run, step, step) for step in (10, 20))
    for name in ("step_10", "step_000000010", "step_x"):
        shutil.copytree(first.path, run.checkpoints / name)
    assert checkpoints.steps_on_disk(run) == [10, 20]
    first.path.rename(tmp_path / "moved")
    first.path.symlink_to(tmp_path / "moved")
    checkpoints.retain(run, newest, keep_latest=1)
    assert checkpoints.steps_on_disk(run) == [20]
    assert (tmp_path / "moved" / "checkpoint.json").is_file()


def test_the_checkpoint_that_a_loss_takes_the_run_back_to_is_kept(run: RunDirectory):
    for step in (0, 500, 700):
        newest = save(run, step, training=ROLLBACK)
    checkpoints.retain(run, newest, keep_latest=1)
    assert checkpoints.steps_on_disk(run) == [500, 700], "700 is where the run was stopped"
    newest = save(run, 800, training=ROLLBACK | {"checkpoint_interval": 300})  # of which no multiple is there
    checkpoints.retain(run, newest, keep_latest=1)
    assert checkpoints.steps_on_disk(run) == [500, 800]
    found = checkpoints.latest_regular(run)
    assert found is not None
    assert found.step == 500
    newest = save(run, 900, training=ROLLBACK | {"checkpoint_interval": 300})
    checkpoints.retain(run, newest, keep_latest=1)
    assert checkpoints.steps_on_disk(run) == [900]
    newest = save(run, 950, training={"on_nonfinite": "stop", "checkpoint_interval": 300})
    checkpoints.retain(run, newest, keep_latest=1)
    assert checkpoints.steps_on_disk(run) == [950], "a run that never goes back needs no more"


def test_where_only_a_stop_has_left_a_checkpoint_there_is_none_to_go_back_to_and_none_is_called_damaged(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
):
    save(run, 700, training=ROLLBACK)
    assert checkpoints.latest_regular(run) is None
    assert "damaged" not in caplog.text
    (save(run, 500, training=ROLLBACK).path / "model.safetensors").write_bytes(b"")
    assert checkpoints.latest_regular(run) is None
    assert "step_00000500/model.safetensors has 0 bytes" in caplog.text


def test_retention_never_deletes_the_last_sound_checkpoint(run: RunDirectory):
    for step in (10, 20, 30):
        save(run, step)
    for step in (20, 30):
        (run.checkpoints / f"step_000000{step}" / "checkpoint.json").unlink()
    newest = checkpoints.latest(run)
    assert newest is not None
    checkpoints.retain(run, newest, keep_latest=1)
    found = checkpoints.latest(run)
    assert found is not None
    assert found.step == 10


def test_ten_checkpoints_at_most_wait_for_mlflow_beyond_those_that_a_run_keeps(run: RunDirectory):
    newest = [save(run, step) for step in range(1, 13)][-1]
    checkpoints.retain(run, newest, keep_latest=1, spared=unsent_checkpoints(run))
    assert checkpoints.steps_on_disk(run) == list(range(3, 13))


def test_saving_over_a_damaged_checkpoint_replaces_it_whole(run: RunDirectory):
    save(run, 10, value=1.0)
    (run.checkpoints / "step_00000010" / "model.safetensors").write_bytes(b"")
    save(run, 10, value=3.0)
    found = checkpoints.latest(run)
    assert found is not None
    assert load_file(found.path / "model.safetensors")["encoder.w"][0, 0] == 3.0


SAVE_FOREVER = """
import sys; sys.path[:0] = sys.argv[2:]
from pathlib import Path
from test_checkpoints import save
from pipelines.run_directory import RunDirectory
for step in range(1, 10_000):
    save(RunDirectory(Path(sys.argv[1])), step)
    print(step, flush=True)
"""


def test_a_process_killed_while_saving_leaves_only_sound_checkpoints(run: RunDirectory):
    here = Path(__file__).parent
    for delay in (0.0, 0.003, 0.007, 0.012):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(run.path), str(here), str(here.parent)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        with process.stdout:
            for _ in range(3):
                process.stdout.readline()
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        steps = checkpoints.steps_on_disk(run)
        assert len(steps) >= 3
        assert [c.step for c in checkpoints.sound_checkpoints(run)] == sorted(steps, reverse=True)
    checkpoints.remove_leftovers(run)
    assert not list(run.checkpoints.glob(".tmp-*"))


def test_the_newest_of_a_thousand_is_found_by_its_number(run: RunDirectory):
    template = save(run, 1).path
    for step in range(2, 1001):
        folder = run.checkpoints / f"step_{step:08d}"
        folder.symlink_to(template)
    manifest, _ = read_sealed(template / "checkpoint.json")
    newest = run.checkpoints / "step_00001001"
    newest.mkdir()
    for file in template.iterdir():
        (newest / file.name).write_bytes(file.read_bytes())
    write_sealed(newest / "checkpoint.json", manifest | {"step": 1001})
    found = checkpoints.latest(run)
    assert found is not None
    assert found.step == 1001
