"""A checkpoint is trained again from what it names, whatever became of its run on the way, and its bytes compared."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make
from processes import PROJECT, clean_environment, wait_for
from trainings import begin, ranks_alive, start, steps_done, train

from pipelines import checkpoints
from pipelines.errors import CodecmillError, InputError
from pipelines.provenance.chain import Chain
from pipelines.provenance.locating import find
from pipelines.provenance.reproducing import Reproduction, _lay_out, reproduce
from pipelines.run_directory import Root, RunDirectory
from pipelines.runs import go_on_with, merge, start_or_continue
from pipelines.sealed_json import read_sealed, write_sealed


def again(folder: Path, run: RunDirectory, scratch: Path) -> Reproduction:
    return reproduce(find(str(folder), run.root, scratch), on_line=print)


def kill_in_mid_way(run: RunDirectory, step: int) -> None:
    process = start(run)
    wait_for(lambda: steps_done(run) >= step)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not ranks_alive(run), 30)


@pytest.mark.full
def test_a_checkpoint_that_others_were_wrongly_said_to_have_made_is_found_out(tiny: dict[str, Any], tmp_path: Path):
    run = begin(make(tiny))
    last = train(run)
    command = [sys.executable, "-m", "flows", "reproduce", str(last.path), "--root", str(run.root.path)]
    options: dict[str, Any] = {"cwd": PROJECT, "env": clean_environment(), "capture_output": True, "text": True}
    done = subprocess.run(command, **options, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"Step {last.step} came out the same, bit for bit" in done.stdout
    assert last.sha256 in done.stdout
    assert [each.name for each in run.root.runs.iterdir()] == [run.path.name], "nothing is left beside the run"
    value, _ = read_sealed(last.path / "checkpoint.json")
    value["config"]["seed"] += 1
    write_sealed(last.path / "checkpoint.json", value)
    done = subprocess.run(command, **options, timeout=120)
    assert done.returncode == 1
    assert f"{last.path} was not reproduced: model.safetensors, training_state.safetensors came out" in done.stderr


@pytest.mark.full
def test_a_reproduction_that_failed_is_tried_anew_and_not_told_again(tiny: dict[str, Any], tmp_path: Path):
    run = begin(make(tiny, training={"steps": 4, "checkpoint_interval": 2}))
    last = train(run)
    value, _ = read_sealed(last.path / "checkpoint.json")
    value["config"]["seed"] += 1
    write_sealed(last.path / "checkpoint.json", value)

    def tried() -> tuple[Reproduction, list[str]]:
        lines: list[str] = []
        found = reproduce(find(str(last.path), run.root, tmp_path), on_line=lines.append)
        return found, [line[: len("Starting at step 0")] for line in lines if " at step " in line]

    first, begun = tried()
    assert first.again is not None
    assert (bool(first.differing), begun) == (True, ["Starting at step 0"])
    assert tried() == (first, ["Starting at step 0"])
    # What another codecmill has begun is not gone on with, either.
    scratch = RunDirectory(first.again.parent.parent)
    shutil.rmtree(first.again)
    begun_with = checkpoints.folder_of(scratch, 2) / "checkpoint.json"
    written, _ = read_sealed(begun_with)
    write_sealed(begun_with, written | {"git_commit": "0" * 40})
    assert tried() == (first, ["Starting at step 0"])


def test_what_this_machine_has_not_is_said_before_anything_is_laid_out(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run = begin(make(tiny, training={"steps": 1}))
    last = train(run)
    value, _ = read_sealed(last.path / "checkpoint.json")
    leg = {"until": 1, "training": {"processes": 0}, "git_commit": None, "versions": {}}
    write_sealed(last.path / "checkpoint.json", value | {"legs": [leg]})
    said = r"step_00000001 cannot be trained again here: a leg of it names no config of this version: .*processes"
    with pytest.raises(CodecmillError, match=said):
        again(last.path, run, tmp_path)
    value["config"]["training"]["device"] = "cuda"
    write_sealed(last.path / "checkpoint.json", value)
    said = r"step_00000001 cannot be trained again here, up to step 1: training\.device is cuda, but torch"
    with pytest.raises(InputError, match=said):
        again(last.path, run, tmp_path)
    assert [each.name for each in run.root.runs.iterdir()] == [run.path.name]


@pytest.mark.full
def test_what_it_was_made_of_must_be_what_it_was(tiny: dict[str, Any], tmp_path: Path):
    run = begin(make(tiny))
    last = train(run)
    manifest = next(run.root.shards.glob("*/manifest.json"))
    content = manifest.read_bytes()
    manifest.write_bytes(content.replace(b'"note"', b'"node"') + b" ")
    with pytest.raises(CodecmillError, match=r"manifest\.json was changed: .* Delete it and run: codecmill shards"):
        again(last.path, run, tmp_path)
    manifest.unlink()
    with pytest.raises(CodecmillError, match=r"was not found\. Name the folder that holds it with --root, or run"):
        again(last.path, run, tmp_path)


def test_first_weights_that_were_copied_in_part_are_copied_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
    )
    run, scratch = Root(tmp_path).run("first"), Root(tmp_path).run(".tmp-reproduced-first")
    run.start_weights.mkdir(parents=True)
    (run.start_weights / "model.safetensors").write_bytes(b"whole")
    scratch.path.mkdir()
    manifest: Any = SimpleNamespace(parent="0" * 64, shard_set="1" * 64)
    chain = Chain(run.checkpoints / "step_00000001", manifest, run, tmp_path / "shards")

    def stopped(_: Path, target: Path, **__: Any) -> None:
        target.mkdir(exist_ok=True)
        (target / "model.safetensors").write_bytes(b"wh")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copytree", stopped)
        _lay_out(scratch, chain)
    _lay_out(scratch, chain)
    assert (scratch.start_weights / "model.safetensors").read_bytes() == b"whole"
    assert "model.safetensors" in synced, "a power cut leaves no empty file in a folder that counts as whole"


@pytest.mark.full
def test_kills_more_steps_other_ranks_and_foreign_first_weights_are_gone_through_again(
    tiny: dict[str, Any], tmp_path: Path
):
    """Half a cosine over 40 steps, then over 60: the course of the learning rate depends on when that was changed."""
    parent = train(begin(make(tiny, name="parent")))
    training: dict[str, Any] = {"start_from": str(parent.path), "steps": 40, "checkpoint_interval": 10}
    run = begin(make(tiny, training=training | {"processes": 2, "keep_latest": 10}))
    kill_in_mid_way(run, 17)
    train(run)
    start_or_continue(make(tiny, training=training | {"processes": 3, "steps": 60}))
    kill_in_mid_way(run, 47)
    last = train(run)
    assert [leg.until for leg in last.manifest.legs] == [40]
    assert last.manifest.legs[0].training["processes"] == 2
    found = again(last.path, run, tmp_path)
    assert (found.step, found.differing, found.sha256_again) == (60, (), last.sha256)
    middle = checkpoints.open_checkpoint(checkpoints.folder_of(run, 30))
    assert again(middle.path, run, tmp_path).differing == ()


@pytest.mark.full
def test_what_went_on_in_another_precision_is_trained_again_in_both(tiny: dict[str, Any], tmp_path: Path):
    """And at another interval, which says how far a loss that is no number throws the run back."""
    training: dict[str, Any] = {"precision": "bf16", "on_nonfinite": "rollback"}
    run = begin(make(tiny, training=training))
    train(run, until=6)
    changed = training | {"precision": "fp16", "checkpoint_interval": 4}
    go_on_with(run, merge(run.read_config(), make(tiny, training=changed), allow_inexact=True))
    last = train(run)
    said = [
        (leg.until, leg.training.get("precision"), leg.training.get("checkpoint_interval"))
        for leg in last.manifest.legs
    ]
    assert said == [(6, "bf16", 5)]
    assert again(last.path, run, tmp_path).differing == ()
