import math
import re
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure, peak_signal_noise_ratio

from pipelines.config import LossConfig, RunConfig
from pipelines.errors import CodecmillError
from pipelines.model.losses import distortion, psnr, rate_distortion


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


MSE, L1 = LossConfig(), LossConfig(distortion="l1")


@pytest.mark.parametrize(("config", "expected"), [(MSE, [0.25, 0.01]), (L1, [0.5, 0.1])])
def test_a_uniform_error_costs_its_power_in_each_sample(config: LossConfig, expected: list[float]):
    target = images(2, 3, 4, 6)
    error = torch.tensor([0.5, -0.1], dtype=torch.float64)[:, None, None, None]
    loss = distortion(config, target + error, target)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [MSE, L1])
def test_the_loss_is_torch_s_own_mean_of_each_sample(config: LossConfig):
    a, b = images(3, 3, 5, 7), images(3, 3, 5, 7, seed=1)
    own = torch.nn.functional.mse_loss if config.distortion == "mse" else torch.nn.functional.l1_loss
    expected = torch.stack([own(x, y) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(distortion(config, a, b), expected, rtol=1e-12, atol=1e-12)


def test_masked_pixels_weigh_more_and_the_weights_are_divided_out():
    target = torch.zeros(1, 3, 1, 4, dtype=torch.float64)
    output = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).expand(1, 3, 1, 4)
    mask = torch.tensor([255, 0, 0, 51], dtype=torch.uint8).expand(1, 1, 1, 4)
    # Weights 1 + 4 m for m = 1, 0, 0, 1/5: 5, 1, 1, 1.8.
    expected = (5 * 0.01 + 0.04 + 0.09 + 1.8 * 0.16) / (5 + 1 + 1 + 1.8)
    loss = distortion(LossConfig(mask_weight=5), output, target, mask)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_a_uniform_error_costs_the_same_whatever_the_mask():
    target = images(2, 3, 4, 4)
    mask = images(2, 1, 4, 4, seed=2)
    loss = distortion(LossConfig(mask_weight=7), target + 0.5, target, mask)
    torch.testing.assert_close(loss, torch.full((2,), 0.25, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_the_gradient_is_the_closed_form():
    target, output = images(1, 3, 2, 2), images(1, 3, 2, 2, seed=1).requires_grad_()
    mask = torch.tensor([[[[1.0, 0.0], [0.5, 0.0]]]], dtype=torch.float64)
    distortion(LossConfig(mask_weight=3), output, target, mask).sum().backward()
    weight = 1 + 2 * mask
    expected = 2 * weight * (output.detach() - target) / (3 * weight.sum())
    torch.testing.assert_close(output.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32, torch.float64])
def test_masks_of_every_type_mean_the_same(dtype: torch.dtype):
    target, output = images(2, 3, 4, 4), images(2, 3, 4, 4, seed=1)
    inside = images(2, 1, 4, 4, seed=2) > 0.5
    mask = inside.to(dtype) * (255 if dtype == torch.uint8 else 1)
    config = LossConfig(mask_weight=3)
    expected = distortion(config, output, target, inside.double())
    torch.testing.assert_close(distortion(config, output, target, mask.to(dtype)), expected, rtol=1e-12, atol=1e-12)


def test_a_sample_without_any_weight_costs_nothing_and_teaches_nothing():
    target, output = images(2, 3, 4, 4), images(2, 3, 4, 4, seed=1).requires_grad_()
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    mask[0] = 255
    mask[1, :, :2] = 255
    loss = distortion(LossConfig(mask_weight=0), output, target, mask)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    expected = torch.nn.functional.mse_loss(output[1, :, 2:], target[1, :, 2:]).item()
    assert loss[0].item() == 0
    assert loss[1].item() == pytest.approx(expected, rel=1e-12)
    assert gradient[0].abs().sum() == gradient[1, :, :2].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_loss_is_float32_or_wider_under_autocast_too(dtype: torch.dtype):
    target = images(2, 3, 8, 8).to(dtype)
    output = images(2, 3, 8, 8, seed=1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = distortion(LossConfig(mask_weight=2), output, target, torch.ones(2, 1, 8, 8))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = (output.double() - target.double()).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_inputs_of_different_memory_layout_and_no_samples():
    a, b = images(2, 3, 4, 4), images(2, 3, 4, 4, seed=1)
    loss = distortion(MSE, a.contiguous(memory_format=torch.channels_last), b)
    torch.testing.assert_close(loss, distortion(MSE, a, b), rtol=1e-12, atol=1e-12)
    assert distortion(MSE, a[:0], b[:0]).shape == (0,)


def test_ms_ssim_is_that_of_torchmetrics_for_each_sample():
    target = images(3, 3, 180, 176)
    reconstruction = (target + 0.2 * images(3, 3, 180, 176, seed=1)).requires_grad_()
    loss = distortion(LossConfig(distortion="ms_ssim"), reconstruction, target)
    theirs = torch.stack(
        [
            1 - multiscale_structural_similarity_index_measure(r[None], t[None], data_range=1.0, normalize="relu")
            for r, t in zip(reconstruction, target, strict=True)
        ]
    )
    torch.testing.assert_close(loss, theirs, rtol=0, atol=1e-7)
    ours, expected = (torch.autograd.grad(each.sum(), reconstruction)[0] for each in (loss, theirs))
    assert expected.any()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-9)
    inverse = (1 - target).requires_grad_()  # its structure is the opposite: terms below zero
    (gradient,) = torch.autograd.grad(distortion(LossConfig(distortion="ms_ssim"), inverse, target).sum(), inverse)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"distortion": "ms_ssim"}}, "needs a training.crop_size of 176 or more, not 128"),
        (
            {"loss": {"distortion": "ms_ssim"}, "training": {"crop_size": 192}, "data": {"masks": "m"}},
            "takes no data.masks",
        ),
        ({"loss": {"distortion": "l1"}, "model": {"entropy": "factorized"}}, "takes loss.distortion mse or ms_ssim"),
        (
            {"loss": {"quantizer_weight": 0}, "model": {"quantizer": "vq", "codebook_decay": None}},
            "quantizer_weight 0 leaves the codes of vq as they start: give it a weight, or the codes a model.codebook_",
        ),
    ],
)
def test_losses_that_do_not_fit_the_run_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(changes)


