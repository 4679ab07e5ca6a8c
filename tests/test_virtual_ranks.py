"""Virtual ranks: the same bits on every number of processes, also when it changes on the way."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import make
from pydantic import ValidationError
from torch import Tensor
from trainings import Undisturbed, begin, beginnings, result, train, train_and_kill

from pipelines.data.images import HALF
from pipelines.model.autoencoder import Autoencoder
from pipelines.run_directory import RunDirectory
from pipelines.runs import start_or_continue
from pipelines.training.distributed import Ranks
from pipelines.training.gradients import OrderedGradients
from pipelines.training.step import TrainingStep


def train_on(directory: RunDirectory, processes: int, tiny: dict[str, Any], training: dict[str, Any]) -> None:
    start_or_continue(make(tiny, name=directory.path.name, training=training | {"processes": processes}))
    train(directory)


def in_turns(tiny: dict[str, Any], name: str, turns: list[int], training: dict[str, Any]) -> dict[str, str]:
    """Train in equal parts on one number of processes after the other, killed at the end of each part but the last."""
    directory = begin(make(tiny, name=name, training=training | {"processes": turns[0]}))
    part = training["steps"] // len(turns)
    for number, processes in enumerate(turns[:-1], 1):
        start_or_continue(make(tiny, name=name, training=training | {"processes": processes}))
        train_and_kill(directory, number * part, seconds=240)
    train_on(directory, turns[-1], tiny, training)
    begun = beginnings(directory)
    assert len(begun) == len(turns)
    assert all(before < after for before, after in pairwise(begun)), "each number of processes has trained some steps"
    assert begun[-1] < training["steps"]
    return result(directory)


def test_one_and_two_processes_train_the_same_bits(tiny: dict[str, Any], undisturbed: Undisturbed):
    training = {"virtual_ranks": 4, "steps": 12}
    two = in_turns(tiny, "two", [2], training | {"checkpoint_interval": 3})
    assert two == undisturbed(make(tiny, training=training))


@pytest.mark.full
def test_codebooks_are_the_same_bits_too(tiny: dict[str, Any], undisturbed: Undisturbed):
    """Their statistics take the road of the gradients; codes are given up on the way."""
    training = {"virtual_ranks": 4, "checkpoint_interval": 3, "replica_check_interval": 1, "steps": 12}
    tiny = tiny | {"model": tiny["model"] | {"quantizer": "vq", "codes": 8, "code_channels": 2}}
    assert in_turns(tiny, "changing", [2, 1], training) == undisturbed(make(tiny, training=training))


@pytest.mark.full
@pytest.mark.parametrize(
    ("settings", "turns"),
    [
        ({}, [4, 2, 1]),
        ({"precision": "bf16", "compile": True}, [2, 1, 4]),
    ],
    ids=str,
)
def test_any_number_of_processes_that_divides_them_trains_the_same_bits(
    tiny: dict[str, Any], undisturbed: Undisturbed, settings: dict[str, Any], turns: list[int]
):
    """As one process does; a turn of wrong bits shows in what the following ones end with."""
    training = {"virtual_ranks": 4, "batch_size": 8, "checkpoint_interval": 5, "steps": 60} | settings
    tiny["model"]["downsamplings"] = 1 if "compile" in settings else 2  # to compile a larger one takes long
    assert in_turns(tiny, "turns", turns, training) == undisturbed(make(tiny, training=training))


def test_the_sum_is_the_gradient_of_the_whole_batch(tiny: dict[str, Any]):
    config = make(tiny, training={"precision": "float64"})
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def step() -> TrainingStep:
        model = Autoencoder(config.model, seed=3).double().to(memory_format=torch.channels_last)
        return TrainingStep(model, HALF, config.loss, config.training, "cpu")

    whole = step()
    output = whole(images, None, None)
    output.loss.mean().backward()
    parts = step()
    ordered = OrderedGradients(parts, Ranks(0, 1, torch.device("cpu")), batch_size=8, virtual_ranks=4)
    ordered.compute(images, None, None, scale=lambda loss: loss)  # what this one leaves is not added to
    figures = ordered.compute(images, None, None, scale=lambda loss: loss)
    torch.testing.assert_close(figures.loss, output.loss, rtol=1e-12, atol=0)
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert isinstance(one.grad, Tensor)
        assert isinstance(other.grad, Tensor)
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-9, atol=1e-14, msg=name)
        assert other.grad.stride() == other.stride()


@pytest.mark.parametrize(
    ("training", "text"),
    [
        ({"virtual_ranks": 3}, r"training.virtual_ranks 3 does not divide training.batch_size 4"),
        ({"virtual_ranks": 2, "processes": 4}, r"training.processes 4 does not divide training.virtual_ranks 2"),
    ],
)
def test_what_cannot_be_shared_out_evenly_is_refused(tiny: dict[str, Any], training: dict[str, Any], text: str):
    with pytest.raises(ValidationError, match=text):
        make(tiny, training=training)
