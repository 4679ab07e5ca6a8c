"""Losses that are no numbers: the run stops, passes over the step, or goes back, and says which samples it was."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import make
from test_distributed import run_ranks
from trainings import begin, result, train

from pipelines import checkpoints
from pipelines.data.order import SampleOrder
from pipelines.data.shard_set import ShardSet
from pipelines.durable_files import read_json
from pipelines.errors import CodecmillError
from pipelines.run_directory import RunDirectory
from pipelines.runs import start_or_continue
from pipelines.training.journal import read

DIVERGING = {"learning_rate": 10.0, "gradient_clip": 0.0, "schedule": "constant", "warmup_steps": 0, "steps": 400}

BAD_STEP, BAD_PLACE = 8, 2

# The loss of one sample of one step is infinite, on whichever rank has it.
BODY = f"""
from contextlib import nullcontext
from pathlib import Path
import pipelines.training.gradients as gradients
from pipelines.data.shard_set import ShardSet
from pipelines.durable_files import read_json
from pipelines.run_directory import RunDirectory
from pipelines.training.journal import Journal
from pipelines.training.preparation import prepare
directory = RunDirectory(Path(FOLDER))
shard_set = ShardSet.open(Path(read_json(directory.shard_set_file)["path"]))
state = prepare(directory, directory.read_config(), shard_set, ranks)
forward = state.module.compare
def spoilt(images, masks, noise):
    output, pictures = forward(images, masks, noise)
    if state.step + 1 == {BAD_STEP} and {BAD_PLACE} % ranks.world_size == ranks.rank:
        factor = torch.ones(len(images))
        factor[{BAD_PLACE} // ranks.world_size] = float("inf")
        output = output._replace(loss=output.loss * factor)
    return output, pictures
state.module.compare = spoilt
with Journal(directory.journal, state.step) if ranks.is_first else nullcontext() as journal:
    state.run(lambda: state.step + 1 == LAST, journal)
"""


def train_spoilt(directory: RunDirectory, folder: Path, last: int = 0, body: str = BODY) -> None:
    """Train on two ranks with the infinite loss in it, to the end or to a last step."""
    folder.mkdir()
    run_ranks(folder, 2, body.replace("FOLDER", repr(str(directory.path))).replace("LAST", str(last)))


def key_of_the_bad_sample(directory: RunDirectory) -> str:
    config = directory.read_config()
    shard_set = ShardSet.open(Path(read_json(directory.shard_set_file)["path"]))
    order = SampleOrder(shard_set.counts("train"), config.seed, config.data.shuffle_window)
    place = order.locate((BAD_STEP - 1) * config.training.batch_size + BAD_PLACE)
    return shard_set.read("train", place.shard, place.index).key


def weights_at(directory: RunDirectory, step: int) -> str:
    return checkpoints.open_checkpoint(checkpoints.folder_of(directory, step)).sha256


def test_a_run_stops_and_names_the_samples(tiny: dict[str, Any]):
    directory = begin(make(tiny, training=DIVERGING | {"batch_size": 16}))
    with pytest.raises(CodecmillError, match=r"is not finite, for the samples [0-9a-f]{16}_.*") as caught:
        train(directory)
    more = re.search(r" and (\d+) more\. The run was stopped before it", str(caught.value))
    assert more
    log = (directory.logs / "attempt_01" / "output.log").read_text()
    (line,) = re.findall(r"Step \d+ is not finite for the samples (.*)", log)
    assert len(line.split(", ")) == 8 + int(more[1]), "the log names all of them"


def test_what_does_not_get_better_by_skipping_stops_the_run(tiny: dict[str, Any]):
    directory = begin(make(tiny, training=DIVERGING | {"on_nonfinite": "skip"}))
    with pytest.raises(CodecmillError, match="It is the 10th such step in a row, so the run was stopped before it"):
        train(directory)
    bad = [line for line in read(directory.journal) if "nonfinite" in line]
    assert len(bad) >= 9
    assert all(line["nonfinite"]["then"] == "skip" and "train/loss" not in line for line in bad)


def test_a_step_in_fp16_whose_loss_alone_is_infinite_changes_no_weight(tiny: dict[str, Any], tmp_path: Path):
    """Its scaler looks at gradients, which are finite here, as those of l1 are of a picture that overflowed."""
    settings = {"processes": 2, "on_nonfinite": "skip", "keep_latest": 100, "checkpoint_interval": 1}
    directory = begin(make(tiny, training=settings | {"precision": "fp16", "steps": BAD_STEP + 1}))
    of_the_loss_alone = BODY.replace("output.loss * factor", "output.loss + torch.where(factor == 1, 0, factor)")
    train_spoilt(directory, tmp_path / "ranks", body=of_the_loss_alone)
    assert [line["step"] for line in read(directory.journal) if "nonfinite" in line] == [BAD_STEP]
    assert weights_at(directory, BAD_STEP) == weights_at(directory, BAD_STEP - 1)
    assert weights_at(directory, BAD_STEP + 1) != weights_at(directory, BAD_STEP)


@pytest.mark.full
@pytest.mark.parametrize(("then", "goes_back_to"), [("rollback", 6), ("skip", 7)])
def test_a_step_is_passed_over_also_when_it_is_interrupted(
    tiny: dict[str, Any], tmp_path: Path, then: str, goes_back_to: int
):
    settings = {"processes": 2, "on_nonfinite": then, "keep_latest": 100}
    whole = begin(make(tiny, name="whole", training=settings | {"checkpoint_interval": 1 if then == "skip" else 3}))
    train_spoilt(whole, tmp_path / "first")
    bad = {line["step"]: line["nonfinite"] for line in read(whole.journal) if "nonfinite" in line}
    said = "skip" if then == "skip" else "rollback to step 6"
    assert bad == {BAD_STEP: {"samples": [key_of_the_bad_sample(whole)], "then": said}}
    assert [line["step"] for line in read(whole.journal)] == list(range(1, 13))

    settings |= {"keep_latest": 1}
    stopped = begin(make(tiny, name="stopped", training=settings | {"checkpoint_interval": 3}))
    train_spoilt(stopped, tmp_path / "zeroth", last=BAD_STEP - 1)  # of this one a rollback knows nothing
    newest = checkpoints.latest(stopped)
    assert newest is not None
    checkpoints.retain(stopped, newest, keep_latest=1)  # as where MLflow has them all
    start_or_continue(make(tiny, name="stopped", training=settings | {"checkpoint_interval": 5}))
    train_spoilt(stopped, tmp_path / "second", last=BAD_STEP)
    assert weights_at(stopped, BAD_STEP) == weights_at(whole, goes_back_to)
    train_spoilt(stopped, tmp_path / "third")
    assert result(stopped) == result(whole)


@pytest.mark.full
def test_before_the_first_checkpoint_the_weights_go_back_to_the_start(tiny: dict[str, Any], tmp_path: Path):
    settings = {"processes": 2, "on_nonfinite": "rollback", "checkpoint_interval": 100, "steps": BAD_STEP}
    directory = begin(make(tiny, training=settings))
    train_spoilt(directory, tmp_path / "first")
    assert weights_at(directory, BAD_STEP) == weights_at(directory, 0)
    start_or_continue(make(tiny, training=settings | {"steps": BAD_STEP + 4}))
    train(directory)  # though its optimiser has no state yet
    assert [line["step"] for line in read(directory.journal)] == list(range(1, BAD_STEP + 5))