def test_lambda_weighs_the_distortion_in_the_field_s_scale():
    rate, distance, step = torch.tensor([0.5, 1.0]), torch.tensor([1e-3, 4e-4]), torch.tensor([48.0, 24.0])
    fixed = rate_distortion(LossConfig.model_validate({"lambda": 0.0035}), rate, distance, step)
    assert fixed.tolist() == pytest.approx([0.5 + 0.0035 * 65.025, 1 + 0.0035 * 26.01])
    every = rate_distortion(LossConfig(), rate, distance, step)
    assert every.tolist() == pytest.approx([0.5 + 22 / 48**2 * 65.025, (1 + 22 / 24**2 * 26.01) * 0.5**0.5])
    similar = LossConfig.model_validate({"lambda": 0.0035, "distortion": "ms_ssim"})
    assert rate_distortion(similar, rate, distance, step).tolist() == pytest.approx([0.50448, 1.001792])


def test_shapes_that_do_not_belong_together_are_named():
    with pytest.raises(
        CodecmillError, match=re.escape("got (1, 3, 4, 4) and (1, 3, 4, 5): crop or pad one to the other")
    ):
        distortion(MSE, torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5))
    with pytest.raises(
        CodecmillError, match=re.escape("must be (1, 1, 4, 4), uint8 0 to 255 or floating point 0 to 1, but is (4, 4)")
    ):
        distortion(MSE, torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(4, 4))
    with pytest.raises(CodecmillError, match=re.escape("but is (1, 1, 4, 4) torch.int64")):
        distortion(MSE, torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize(("mse", "decibels"), [(1.0, 0.0), (0.01, 20.0), (1e-4, 40.0), (0.0, math.inf)])
def test_psnr_of_numbers_and_tensors(mse: float, decibels: float):
    assert psnr(mse) == pytest.approx(decibels, abs=1e-12)
    assert psnr(torch.tensor(mse, dtype=torch.float64)).item() == pytest.approx(decibels, abs=1e-12)


def test_psnr_agrees_with_torchmetrics():
    a, b = images(1, 3, 8, 8), images(1, 3, 8, 8, seed=1)
    expected = peak_signal_noise_ratio(a, b, data_range=1.0).item()
    assert psnr(distortion(MSE, a, b)).item() == pytest.approx(expected, abs=1e-6)
