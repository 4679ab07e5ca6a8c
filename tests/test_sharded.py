"""Weights and moments that the ranks share out among them: real gloo ranks, which train as replicas do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make
from pydantic import ValidationError
from safetensors.torch import load_file
from test_distributed import QUANTISERS, run_ranks
from trainings import begin, beginnings, train, train_and_kill

from pipelines import checkpoints
from pipelines.checkpoint_tensors import read_weights
from pipelines.errors import InputError
from pipelines.run_directory import RunDirectory
from pipelines.runs import start_or_continue
from pipelines.training.journal import read

# Several trainings by the same ranks, one after the other: to start these takes longer than to train.
BODY = """
from contextlib import nullcontext
from pathlib import Path
from pipelines.data.shard_set import ShardSet
from pipelines.run_directory import RunDirectory
from pipelines.training.agreement import Stop
from pipelines.training.journal import Journal
from pipelines.training.preparation import prepare
torch.use_deterministic_algorithms(True)
def train(path, parallel, until):
    directory = RunDirectory(Path(path))
    config = directory.read_config()
    config = config.model_copy(update={"training": config.training.model_copy(update={"parallel": parallel})})
    state = prepare(directory, config, ShardSet.open(directory.shard_set()), ranks)
    with Journal(directory.journal, state.step) if ranks.is_first else nullcontext() as journal:
        state.run(lambda: Stop.NO, journal, until)
for part in PARTS:
    train(*part)
"""

Part = tuple[RunDirectory, str, int | None]
"""A run, what each rank holds, and the step up to which it is trained; None for the last."""


def train_parts(folder: Path, world_size: int, parts: list[Part]) -> None:
    folder.mkdir()
    named = [(str(directory.path), parallel, until) for directory, parallel, until in parts]
    run_ranks(folder, world_size, BODY.replace("PARTS", repr(named)))


def losses(directory: RunDirectory) -> list[float]:
    return [line["train/loss"] for line in read(directory.journal)]


def norms(directory: RunDirectory) -> list[float]:
    return [line["train/gradient_norm"] for line in read(directory.journal)]


def digests(directory: RunDirectory) -> dict[str, Any]:
    """Of a last checkpoint's files, and the journal without what is measured."""
    last = checkpoints.latest(directory)
    assert last is not None
    return {name: record.sha256 for name, record in last.manifest.files.items()} | {
        "losses": losses(directory),
        "norms": [line.get("train/gradient_norm") for line in read(directory.journal)],
        "validation": [line.get("validation/psnr") for line in read(directory.journal)],
    }


FLOAT64 = {"precision": "float64", "replica_check_interval": 1, "gradient_clip": 0.01}
"""Every gradient is shortened, by a norm that all ranks must agree on."""


def test_two_ranks_with_shares_train_as_with_replicas_and_go_on_to_the_same_bits(tiny: dict[str, Any], tmp_path: Path):
    names = ("replicas", "shares", "changing", "alone", "stopped")
    double = {name: begin(make(tiny, name=name, training=FLOAT64)) for name in names[:3]}
    single = {name: begin(make(tiny, name=name, training={"replica_check_interval": 1})) for name in names[3:]}
    train_parts(
        tmp_path / "ranks",
        2,
        [
            (double["replicas"], "ddp", None),
            (double["shares"], "fsdp", None),
            (double["changing"], "ddp", 4),
            (double["changing"], "fsdp", 8),
            (double["changing"], "ddp", None),
            (single["alone"], "fsdp", None),
            (single["stopped"], "fsdp", 7),
            (single["stopped"], "fsdp", None),
        ],
    )
    expected = losses(double["replicas"])
    assert len(expected) == 12
    assert min(norms(double["replicas"])) > FLOAT64["gradient_clip"]
    assert norms(double["shares"]) == pytest.approx(norms(double["replicas"]), rel=1e-9)
    assert losses(double["shares"]) == pytest.approx(expected, rel=1e-9)
    assert losses(double["changing"]) == pytest.approx(expected, rel=1e-9)
    assert digests(single["stopped"]) == digests(single["alone"])
    saved = checkpoints.latest(double["shares"])
    assert saved is not None
    assert sorted(file.name for file in saved.path.iterdir()) == [
        "checkpoint.json",
        "shard_00000_of_00002.safetensors",
        "shard_00001_of_00002.safetensors",
        "sharding.json",
        "training_state.json",
    ]
    elements = [sum(each.numel() for each in load_file(file).values()) for file in saved.path.glob("shard_*")]
    assert max(elements) < 0.55 * sum(elements), "each rank holds half"
    of_replicas = checkpoints.latest(double["replicas"])
    assert of_replicas is not None
    for name, weight in read_weights(of_replicas).items():
        torch.testing.assert_close(read_weights(saved)[name], weight, rtol=1e-7, atol=1e-10)


