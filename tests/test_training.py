"""Training for real: torchrun, gloo ranks, kills, and the same bits after every interruption."""

import getpass
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make
from PIL import Image
from processes import wait_for
from trainings import (
    Undisturbed,
    agent_of,
    begin,
    beginnings,
    last_rank,
    ranks_alive,
    result,
    start,
    steps_done,
    train,
    train_and_kill,
)

from pipelines import checkpoint_format, checkpoints
from pipelines.data.images import Normalization
from pipelines.data.loading import training_batches
from pipelines.data.shard_set import ShardSet
from pipelines.durable_files import read_json
from pipelines.errors import CodecmillError, Interrupted, RankFailure
from pipelines.model.autoencoder import Autoencoder
from pipelines.model.losses import distortion
from pipelines.run_directory import RunDirectory
from pipelines.sealed_json import read_sealed, write_sealed
from pipelines.training import attempts, launch
from pipelines.training.journal import read


def test_two_ranks_train_to_the_last_step_and_leave_what_was_asked_for_and_nothing_else(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    directory = begin(make(tiny, training={"processes": 2}))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    last = train(directory)
    assert last.step == 12
    assert checkpoints.steps_on_disk(directory) == [5, 10, 12]
    lines = list(read(directory.journal))
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(line["train/loss"] > 0 for line in lines)
    assert [line["step"] for line in lines if "validation/psnr" in line] == [5, 10, 12]
    pictures = sorted(path.name for path in directory.pictures.iterdir())
    assert pictures == [f"step_{step:08d}_validation.png" for step in (0, 5, 10, 12)]
    assert last.manifest.position == 48
    assert last.manifest.best is not None
    output = (directory.logs / "attempt_01" / "output.log").read_text()
    assert "Starting at step 0" in output
    left = {each.name for each in (tmp_path / "temporary").iterdir()}
    assert left <= {f"torchinductor_{getpass.getuser()}"}, "torch's cache of compiled code serves the next runs"
    before = result(directory)
    assert train(directory).step == 12, "a finished training is done at once"
    assert result(directory) == before


@pytest.mark.parametrize(
    ("processes", "kills"), [(2, (3, 8)), *(pytest.param(n, (8,), marks=pytest.mark.full) for n in (1, 3, 4))]
)
def test_killed_at_any_step_it_resumes_to_the_same_bits(
    tiny: dict[str, Any], undisturbed: Undisturbed, processes: int, kills: tuple[int, ...]
):
    config = make(tiny, training={"processes": processes, "steps": 60})  # 12 are over when a kill is a moment late
    killed = begin(config)
    for at in kills:
        train_and_kill(killed, at)
    train(killed)
    assert len(list(killed.logs.glob("attempt_*"))) == len(kills) + 1
    assert beginnings(killed)[0] == 0
    assert beginnings(killed)[-1] >= 5, "there was a checkpoint to go on from"
    assert result(killed) == undisturbed(config)


def test_ctrl_c_waits_for_what_takes_longer_to_save_than_who_ends_a_process_would_wait(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attempts, "GRACE_SECONDS", 0.0)
    run = begin(make(tiny, training={"steps": 1000, "checkpoint_interval": 1000}))

    def stop(line: str) -> None:
        if "Starting at step" in line:
            raise KeyboardInterrupt

    with run.locked() as lock, pytest.raises(KeyboardInterrupt):
        launch.train(run, lock, on_line=stop)
    assert checkpoints.steps_on_disk(run) != []


def test_a_stop_between_checkpoints_does_not_change_which_is_the_best(tiny: dict[str, Any]):
    # So little is learnt that all steps are as good, and the first that may be chosen stays the best.
    chosen = {"steps": 4, "checkpoint_interval": 4, "validation_interval": 1, "learning_rate": 1e-12}
    stopped = begin(make(tiny, training=chosen))
    with stopped.locked() as lock:
        assert launch.train(stopped, lock, on_line=print, until=1).step == 1
    best = train(stopped).manifest.best
    assert best is not None
    assert best.step == 4, "as in a run that was not stopped, which saves no other step"


# With the eager float32 of the test above, float32, bf16, eager and compiled meet each other, and several ranks each of
# them; it is at three and more that sums have an order. One is killed just before, at, and just after a validation,
# which sees another batch shape: that in which most could go wrong.
@pytest.mark.full
@pytest.mark.parametrize(
    ("settings", "kills"),
    [
        ({"precision": "bf16", "compile": True}, (4, 5, 6)),
        ({"precision": "bf16", "processes": 4}, (6,)),
        ({"compile": True, "processes": 3}, (5,)),
        ({"precision": "fp16"}, (5,)),
        ({"precision": "float64", "channels_last": False}, (5,)),
    ],
    ids=str,
)
def test_precision_and_compilation_resume_to_the_same_bits(
    tiny: dict[str, Any], undisturbed: Undisturbed, settings: dict[str, Any], kills: tuple[int, ...]
):
    # To compile a model takes longer than all else here: a smaller one.
    model = {"downsamplings": 1 if "compile" in settings else 2}
    settings = settings | {"steps": 40}
    parts = begin(make(tiny, model=model, training=settings | {"checkpoint_interval": 1}))
    reached = [train_and_kill(parts, at, seconds=240) for at in kills]
    train(parts)
    begun = beginnings(parts)
    assert begun[0] == 0
    assert [last - 1 <= step <= last for step, last in zip(begun[1:], reached, strict=True)] == [True] * len(kills)
    assert begun[1] > 0 and begun[-1] < 40, "each leg did some steps"
    assert result(parts) == undisturbed(make(tiny, model=model, training=settings))


@pytest.mark.full
def test_a_codec_on_two_ranks_resumes_to_the_same_bits(tiny: dict[str, Any], undisturbed: Undisturbed):
    """Its steps and noise are drawn again as they were, its transform is not computed again; in bf16."""
    model = {"entropy": "hyperprior", "latent_channels": 12, "entropy_channels": 8, "hyper_channels": 4}
    training = {"processes": 2, "precision": "bf16", "checkpoint_interval": 2, "steps": 40}
    config = make(tiny, model=model, training=training)
    parts = begin(config)
    train_and_kill(parts, 5)
    train(parts)
    first, second = beginnings(parts)
    assert (first, 4 <= second < 40) == (0, True)
    assert result(parts) == undisturbed(config)


@pytest.mark.full
def test_another_number_of_ranks_sees_the_same_samples(tiny: dict[str, Any]):
    """In float64 the losses of 1 rank, of 2 then 3, and of 2 then 1 agree to 1e-9."""
    losses = {}
    for name, counts in {"one": [1], "more": [2, 3], "fewer": [2, 1]}.items():
        training = {"precision": "float64", "checkpoint_interval": 1, "steps": 40}
        directory = begin(make(tiny, name=name, training=training | {"processes": counts[0]}))
        if len(counts) == 1:
            train(directory)
        else:
            reached = train_and_kill(directory, 6)
            begin(make(tiny, name=name, training=training | {"processes": counts[1]}))
            # Each number of ranks has trained some of the steps, and the checkpoint says which.
            (leg,) = train(directory).manifest.legs
            assert beginnings(directory) == [0, leg.until]
            assert reached - 1 <= leg.until <= reached < 40
            assert (leg.training["processes"], directory.read_config().training.processes) == (counts[0], counts[1])
        losses[name] = [line["train/loss"] for line in read(directory.journal)]
    assert len(losses["one"]) == 40
    for name in ("more", "fewer"):
        assert losses[name] == pytest.approx(losses["one"], rel=1e-9), name


def test_steps_of_another_kind_of_processor_are_told_and_recorded(tiny: dict[str, Any]):
    directory = begin(make(tiny))
    file = train(directory, until=6).path / checkpoint_format.MANIFEST
    manifest, _ = read_sealed(file)
    here = manifest["versions"]["processor"]
    manifest["versions"]["processor"] = "AuthenticAMD avx2"
    write_sealed(file, manifest)
    last = train(directory).manifest
    assert [(leg.until, leg.versions["processor"]) for leg in last.legs] == [(6, "AuthenticAMD avx2")]
    assert last.versions["processor"] == here
    (said,) = [file.read_text() for file in sorted(directory.logs.glob("attempt_*/output.log"))][1:]
    assert f"another kind of processor (AuthenticAMD avx2, now {here}), which may round otherwise" in said


def test_two_ranks_weigh_the_loss_by_the_masks(tiny: dict[str, Any], photos: Path, tmp_path: Path):
    """The first step's loss is the mean of `distortion` over the global batch, computed here in one piece."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for photo in photos.iterdir():
        with Image.open(photo) as picture:
            grey = np.array(picture.convert("L"))
        # White, grey and black, by the picture's own brightness: a mask cut at another place has other weights.
        Image.fromarray(np.digitize(grey, [90, 150]).astype(np.uint8) * 127).save(masks / photo.name)
    training = {"processes": 2, "precision": "float64", "steps": 1, "validation_interval": 100}
    config = make(tiny, data={"masks": str(masks)}, loss={"mask_weight": 4.0}, training=training)
    directory = begin(config)
    train(directory)

    shard_set = ShardSet.open(Path(read_json(directory.shard_set_file)["path"]))
    with training_batches(shard_set, config, 1, 0, 1) as batches:
        batch = next(batches)
    assert batch.masks is not None
    normalization = Normalization.resolve(config.data.normalization, shard_set.measured)
    target = batch.images.double() / 255
    with torch.no_grad():
        output = Autoencoder(config.model, seed=config.seed).double()(normalization.normalize(target)).image
    picture = normalization.denormalize(output)
    weighted = distortion(config.loss, picture, target, batch.masks).mean().item()
    alike = distortion(config.loss, picture, target).mean().item()
    (line,) = read(directory.journal)
    assert line["train/loss"] == pytest.approx(weighted, rel=1e-12)
    assert alike != pytest.approx(weighted, rel=1e-3), "these masks make no difference"


def test_stopped_by_ctrl_c_it_saves_where_it_is_and_goes_on_to_the_same_bits(
    tiny: dict[str, Any], undisturbed: Undisturbed
):
    stopped = begin(make(tiny, training={"steps": 60, "checkpoint_interval": 1000}))
    process = start(stopped)
    wait_for(lambda: steps_done(stopped) >= 3)
    os.kill(process.pid, signal.SIGINT)
    process.wait(timeout=30)
    assert not ranks_alive(stopped)
    saved = checkpoints.latest(stopped)
    assert saved is not None
    assert saved.step == steps_done(stopped), "nothing that was done is done again"
    assert saved.step < 60
    train(stopped)
    assert result(stopped) == undisturbed(make(tiny, training={"steps": 60}))


@pytest.mark.full
def test_ranks_stopped_by_a_scheduler_say_so(tiny: dict[str, Any]):
    directory = begin(make(tiny, training={"steps": 100_000, "processes": 2}))
    process = start(directory)
    wait_for(lambda: steps_done(directory) >= 3)
    for rank in ranks_alive(directory):
        os.kill(rank, signal.SIGTERM)
    assert process.wait(timeout=30) == 1
    with pytest.raises(Interrupted, match=r"saved step \d+ of 100000. Go on with: codecmill resume tiny"):
        directory.stop_request.parent.mkdir(exist_ok=True)
        _train_and_stop(directory)


def _train_and_stop(directory: RunDirectory) -> None:
    with directory.locked(wait=5) as lock:

        def stop_at_first_line(line: str) -> None:
            if "Resuming at step" in line:
                directory.stop_request.touch()

        launch.train(directory, lock, on_line=stop_at_first_line)


class KillsOne:
    """Kills (SIGKILL) a process of the ranks once some steps are done."""

    def __init__(self, directory: RunDirectory, at: int, choose: Callable[[RunDirectory], int]):
        self._directory = directory
        self._at = at
        self._choose = choose
        self.killed = 0.0

    def __call__(self, line: str) -> None:
        if "Starting at step" in line:
            wait_for(lambda: steps_done(self._directory) >= self._at)
            os.kill(self._choose(self._directory), signal.SIGKILL)
            self.killed = time.monotonic()


def test_a_rank_that_is_killed_ends_the_others_and_can_be_retried(tiny: dict[str, Any]):
    directory = begin(make(tiny, training={"steps": 100_000, "processes": 2}))
    kills = KillsOne(directory, 3, last_rank)
    with directory.locked(wait=5) as lock, pytest.raises(RankFailure, match="was killed by SIGKILL"):
        launch.train(directory, lock, on_line=kills)
    assert not ranks_alive(directory)
    assert time.monotonic() - kills.killed < 30


@pytest.mark.full
def test_torchrun_itself_killed_takes_the_ranks_with_it_and_the_bits_are_the_same(
    tiny: dict[str, Any], undisturbed: Undisturbed
):
    config = make(tiny, training={"steps": 300, "processes": 2})
    headless = begin(config)
    kills = KillsOne(headless, 20, agent_of)
    with (
        headless.locked(wait=5) as lock,
        pytest.raises(RankFailure, match=r"ended without saying why \(exit code -9\)"),
    ):
        launch.train(headless, lock, on_line=kills)
    wait_for(lambda: not ranks_alive(headless), 30)
    assert time.monotonic() - kills.killed < 30
    assert steps_done(headless) < 300, "it was killed too late"
    train(headless)
    first, second = beginnings(headless)
    assert first == 0
    assert second >= 15
    assert result(headless) == undisturbed(config)


def test_a_flipped_byte_in_a_shard_is_named_and_never_trained_on(tiny: dict[str, Any]):
    directory = begin(make(tiny))
    shard = next((directory.root.shards).glob("*/train-000000.tar"))
    content = bytearray(shard.read_bytes())
    for place in range(600, len(content), 1024):
        content[place] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CodecmillError, match=r"train-000000"):
        train(directory)
    assert checkpoints.latest(directory) is None
