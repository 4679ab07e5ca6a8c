"""What changes in the quantiser on the way: a pure function of the step, so that resuming is exact there too."""

import os
import signal
from typing import Any

import pytest
import torch
from conftest import make
from processes import wait_for
from safetensors.torch import load_file
from trainings import begin, ranks_alive, result, start, steps_done, train

from pipelines import checkpoint_format, checkpoints
from pipelines.model.build import build_model
from pipelines.model.codec import TransformCodec
from pipelines.model.straight_through import UniformNoise, UniversalQuantizer
from pipelines.run_directory import RunDirectory
from pipelines.training.schedules import encoder_stays, set_quantizer, sigma

CODEC = {"entropy": "hyperprior", "latent_channels": 12, "entropy_channels": 8, "hyper_channels": 4}


def test_sigma_grows_on_a_geometric_course(tiny: dict[str, Any]):
    model = {"quantizer": "soft_to_hard", "sigma": 0.5, "final_sigma": 8.0}
    config = make(tiny, model=model, training={"steps": 5})
    assert [sigma(config, step) for step in range(5)] == pytest.approx([0.5, 1, 2, 4, 8])
    built = build_model(config.model)
    before = built.quantizer.sigma.clone()  # type: ignore[union-attr]
    set_quantizer(built, config, 3)
    assert before == 0.5 and built.quantizer.sigma == 4  # type: ignore[union-attr]
    assert sigma(make(tiny, model={"quantizer": "soft_to_hard", "sigma": 3.0}), 7) == 3


@pytest.mark.parametrize("layer", [UniformNoise(), UniversalQuantizer()])
def test_hard_values_are_rounded_and_give_no_gradient(layer: UniformNoise | UniversalQuantizer):
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    noise = torch.full((9,), 0.3)
    soft = layer(x, noise)
    assert not torch.equal(soft, x.round())
    layer.hard.fill_(True)
    hard = layer(x, noise)
    assert torch.equal(hard, x.round())
    assert torch.autograd.grad(hard.sum(), x)[0].eq(0).all()
    assert torch.equal(layer.eval()(x), x.round())


def test_hard_bits_of_a_codec_are_those_of_the_symbols(tiny: dict[str, Any]):
    model = build_model(make(tiny, model=CODEC).model)
    assert isinstance(model, TransformCodec)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(model.noise_shape(2, 32, 32), generator=torch.Generator().manual_seed(1)) - 0.5
    step = model.drawn_step(noise)
    expected = model.eval()(x, step=step).bits
    noisy = model.train()(x, noise).bits
    model.hard.fill_(True)
    torch.testing.assert_close(model(x, noise).bits, expected)
    assert not torch.allclose(noisy, expected)


def test_a_run_whose_encoder_stays_from_the_first_step_is_gone_on_with(tiny: dict[str, Any]):
    """Its checkpoints hold no moments of what no step has moved."""
    config = make(tiny, model={"quantizer": "noise"}, training={"hard_from": 0.0, "steps": 6, "checkpoint_interval": 3})
    parts = begin(config)
    with_moments = set(load_file(train(parts, until=3).path / checkpoint_format.STATE_TENSORS))
    assert not any("/encoder." in name for name in with_moments)
    assert any("/decoder." in name for name in with_moments)
    last = train(parts)
    assert (last.step, set(load_file(last.path / checkpoint_format.STATE_TENSORS))) == (6, with_moments)


def weights(directory: RunDirectory, step: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoints.folder_of(directory, step) / checkpoint_format.WEIGHTS)


@pytest.mark.parametrize(
    ("model", "kills"),
    [({"quantizer": "noise"}, (15, 25)), pytest.param(CODEC, (25,), marks=pytest.mark.full)],
    ids=["noise", "codec"],
)
def test_from_then_on_the_encoder_stays_and_a_killed_run_ends_the_same(
    model: dict[str, Any], kills: tuple[int, ...], tiny: dict[str, Any]
):
    training = {"steps": 40, "hard_from": 0.5, "checkpoint_interval": 10, "keep_latest": 9}
    whole = begin(make(tiny, name="whole", model=model, training=training))
    train(whole)
    config = whole.read_config()
    assert [encoder_stays(config, step) for step in (19, 20)] == [False, True]
    early, middle, end = (weights(whole, step) for step in (10, 20, 40))
    encoding = build_model(config.model).encoding
    learned = [name for name in end if not torch.equal(early[name], middle[name])]
    assert any(name.startswith(encoding) for name in learned)
    for name in learned:
        assert torch.equal(middle[name], end[name]) == name.startswith(encoding), name

    killed = begin(make(tiny, name="killed", model=model, training=training))
    for reached in kills:
        process = start(killed)
        wait_for(lambda reached=reached: steps_done(killed) >= reached)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wait_for(lambda: not ranks_alive(killed), 30)
    train(killed)
    assert result(killed) == result(whole)
