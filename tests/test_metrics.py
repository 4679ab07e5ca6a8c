"""PSNR against its closed form, MS-SSIM against torchmetrics, tiling against the untiled result."""

import math

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from pipelines.config import ModelConfig
from pipelines.errors import CodecmillError
from pipelines.evaluation import metrics
from pipelines.evaluation.metrics import Quality, compare, means, ms_ssim, psnr
from pipelines.model.autoencoder import Autoencoder
from pipelines.model.tiling import receptive_radius, reconstruct_tiled


def degraded(image: Image.Image) -> Image.Image:
    noise = np.random.Generator(np.random.Philox(7)).normal(0, 12, (image.height, image.width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def torchmetrics_index(original: Image.Image, reconstruction: Image.Image) -> float:
    one, other = (
        torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double() / 255 for image in (original, reconstruction)
    )
    return float(multiscale_structural_similarity_index_measure(other, one, data_range=1.0))


def test_psnr_is_its_closed_form() -> None:
    original = np.full((5, 7, 3), 100, np.uint8)
    assert psnr(original, original + 10) == pytest.approx(10 * math.log10(255**2 / 100), abs=1e-12)
    assert psnr(original + 10, original) == psnr(original, original + 10)
    one_level_in_one_channel = original.copy()
    one_level_in_one_channel[2, 3, 1] += 1
    assert psnr(original, one_level_in_one_channel) == pytest.approx(10 * math.log10(255**2 * 105), abs=1e-12)
    assert psnr(np.zeros((1, 1, 3), np.uint8), np.full((1, 1, 3), 255, np.uint8)) == 0


def test_psnr_in_bands_is_psnr(monkeypatch: pytest.MonkeyPatch) -> None:
    original = picture(1, 61, 47)
    reconstruction = degraded(original)
    difference = np.asarray(original).astype(float) - np.asarray(reconstruction)
    monkeypatch.setattr(metrics, "BAND_PIXELS", 61 * 10)
    assert psnr(original, reconstruction) == pytest.approx(10 * math.log10(255**2 / np.mean(difference**2)), abs=1e-10)


def test_equal_pictures_are_infinitely_near_and_reported_as_100_db() -> None:
    image = picture(2, 180, 176)
    assert psnr(image, image) == math.inf
    quality = compare(image, image)
    assert quality.psnr == 100
    assert quality.ms_ssim == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("size", [(176, 176), (203, 257)])
@pytest.mark.parametrize("band", [176 * 30, 10**9])
def test_ms_ssim_is_that_of_torchmetrics(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], band: int) -> None:
    original = picture(3, *size)
    monkeypatch.setattr(metrics, "BAND_PIXELS", band)
    found = ms_ssim(original, degraded(original))
    assert found == pytest.approx(torchmetrics_index(original, degraded(original)), abs=2e-6)
    assert found is not None
    assert found < 0.995


def test_ms_ssim_of_opposites_is_zero_like_that_of_torchmetrics() -> None:
    original = degraded(Image.new("RGB", (176, 176), (128, 128, 128)))
    negative = Image.fromarray(255 - np.asarray(original))
    assert ms_ssim(original, negative) == torchmetrics_index(original, negative) == 0


def test_ms_ssim_is_undefined_exactly_where_torchmetrics_refuses() -> None:
    small = picture(4, 300, 175)
    with pytest.raises(ValueError, match="image height must be larger than 160"):
        torchmetrics_index(small, small)
    assert ms_ssim(small, small) is None


def test_means_leave_out_what_is_undefined() -> None:
    assert means([Quality(30, None), Quality(34, 0.9), Quality(38, 0.8)]) == {
        "psnr": 34,
        "ms_ssim": pytest.approx(0.85),
    }
    assert means([Quality(30, None)]) == {"psnr": 30}


def test_pictures_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(CodecmillError, match="The reconstruction is 8 x 9 pixels, but its original 8 x 10"):
        psnr(picture(0, 8, 10), picture(0, 8, 9))
    with pytest.raises(CodecmillError, match=r"8-bit RGB pictures \(H, W, 3\), but got uint8 of shape \(10, 8\)"):
        ms_ssim(picture(0, 8, 10).convert("L"), picture(0, 8, 10))


RADIUS = 2 * 1 + 2 * 2 + 1 * 4 + 1 * 1 + (4 - 1)
"""Of `network`: half a kernel times the pixels it steps by, for each convolution, and the rest of a block."""


def network() -> nn.Sequential:
    """Down to a quarter and up again, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 5, stride=2, padding=2),
            nn.LeakyReLU(),
            nn.Conv2d(6, 6, 5, stride=2, padding=2),
            nn.LeakyReLU(),
            nn.Conv2d(6, 48, 3, padding=1),
            nn.PixelShuffle(4),
            nn.LeakyReLU(),
            nn.Conv2d(3, 3, 3, padding=1),
        )
    return net.double().requires_grad_(False)


def padded(x: Tensor, stride: int) -> Tensor:
    height, width = x.shape[2:]
    return nn.functional.pad(x, (0, -width % stride, 0, -height % stride), mode="replicate")


def test_receptive_radius_bounds_what_a_pixel_sees() -> None:
    net = network()
    radius = receptive_radius(net, torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    assert radius == RADIUS
    farthest = 0
    for place in range(48, 52):
        x = torch.rand(1, 3, 96, 96, dtype=torch.float64, requires_grad=True)
        net(x)[0, :, place, place].abs().sum().backward()
        assert x.grad is not None
        seen = x.grad.abs().sum(dim=(0, 1, 2)).nonzero().flatten()
        farthest = max(farthest, int((seen - place).abs().max()))
    assert farthest == radius


@pytest.mark.parametrize("size", [(150, 97), (64, 200), (131, 129)])
def test_tiles_that_overlap_enough_equal_the_untiled_result_everywhere(size: tuple[int, int]) -> None:
    net = network()
    x = torch.rand(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    shapes = set()

    def model_fn(part: Tensor) -> Tensor:
        shapes.add(tuple(part.shape[2:]))
        return net(part)

    tiled = reconstruct_tiled(model_fn, x, tile=62, overlap=2 * RADIUS, stride=4)
    whole = net(padded(x, 4))[:, :, : size[0], : size[1]]
    assert tiled.shape == x.shape
    assert (tiled - whole).abs().max() < 1e-10
    assert len(shapes) == 1
    assert max(shapes.pop()) <= 64
    too_little = reconstruct_tiled(net, x, tile=64, overlap=4, stride=4)
    assert (too_little - whole).abs().max() > 1e-6


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (61, 64)])
def test_a_picture_that_fits_is_one_call(size: tuple[int, int]) -> None:
    net = network()
    x = torch.rand(1, 3, *size, dtype=torch.float64)
    assert torch.equal(
        reconstruct_tiled(net, x, tile=64, overlap=22, stride=4), net(padded(x, 4))[:, :, : size[0], : size[1]]
    )


@pytest.mark.parametrize("size", [(1, 1), (7, 500), (130, 66), (129, 1)])
@pytest.mark.parametrize("overlap", [0, 6, 63, 64])
def test_tiles_cover_every_pixel_once(size: tuple[int, int], overlap: int) -> None:
    x = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    assert torch.equal(reconstruct_tiled(lambda part: part, x, tile=64, overlap=overlap, stride=8), x)


def test_the_autoencoder_in_tiles_equals_it_untiled() -> None:
    model = Autoencoder(ModelConfig(channels=8, latent_channels=4, downsamplings=2, quantizer="noise"), seed=3)
    model = model.double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    radius = receptive_radius(model, torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    x = torch.rand(1, 3, 40, 331, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    tiled = reconstruct_tiled(lambda part: model(part).image, x, tile=160, overlap=2 * radius, stride=model.stride)
    assert 2 * radius < 120
    assert (tiled - model(padded(x, 4)).image[..., :331]).abs().max() < 1e-10