@pytest.mark.full
def test_one_rank_whose_share_is_everything_trains_to_the_bits_of_a_replica(tiny: dict[str, Any], tmp_path: Path):
    names = ("replica", "share", "changing", "more")
    double = {"precision": "float64", "replica_check_interval": 1}
    runs = {name: begin(make(tiny, name=name, training=double)) for name in names}
    changing = [("fsdp", 4), ("fsdp", 6), ("ddp", 9), ("fsdp", None)]
    train_parts(
        tmp_path / "one",
        1,
        [
            (runs["replica"], "ddp", None),
            (runs["share"], "fsdp", None),
            *((runs["changing"], parallel, until) for parallel, until in changing),
            (runs["more"], "fsdp", 7),
        ],
    )
    last = checkpoints.latest(runs["share"])
    replica = checkpoints.latest(runs["replica"])
    assert last is not None and replica is not None
    assert "shard_00000_of_00001.safetensors" in last.manifest.files
    assert last.sha256 == replica.sha256
    assert losses(runs["share"]) == losses(runs["replica"])
    assert digests(runs["changing"]) == digests(runs["share"])
    train_parts(tmp_path / "two", 2, [(runs["more"], "fsdp", None)])
    assert losses(runs["more"]) == pytest.approx(losses(runs["replica"]), rel=1e-9)


@pytest.mark.full
def test_shares_that_are_killed_resume_to_the_same_bits_and_then_on_one_rank_with_all(tiny: dict[str, Any]):
    training = {"parallel": "fsdp", "processes": 2, "steps": 40, "checkpoint_interval": 1}
    alone = begin(make(tiny, name="alone", training=training))
    train(alone)
    killed = begin(make(tiny, name="killed", training=training))
    train_and_kill(killed, 20, seconds=120)
    train(killed)
    assert beginnings(killed)[-1] > 0
    assert digests(killed) == digests(alone)
    for directory, more in ((alone, {}), (killed, {"parallel": "ddp", "processes": 1})):
        start_or_continue(make(tiny, name=directory.path.name, training=training | more | {"steps": 44}))
        assert train(directory).step == 44
        assert beginnings(directory)[-1] == 40
    assert losses(killed)[40:] == pytest.approx(losses(alone)[40:], rel=1e-4)


@pytest.mark.full
def test_whatever_is_trained_in_shares_goes_on_to_the_same_bits(tiny: dict[str, Any], tmp_path: Path):
    """On three ranks; then a step on four, and one on a single rank that holds everything."""
    codec = {"entropy": "hyperprior", "downsamplings": 2, "entropy_channels": 8, "hyper_channels": 4}
    varied: dict[str, dict[str, Any]] = {
        "bf16": {"training": {"precision": "bf16"}, "model": {"residual_blocks": 1}},
        "fp16": {"training": {"precision": "fp16", "on_nonfinite": "rollback"}},
        "codec": {"training": FLOAT64 | {"hard_from": 0.5}, "model": {"residual_blocks": 1} | codec},
        "vq": {"training": FLOAT64, "model": QUANTISERS["vq"]},
        "vq-by-the-loss": {"training": FLOAT64, "model": QUANTISERS["vq by the loss"]},
    }
    runs: dict[tuple[str, str], RunDirectory] = {}
    parts: list[Part] = []
    for name, sections in varied.items():
        training = {"checkpoint_interval": 6} | sections["training"]
        kinds = ("alone", "stopped", "replicas") if training["precision"] == "float64" else ("alone", "stopped")
        for kind in kinds:
            directory = begin(make(tiny, name=f"{name}-{kind}", **sections | {"training": training}))
            runs[name, kind] = directory
            parts += [(directory, "fsdp", 5)] if kind == "stopped" else []
            parts.append((directory, "ddp" if kind == "replicas" else "fsdp", 10))
    train_parts(tmp_path / "three", 3, parts)
    for name in varied:
        assert digests(runs[name, "stopped"]) == digests(runs[name, "alone"]), name
    train_parts(tmp_path / "four", 4, [(runs[name, "stopped"], "fsdp", 11) for name in varied])
    train_parts(tmp_path / "one", 1, [(directory, "ddp", 12) for directory in runs.values()])
    for (name, _), directory in runs.items():
        tolerance = 1e-9 if varied[name]["training"]["precision"] == "float64" else 1e-2
        assert losses(directory) == pytest.approx(losses(runs[name, "alone"]), rel=tolerance), directory.path.name
        assert len(losses(directory)) == 12


def test_what_cannot_be_shared_out_is_refused(tiny: dict[str, Any]):
    with pytest.raises(ValidationError, match=r"training\.parallel fsdp takes no training\.virtual_ranks, and 2 are"):
        make(tiny, training={"parallel": "fsdp", "virtual_ranks": 2})
    by_the_loss = QUANTISERS["vq by the loss"]
    with pytest.raises(ValidationError, match=r"fp16 takes no codes of vq that the loss learns: .* Use bf16"):
        make(tiny, training={"parallel": "fsdp", "precision": "fp16"}, model=by_the_loss)
    make(tiny, training={"parallel": "fsdp", "precision": "fp16"}, model=QUANTISERS["vq"])
    make(tiny, training={"parallel": "ddp", "precision": "fp16"}, model=by_the_loss)


def test_a_run_may_go_on_with_shares(tiny: dict[str, Any]):
    start_or_continue(make(tiny))
    changed = start_or_continue(make(tiny, training={"parallel": "fsdp"}))
    assert changed.read_config().training.parallel == "fsdp"
    with pytest.raises(InputError, match=r"training\.batch_size was 4"):
        start_or_continue(make(tiny, training={"parallel": "ddp", "batch_size": 8}))
