"""Pictures to files and back: exactly, whatever computes, and only by the model that wrote them."""

import io
import json
import os
import re
import resource
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from another_device import another_device, moved
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import PROJECT
from safetensors.torch import save_file
from test_checkpoints import save

from pipelines.codec import picture_codec
from pipelines.codec.container import BLOCK, OVERHEAD, CodedPicture, most_bytes, parse
from pipelines.codec.entropy_coder import SymbolReader, SymbolWriter, Tables
from pipelines.codec.files import compress, decompress
from pipelines.codec.opening import codec_of as codec_in
from pipelines.codec.picture_codec import PictureCodec
from pipelines.codec.rate_control import bits_per_pixel, encode_to_rate
from pipelines.config import EvaluationConfig, LossConfig, ModelConfig, RunConfig, TrainingConfig
from pipelines.data.images import Normalization, to_image, to_levels, to_tensor, to_unit
from pipelines.errors import CodecmillError, InputError
from pipelines.evaluation.evaluate import evaluate, reconstruct
from pipelines.model import codec as model_codec
from pipelines.model.arithmetic import FRACTION, LIMIT, WEIGHT_FRACTION, Exact, Floating, from_fixed, to_fixed
from pipelines.model.build import build_model
from pipelines.model.codec import TransformCodec
from pipelines.model.entropy import laplace
from pipelines.model.entropy.hyperprior import PASSES
from pipelines.run_directory import Root
from pipelines.training.step import TrainingStep

HALF = Normalization(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
SHA256 = "ab" * 32


def codec_of(entropy: str, seed: int = 0, spread: float = 0.02, context: str = "nested") -> PictureCodec:
    """A small codec whose networks, zero at first, do something; the more so, the larger the spread."""
    config = ModelConfig.model_validate(
        {
            "entropy": entropy,
            "channels": 8,
            "latent_channels": 24,
            "downsamplings": 2,
            "entropy_channels": 8,
            "hyper_channels": 4,
            "context": context,
        }
    )
    model = build_model(config, seed)
    assert isinstance(model, TransformCodec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return PictureCodec(model.eval(), HALF, SHA256, Tables(model.tables))


KINDS = ("nested", "checkerboard", "factorized")


def codec_of_kind(kind: str, spread: float = 0.02) -> PictureCodec:
    if kind == "factorized":
        return codec_of(kind, spread=spread)
    return codec_of("hyperprior", context=kind, spread=spread)


@pytest.fixture(params=KINDS)
def codec(request: pytest.FixtureRequest) -> PictureCodec:
    return codec_of_kind(request.param)


def picture(width: int = 90, height: int = 61) -> Image.Image:
    """Slopes, an edge and some noise."""
    y, x = np.mgrid[:height, :width]
    levels = np.stack([x * 2, y * 3, (x > y) * 90 + x], axis=2) + np.random.default_rng(1).integers(
        0, 20, (height, width, 3)
    )
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(90, 61), (1, 1), (4, 64), (3, 130), (64, 4)])
def test_a_picture_of_any_size_is_read_as_it_was_written(codec: PictureCodec, width: int, height: int):
    image = picture(width, height)
    content = codec.encode(image, codec.step_of(60))
    decoded = codec.decode(parse(content, "x"))
    assert decoded.size == image.size
    assert content == codec.encode(image, codec.step_of(60))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0, 255])
def test_black_and_white_are_read_as_they_are_however_fine_the_step(kind: str, level: int):
    """The lowest frequency of a large block is thousands of steps, more than the networks compute with."""
    model = {"entropy": "factorized"} if kind == "factorized" else {"entropy": "hyperprior", "context": kind}
    model |= {"channels": 8, "latent_channels": 24, "downsamplings": 5, "finest_step": 2.0}
    built = build_model(ModelConfig.model_validate(model), 0)
    assert isinstance(built, TransformCodec)
    codec = PictureCodec(built.eval(), HALF, SHA256, Tables(built.tables))
    content = codec.encode(Image.new("RGB", (64, 64), (level,) * 3), codec.step_of(100))
    assert codec.decode(parse(content, "x")).getextrema() == ((level, level),) * 3


def test_a_model_elsewhere_writes_and_reads_the_same_as_on_the_cpu(codec: PictureCodec):
    image, step = picture(), codec.step_of(60)
    content = codec.encode(image, step)
    decoded = codec.decode(parse(content, "x"))
    with another_device():
        moved(codec.model)
        assert codec.encode(image, step) == content
        assert codec.decode(parse(content, "x")).tobytes() == decoded.tobytes()


def test_a_model_elsewhere_is_evaluated_as_on_the_cpu(tmp_path: Path):
    codec = codec_of_kind("nested")

    def evaluated(name: str) -> dict[str, float]:
        about = {"run": "r", "step": 1, "checkpoint_sha256": SHA256, "normalization": HALF.as_json(), "images": "x"}
        choice = EvaluationConfig(tile_size=64, pictures=1)  # less than the picture: it is cut into tiles
        return evaluate(codec.model, HALF, [("a", picture())], tmp_path / name, choice, about, codec).means

    here = evaluated("here")
    with another_device():
        moved(codec.model)
        assert evaluated("elsewhere") == here


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_in_tiles_is_evaluated_as_whole_and_as_its_file(kind: str, monkeypatch: pytest.MonkeyPatch):
    """Nothing begins anew at a tile's edge: hyper-latents, grids within grids, and what passes see of each other."""
    codec = codec_of_kind(kind)
    codec.model.config = codec.model.config.model_copy(update={"finest_step": 32.0, "coarsest_step": 32.0})
    image = picture(300, 230)

    def share_that_differs(one: Image.Image, other: Image.Image) -> float:
        return float((np.asarray(one) != np.asarray(other)).mean())

    whole = to_image(to_levels(codec.model.reconstruct(to_tensor(image), HALF)))
    assert reconstruct(codec.model, HALF, image, 1024) == whole
    # Where rounding hangs by a thread, floating point may go another way in another tile, and than a file's integers.
    assert share_that_differs(reconstruct(codec.model, HALF, image, 64), whole) < 0.001
    for region in (256, 16):
        monkeypatch.setattr(model_codec, "REGION", region)
        decoded = codec.decode(parse(codec.encode(image, codec.step_of(50)), "x"))
        assert share_that_differs(reconstruct(codec.model, HALF, image, 64), decoded) < 0.01


@pytest.mark.parametrize("context", PASSES)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 14)])
def test_each_latent_has_one_pass_and_a_later_one_has_its_neighbours(context: str, size: tuple[int, int]):
    empty = torch.zeros(1, 1, *size, dtype=torch.bool)
    found = [each.put(torch.ones_like(each.of(empty)), empty) for each in PASSES[context]]
    passes = len(found)
    assert torch.stack(found).sum(dim=0).eq(1).all()
    height, width = size
    straight, diagonal = ((0, 1), (1, 0), (0, -1), (-1, 0)), ((1, 1), (1, -1), (-1, 1), (-1, -1))
    known = found[0].clone()
    for number, here in enumerate(found[1:], 1):
        distance = 2 ** ((passes - 1 - number) // 2)
        for y, x in here[0, 0].nonzero().tolist():
            for dy, dx in diagonal if (passes - number) % 2 == 0 else straight:
                row, column = y + dy * distance, x + dx * distance
                assert not (0 <= row < height and 0 <= column < width) or known[0, 0, row, column]
        known |= here


@pytest.mark.parametrize(("context", "smallest"), [("nested", 48), ("checkerboard", 32)])
def test_the_smallest_crop_teaches_every_weight_and_a_smaller_one_is_refused(context: str, smallest: int):
    model = {"entropy": "hyperprior", "context": context, "downsamplings": 4}
    values = {"model": model, "data": {"patch_size": smallest, "min_scale": 1}}
    too_small, config = (
        RunConfig.model_validate(values | {"training": {"crop_size": side}}) for side in (smallest - 16, smallest)
    )
    with pytest.raises(InputError, match=f"few latents for model.context {context}: take {smallest} or more, or"):
        too_small.must_suit_a_new_run()  # one of former times is read all the same
    config.must_suit_a_new_run()
    side = config.training.crop_size
    codec = codec_of("hyperprior", context=context).model.train()
    generator, pixels = torch.Generator().manual_seed(0), side // 16 * codec.stride
    x = torch.randn(2, 3, pixels, pixels, generator=generator)
    found = codec(x, torch.rand(codec.noise_shape(2, pixels, pixels), generator=generator) - 0.5)
    (found.image.square().sum() + found.bits.sum()).backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in codec.parameters())


@pytest.mark.parametrize("size", [(64, 64), (61, 90), (1, 1)])
def test_reconstruct_is_the_forward_pass_of_the_image_padded_by_its_edge(codec: PictureCodec, size: tuple[int, int]):
    model, levels = codec.model, to_tensor(picture(size[1], size[0]))
    rows, columns = (torch.arange(-(-length // model.stride) * model.stride).clamp(max=length - 1) for length in size)
    x = HALF.normalize(to_unit(levels[None], torch.float32))[:, :, rows][..., columns]
    with torch.no_grad():
        middle, coarse = (HALF.denormalize(model(x, step=step).image) for step in (None, torch.tensor([120.0])))
    assert not torch.equal(middle, coarse)
    model.train()  # which would want noise
    for step, image in ((None, middle), (120.0, coarse)):
        expected = image[0, :, : size[0], : size[1]]
        assert torch.equal(model.reconstruct(levels, HALF, step), expected)
        assert torch.equal(model.reconstruct(levels[None] / 255, HALF, step), expected[None])
    assert model.training and not model.reconstruct(levels).requires_grad


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 32, 32), "(3, 32, 32): add the batch axis with x.unsqueeze(0), or call model.reconstruct(im"),
        (torch.zeros(1, 3, 32, 32).byte(), "torch.uint8 of shape (1, 3, 32, 32): call model.reconstruct(image)"),
        (torch.zeros(1, 3, 32, 30), "(1, 3, 32, 30): make H and W multiples of 4, or call model.reconstruct(image)"),
    ],
)
def test_the_codec_says_how_to_mend_its_input_and_the_remedy_works(x: torch.Tensor, message: str):
    model = codec_of("factorized").model
    with pytest.raises(InputError, match=re.escape(message)):
        model(x)
    assert model.reconstruct(x).shape == x.shape
    with pytest.raises(InputError, match=re.escape("(4, 8, 8): convert it first.")):
        model.reconstruct(torch.zeros(4, 8, 8))


def test_a_finer_step_costs_more_and_is_nearer(codec: PictureCodec):
    image = picture()
    original = to_tensor(image).double()
    found = []
    for quality in (1, 50, 100):
        content = codec.encode(image, codec.step_of(quality))
        decoded = to_tensor(codec.decode(parse(content, "x"))).double()
        found.append((len(content), -(decoded - original).square().mean().item()))
    assert found == sorted(found) and len(set(found)) == 3


def test_what_is_read_is_what_the_model_says(codec: PictureCodec):
    """The file's latents are those of the model's forward pass, up to the rounding of means."""
    image = picture(64, 64)
    step = codec.step_of(70)
    x = HALF.normalize(to_unit(to_tensor(image)[None], torch.float32))
    with torch.no_grad():
        expected = codec.model(x, step=torch.tensor([2 ** (step / 256)]))
    content = codec.encode(image, step)
    coded = parse(content, "x")
    stride = codec.model.stride
    latents = codec.model.read((64 // stride, 64 // stride), step, SymbolReader(codec.tables, coded.payload))
    found = codec.model.synthesise(latents, step)
    assert (found - expected.image).abs().mean() < 0.01
    estimate = expected.bits.sum().item() / 8
    assert len(content) - OVERHEAD == pytest.approx(estimate, rel=0.02, abs=8)


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest) -> PictureCodec:
    """A codec whose probabilities fit: estimates of another differ from what its tables make of it."""
    codec = codec_of_kind(request.param, spread=0.0)
    model = codec.model.train()
    step = TrainingStep(model, HALF, LossConfig(), TrainingConfig(precision="float32", channels_last=False), "cpu")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    image = to_tensor(picture(320, 320))
    for _ in range(150):
        corners = torch.randint(0, 256, (8, 2), generator=generator).tolist()
        crops = torch.stack([image[:, y : y + 64, x : x + 64] for y, x in corners])
        noise = torch.rand(model.noise_shape(8, 64, 64), generator=generator) - 0.5
        optimizer.zero_grad()
        step(crops, None, noise).loss.mean().backward()
        optimizer.step()
    return replace(codec, model=model.eval())


@pytest.mark.parametrize("quality", [60, 80, 100])
def test_a_file_is_as_large_as_the_model_says(trained: PictureCodec, quality: float):
    image = picture(640, 560)
    step = trained.step_of(quality)
    with torch.no_grad():
        x = HALF.normalize(to_unit(to_tensor(image)[None], torch.float32))
        estimate = trained.model(x, step=torch.tensor([2 ** (step / 256)])).bits.sum().item() / 8
    size = len(trained.encode(image, step))
    assert size > 10_000
    assert size == pytest.approx(OVERHEAD + estimate, rel=0.005)


class Recorder:
    """Reads, and keeps what was read."""

    def __init__(self, reader: SymbolReader):
        self.reader = reader
        self.symbols: list[torch.Tensor] = []

    def code(self, scales: torch.Tensor, symbols: torch.Tensor | None = None) -> torch.Tensor:
        self.symbols.append(self.reader.code(scales, symbols))
        return self.symbols[-1]


def symbols_of(codec: PictureCodec, content: bytes) -> torch.Tensor:
    coded = parse(content, "x")
    recorder = Recorder(SymbolReader(codec.tables, coded.payload))
    codec.model.read(codec.latents_of(coded.height, coded.width), coded.step, recorder)
    return torch.cat([part.flatten() for part in recorder.symbols])


def unrounded_pixels_of(codec: PictureCodec, content: bytes) -> torch.Tensor:
    """Before they are rounded to 256 levels, where a last bit that differs would not show in most pixels."""
    coded = parse(content, "x")
    latents = codec.model.read(
        codec.latents_of(coded.height, coded.width), coded.step, SymbolReader(codec.tables, coded.payload)
    )
    return codec.model.synthesise(latents, coded.step)


READ = """
import os, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from test_codec import codec_of_kind, symbols_of, unrounded_pixels_of
from pipelines.codec.container import parse
torch.backends.mkldnn.enabled = False
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
for folder in map(Path, sys.argv[1:]):
    codec, content = codec_of_kind(folder.name), (folder / "x.cmill").read_bytes()
    codec.model.load_state_dict(load_file(folder / "weights"))  # random numbers too differ between instruction sets
    (folder / "symbols").write_bytes(symbols_of(codec, content).numpy().tobytes())
    (folder / "unrounded").write_bytes(unrounded_pixels_of(codec, content).numpy().tobytes())
    (folder / "pixels").write_bytes(codec.decode(parse(content, "x")).tobytes())
"""


@pytest.fixture(scope="module")
def read_plainly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind of codec: a file, the weights, and what a process with the plainest instructions reads."""
    place = tmp_path_factory.mktemp("plainly")
    for kind in KINDS:
        codec, folder = codec_of_kind(kind), place / kind
        folder.mkdir()
        # On smaller pictures torch does without oneDNN anyway.
        (folder / "x.cmill").write_bytes(codec.encode(picture(220, 170), codec.step_of(60)))
        save_file(codec.model.state_dict(), folder / "weights")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}"}
    words = [str(place / kind) for kind in KINDS]
    subprocess.run([sys.executable, "-c", READ, *words], env=environment, check=True, cwd=PROJECT)
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_symbols_and_pixels_are_the_same_whatever_computes(
    kind: str, read_plainly: Path, monkeypatch: pytest.MonkeyPatch
):
    """Threads, kernels, another process with the plainest instructions."""
    codec = codec_of_kind(kind)
    content = (read_plainly / kind / "x.cmill").read_bytes()
    coded = parse(content, "x")
    symbols, pixels = symbols_of(codec, content), codec.decode(coded).tobytes()
    unrounded = unrounded_pixels_of(codec, content)
    assert symbols.unique().numel() > 10
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", count == 2)
        assert torch.equal(symbols_of(codec, content), symbols)
        assert torch.equal(unrounded_pixels_of(codec, content), unrounded)
        assert codec.decode(coded).tobytes() == pixels
    torch.set_num_threads(threads)
    assert (read_plainly / kind / "symbols").read_bytes() == symbols.numpy().tobytes()
    assert (read_plainly / kind / "unrounded").read_bytes() == unrounded.numpy().tobytes()
    assert (read_plainly / kind / "pixels").read_bytes() == pixels


@contextmanager
def defaults_of(dtype: torch.dtype, device: str) -> Iterator[None]:
    """What torch makes tensors of where nobody says it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", ["nested", "factorized"])
@pytest.mark.parametrize(
    ("dtype", "device"),
    [(torch.bfloat16, "cpu"), (torch.float16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")],
)
def test_files_and_pixels_are_the_same_whatever_torchs_defaults_are(
    kind: str, dtype: torch.dtype, device: str, tmp_path: Path
):
    """On the meta device tensors have no numbers: one that is made there by default would be found."""
    codec, image = codec_of_kind(kind), picture()
    saved = save(Root(tmp_path).run("r"), 1, weights=codec.model.state_dict(), model=codec.model.config)
    codec = codec_in(saved)
    content = codec.encode(image, codec.step_of(60))
    pixels = codec.decode(parse(content, "x")).tobytes()
    with defaults_of(dtype, device):
        for each in (codec, codec_in(saved)):
            assert each.encode(image, each.step_of(60)) == content
            assert each.decode(parse(content, "x")).tobytes() == pixels


def test_exact_pixels_are_near_those_of_the_training(codec: PictureCodec):
    step = codec.step_of(60)
    coded = parse(codec.encode(picture(64, 64), step), "x")
    latents = codec.model.read(codec.latents_of(64, 64), step, SymbolReader(codec.tables, coded.payload))
    with torch.no_grad():
        image = codec.model.decoder(latents, *codec.model._levels(step))
    expected = to_levels(HALF.denormalize(image)[0]).int()
    found = to_tensor(codec.decode(coded)).int()
    assert (found - expected).abs().max() <= 1
    assert (found == expected).float().mean() > 0.99


@pytest.mark.parametrize("entropy", ["factorized", "hyperprior"])
def test_a_large_picture_is_coded_in_parts_and_looks_as_if_it_were_not(entropy: str, monkeypatch: pytest.MonkeyPatch):
    codec = codec_of(entropy)
    image = picture(300, 230)
    step = codec.step_of(70)
    whole = codec.decode(parse(codec.encode(image, step), "x"))
    monkeypatch.setattr(picture_codec, "WINDOW", 16)
    coded = parse(codec.encode(image, step), "x")
    assert codec.decode(coded) == whole
    monkeypatch.setattr(model_codec, "REGION", 16)
    content = codec.encode(image, step)
    assert content != coded.to_bytes()
    difference = np.abs(np.asarray(codec.decode(parse(content, "x"))).astype(int) - np.asarray(whole))
    # What is not known of a neighbour moves a mean, and with it what a latent is rounded to.
    assert (difference.max() == 0) if entropy == "factorized" else (0 < difference.mean() < 2)


def in_whole_numbers(layer: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """What `Exact.convolve` is to be, by its definition: int64, halves rounded up."""
    weight = torch.round(layer.weight.detach().double() * 2**WEIGHT_FRACTION).long()
    assert layer.bias is not None
    bias = torch.round(layer.bias.detach().double() * 2 ** (WEIGHT_FRACTION + FRACTION)).long()
    half = layer.kernel_size[0] // 2
    columns = torch.nn.functional.unfold(x, layer.kernel_size, padding=half, stride=layer.stride).long()
    groups, taps = layer.groups, weight[0].numel()
    sums = weight.view(groups, -1, taps) @ columns.view(len(x), groups, taps, -1)
    sums = sums.view(len(x), len(weight), -1) + bias[:, None]
    height = (x.shape[2] - 1) // layer.stride[0] + 1
    rounded = (sums + 2 ** (WEIGHT_FRACTION - 1)) >> WEIGHT_FRACTION
    return rounded.clamp(-LIMIT, LIMIT).view(len(x), len(weight), height, -1).double()


def extreme_activations(size: int) -> torch.Tensor:
    return torch.randint(-LIMIT, LIMIT, (size, 24, 9, 11), generator=torch.Generator().manual_seed(size)).double()


CONVOLUTIONS = {
    "plain": torch.nn.Conv2d(24, 16, 5, padding=2),
    "strided": torch.nn.Conv2d(24, 16, 5, stride=2, padding=2),
    "grouped": torch.nn.Conv2d(24, 24, 5, padding=2, groups=24),
    "pointwise": torch.nn.Conv2d(24, 16, 1),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("size", [1, 8, 16, 32])
def test_exact_sums_are_those_of_whole_numbers_in_any_batch(
    name: str, onednn: bool, size: int, monkeypatch: pytest.MonkeyPatch
):
    """So is what decides on probabilities: a path that is no plain sum would show here."""
    layer, x = CONVOLUTIONS[name], extreme_activations(size)
    expected = in_whole_numbers(layer, x)
    assert expected.unique().numel() > 100
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", onednn)
    assert torch.equal(Exact().convolve(layer, x), expected)


@pytest.mark.parametrize(("name", "size"), [("plain", 8), ("plain", 16), ("strided", 16)])
def test_exact_sums_are_those_of_whole_numbers_compiled(name: str, size: int):
    layer, x = CONVOLUTIONS[name], extreme_activations(size)

    @torch.compile(backend="inductor", dynamic=False)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return Exact().activate(Exact().convolve(layer, x))

    assert torch.equal(compiled(x), Exact().activate(in_whole_numbers(layer, x)))


def test_exact_integers_are_near_the_floating_point_they_stand_for():
    layer = torch.nn.Conv2d(30, 8, 5, padding=2).double()
    x = torch.randn(3, 30, 9, 7, dtype=torch.float64) * 5
    fixed = to_fixed(x)
    exact = Exact()
    found = from_fixed(exact.convolve(layer, fixed))
    assert (found - layer(x)).abs().max() < 0.01
    assert torch.equal(exact.convolve(layer, fixed), torch.cat([exact.convolve(layer, each[None]) for each in fixed]))
    assert (from_fixed(exact.activate(fixed)) - Floating().activate(x)).abs().max() < 1e-4
    assert exact.convolve(layer, torch.full_like(fixed, 1e9).clamp(-LIMIT, LIMIT)).abs().max() <= LIMIT


@pytest.mark.parametrize("value", [1e9, float("nan"), float("inf")])
def test_weights_that_no_exact_sum_can_have_are_refused(value: float):
    codec = codec_of("hyperprior")
    with torch.no_grad():
        codec.model.get_parameter("entropy.coarse.weight")[0, 0, 0, 0] = value
    with pytest.raises(CodecmillError, match="too large for exact integers"):
        codec.encode(picture(), codec.step_of(50))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("factorized", "encoder.network"),
        ("nested", "encoder.network"),
        ("nested", "entropy.analysis"),
        ("factorized", "entropy.mean"),
        ("factorized", "entropy.scale"),
        ("nested", "entropy.base.mean"),
        ("nested", "entropy.hyper.scale"),
    ],
)
def test_weights_that_are_no_numbers_write_no_file(kind: str, name: str):
    codec = codec_of_kind(kind)
    with torch.no_grad():
        next(each for key, each in codec.model.named_parameters() if key.startswith(name)).fill_(float("nan"))
    with pytest.raises(CodecmillError, match="latents or their probabilities are not finite: its training has diverg"):
        codec.encode(picture(), codec.step_of(50))


@pytest.mark.parametrize("name", ["entropy.mean", "entropy.scale", "entropy.slope"])
def test_probabilities_that_are_no_numbers_read_no_file(name: str):
    codec = codec_of("factorized")
    coded = parse(codec.encode(picture(), codec.step_of(50)), "x")
    with torch.no_grad():
        codec.model.get_parameter(name).fill_(float("nan"))
    with pytest.raises(CodecmillError, match="latents or their probabilities are not finite"):
        codec.decode(coded)


@pytest.mark.parametrize("gain", [-1e30, 1e30, -1e4, float("nan")])
def test_a_gain_beyond_numbers_neither_writes_nor_reads(gain: float):
    codec = codec_of("factorized")
    coded = parse(codec.encode(picture(), codec.step_of(50)), "x")
    with torch.no_grad():
        codec.model.gain[0] = gain
    with pytest.raises(CodecmillError, match="are not finite: its training has diverged"):
        codec.encode(picture(), codec.step_of(50))
    if not gain > 0:  # a large one makes a step of nothing
        with pytest.raises(CodecmillError, match="gains are not finite: its training has diverged"):
            codec.decode(coded)


def test_bits_are_those_of_a_rounded_laplace_variable():
    residual = torch.linspace(-40, 40, 321, dtype=torch.float64)[:, None]
    log2_scale = torch.linspace(-5, 6, 41, dtype=torch.float64)
    scale = 2**log2_scale
    laplace_cdf = torch.distributions.Laplace(torch.zeros(41, dtype=torch.float64), scale).cdf
    expected = -torch.log2(laplace_cdf(residual + 0.5) - laplace_cdf(residual - 0.5))
    found = laplace.bits(residual, log2_scale)
    known = expected < 40  # beyond, the difference of two numbers near 1 has lost its digits
    assert (found - expected)[known].abs().max() < 1e-3
    assert (found - expected)[expected < 20].abs().max() < 1e-9


def test_bits_have_finite_gradients_everywhere():
    residual = torch.tensor([0.0, 0.5, -0.5, 0.4999999, 1e4, -1e4, 1e-30], requires_grad=True)
    for exponent in (-30.0, -4.0, 0.0, 6.0, 30.0):
        log2_scale = torch.full((7,), exponent, requires_grad=True)
        cost = laplace.bits(residual, log2_scale)
        gradients = torch.autograd.grad(cost.sum(), (residual, log2_scale))
        assert cost.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


def test_tables_are_the_distribution_on_the_grid_of_scales():
    tables = laplace.frequency_tables().double() / laplace.TOTAL
    assert torch.equal(tables.sum(dim=1), torch.ones(laplace.SCALES, dtype=torch.float64))
    rows = torch.arange(laplace.SCALES)
    log2_scale = laplace.LOWEST + rows.double() / laplace.PER_OCTAVE
    values = torch.arange(-laplace.LARGEST, laplace.LARGEST + 1).double()
    expected = 2 ** -laplace.bits(values, log2_scale[:, None])
    assert (tables[:, :-1] - expected).abs().max() < 2.0**-14


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_symbols_of_any_size_are_read_as_they_were_written(data: st.DataObject):
    tables = Tables(laplace.frequency_tables())
    parts = data.draw(st.lists(st.lists(st.tuples(st.integers(0, 88), st.integers(-66_000, 66_000))), max_size=3))
    writer = SymbolWriter(tables)
    columns = [torch.tensor(part, dtype=torch.int64).reshape(-1, 2).T for part in parts]
    said = [writer.code(scales, symbols) for scales, symbols in columns]
    reader = SymbolReader(tables, writer.content(), symbols=sum(map(len, parts)))
    for (scales, symbols), written in zip(columns, said, strict=True):
        assert torch.equal(reader.code(scales), written)
        assert torch.equal(written, symbols.clamp(-65_790, 65_790))
    reader.finish()


def test_every_changed_byte_and_every_cut_is_named(codec: PictureCodec):
    content = codec.encode(picture(24, 24), codec.step_of(50))
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x10
        with pytest.raises(InputError, match=r"x\.cmill (is|claims)"):
            parse(bytes(changed), "x.cmill")
        with pytest.raises(InputError, match=r"x\.cmill is"):
            parse(content[:place], "x.cmill")
    with pytest.raises(InputError, match="something added"):
        parse(content + b"\0", "x.cmill")


def is_a_picture_or_a_clear_error(codec: PictureCodec, coded: CodedPicture) -> bool:
    """Whether it is a picture, of the size that it claims."""
    try:
        assert codec.decode(parse(coded.to_bytes(), "x")).size == (coded.width, coded.height)
    except CodecmillError as error:
        assert str(error).startswith(("A coded picture ", "x claims ", "The picture's coefficients are too large"))
        return False
    return True


@cache
def small_coded() -> tuple[PictureCodec, CodedPicture]:
    """A codec and what it made of a small picture, once for all the examples that alter it."""
    codec = codec_of("hyperprior")
    return codec, parse(codec.encode(picture(24, 24), codec.step_of(50)), "x")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_payload_under_its_own_checksum_is_a_picture_or_an_error(data: st.DataObject):
    codec, coded = small_coded()
    payload = bytearray(coded.payload)
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    changed = bytes(payload[: data.draw(st.integers(0, len(payload)))])
    is_a_picture_or_a_clear_error(codec, replace(coded, payload=changed))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    width=st.integers(0, 2**32 - 1) | st.integers(1, 600), height=st.integers(1, 600), step=st.integers(0, 2**16 - 1)
)
def test_a_header_under_its_own_checksum_is_a_picture_or_an_error(width: int, height: int, step: int):
    codec, coded = small_coded()
    assert is_a_picture_or_a_clear_error(codec, coded)
    for field in ({"width": width}, {"height": height}, {"step": step}, {"step": 256 + step % 1793, "height": height}):
        is_a_picture_or_a_clear_error(codec, replace(coded, **field))


def test_words_too_many_or_too_few_under_a_checksum_are_found(codec: PictureCodec):
    coded = parse(codec.encode(picture(), codec.step_of(50)), "x")
    words = len(coded.payload) // 4
    assert codec.decode(coded).size == (90, 61)
    for extra in (2, 3, 100):
        with pytest.raises(CodecmillError, match="does not end where its last symbol does: the file is damaged"):
            codec.decode(replace(coded, payload=coded.payload + bytes(range(4)) * extra))
    for missing in (4, words // 2, words):
        with pytest.raises(CodecmillError, match=r"A coded picture (of|has fewer|does not end)"):
            codec.decode(replace(coded, payload=coded.payload[: -4 * missing]))


@pytest.mark.parametrize("scale", [0, 20, 88])
def test_a_reader_that_is_asked_for_more_than_was_written_says_so_soon(scale: int):
    """Where the range coder would read zeros for ever, in likely symbols and in unlikely ones."""
    tables = Tables(laplace.frequency_tables())
    scales, symbols = torch.full((500,), scale), torch.arange(500) % 7 - 3
    writer = SymbolWriter(tables)
    writer.code(scales, symbols)
    reader = SymbolReader(tables, writer.content())
    assert torch.equal(reader.code(scales), symbols)
    with pytest.raises(CodecmillError, match="has fewer symbols than its size asks for: the file is damaged"):
        for _ in range(100):
            reader.code(torch.zeros(500, dtype=torch.int64))
    with pytest.raises(CodecmillError, match=r"of 1,000,000,000 symbols does not fit into \d+ bytes"):
        SymbolReader(tables, writer.content(), symbols=10**9)


def test_of_several_files_the_damaged_one_is_named(tmp_path: Path):
    codec = codec_of("factorized")
    coded = parse(codec.encode(picture(24, 24), codec.step_of(50)), "x")
    longer = replace(coded, payload=coded.payload + bytes(8))
    files = [tmp_path / "a.cmill", tmp_path / "b.cmill"]
    for file, each in zip(files, (coded, longer), strict=True):
        file.write_bytes(each.to_bytes())
    with pytest.raises(CodecmillError, match=r"b\.cmill cannot be decoded\. A coded picture does not end where its"):
        list(decompress(files, tmp_path / "decoded", codec, Root(tmp_path)))
    assert [file.name for file in (tmp_path / "decoded").iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"RIFF", r"x\.cmill is no \.cmill file"),
        (CodedPicture(8, 8, 1500, SHA256, bytes(8)).to_bytes(), r"x\.cmill is cut off or has something added"),
    ],
    ids=["foreign", "longer"],
)
def test_of_a_large_file_that_is_none_only_the_head_is_read(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "x.cmill").write_bytes(content)
    os.truncate(tmp_path / "x.cmill", 2**26)
    tracemalloc.start()
    with pytest.raises(InputError, match=message):
        list(decompress([tmp_path / "x.cmill"], tmp_path / "decoded", None, Root(tmp_path)))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**20


def test_of_a_pipe_that_does_not_end_no_more_is_read_than_its_head_announces(tmp_path: Path):
    codec = codec_of("factorized")
    pipe = tmp_path / "x.cmill"
    os.mkfifo(pipe)

    def pour(first: bytes) -> int:
        sent = 0
        with suppress(BrokenPipeError), pipe.open("wb", buffering=0) as stream:  # whose reader goes away
            sent += stream.write(first) or 0
            while sent < 2**26:
                sent += stream.write(bytes(2**16)) or 0
        return sent

    with ThreadPoolExecutor(1) as beside:
        poured = beside.submit(pour, codec.encode(picture(24, 24), codec.step_of(50)))
        with pytest.raises(InputError, match=r"x\.cmill is cut off or has something added"):
            list(decompress([pipe], tmp_path / "decoded", codec, Root(tmp_path)))
    assert poured.result() < 2**20


def test_more_bytes_than_any_picture_needs_are_neither_read_nor_written(tmp_path: Path):
    codec = codec_of("factorized")
    most = most_bytes(8, 8)
    coded = CodedPicture(8, 8, 1500, SHA256, bytes(most))
    assert parse(coded.to_bytes(), "x") == coded
    with pytest.raises(InputError, match=r"x claims 262,148 bytes for 8 x 8 pixels"):
        parse(replace(coded, payload=bytes(most + 4)).to_bytes(), "x")
    header = bytearray(coded.to_bytes()[: OVERHEAD - 8])
    header[-4:] = (2**32 - 1).to_bytes(4, "little")
    head = bytes(header) + zlib.crc32(header).to_bytes(4, "little")
    (tmp_path / "x.cmill").write_bytes(head)
    os.truncate(tmp_path / "x.cmill", OVERHEAD + 2**32 - 1)
    with pytest.raises(InputError, match=r"x\.cmill claims 4,294,967,295 bytes for 8 x 8 pixels, more than any"):
        list(decompress([tmp_path / "x.cmill"], tmp_path / "decoded", codec, Root(tmp_path)))


def test_a_codec_that_takes_more_bytes_than_any_picture_needs_writes_no_file_that_nobody_reads():
    model = build_model(
        ModelConfig.model_validate({"entropy": "factorized", "channels": 8, "latent_channels": 512, "downsamplings": 1})
    )
    assert isinstance(model, TransformCodec)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        model.gain.add_(9)
    codec = PictureCodec(model.eval(), HALF, SHA256, Tables(model.tables))
    with pytest.raises(
        CodecmillError, match=r"64 x 64 pixels takes [\d,]+ bytes by this model, more than the 262,144 "
    ):
        codec.encode(picture(64, 64), codec.step_of(100))


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path):
    codec = codec_of("factorized")
    picture(24, 24).save(tmp_path / "x.png")
    (tmp_path / "file").touch()
    (tmp_path / "o" / "x.cmill").mkdir(parents=True)
    (tmp_path / "o" / "x.png").mkdir()
    for folder, reason in (("file", "file cannot be written: a file is in its way"), ("o", "Is a directory")):
        told = rf"{reason}\. Name another place with -o\."
        with pytest.raises(InputError, match=told):
            list(compress([tmp_path / "x.png"], tmp_path / folder, codec, 50, None))
        list(compress([tmp_path / "x.png"], tmp_path / "c", codec, 50, None))
        with pytest.raises(InputError, match=told):
            list(decompress([tmp_path / "c" / "x.cmill"], tmp_path / folder, codec, Root(tmp_path)))
    assert sorted(file.name for file in (tmp_path / "o").iterdir()) == ["x.cmill", "x.png"]


def test_a_size_that_was_not_written_is_found_at_once(codec: PictureCodec):
    """However large it is: neither time nor memory goes by what a header claims."""
    coded = parse(codec.encode(picture(), codec.step_of(50)), "x")
    for width, height in ((400_000_000, 1), (20_000, 20_000), (9_000, 1_000), (180, 122)):
        begun = time.perf_counter()
        with pytest.raises(CodecmillError, match=r"A coded picture (of|has fewer|does not belong to)"):
            codec.decode(replace(coded, width=width, height=height))
        assert time.perf_counter() - begun < 10
    for width, height in ((45, 61), (4, 4)):
        with pytest.raises(CodecmillError, match=r"A coded picture (has fewer|does not end|does not belong to)"):
            codec.decode(replace(coded, width=width, height=height))


@pytest.mark.parametrize("step", [0, 255, 2049, 65_535])
def test_a_step_that_no_codec_has_is_refused(step: int):
    with pytest.raises(InputError, match=r"x claims a quantiser step of .* grey levels; there are 2 to 256\."):
        parse(CodedPicture(8, 8, step, SHA256, b"").to_bytes(), "x")
    for step in (256, 2048):
        parse(CodedPicture(8, 8, step, SHA256, b"").to_bytes(), "x")


def outcomes_of_altered(seed: int, files: int) -> dict[str, int]:
    """What comes of decoding altered files, a count each; in little time and memory."""
    codec = codec_of("hyperprior")
    content = codec.encode(picture(40, 32), codec.step_of(50))
    random = np.random.default_rng(seed)
    outcomes: dict[str, int] = {}
    longest, memory = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    coded = parse(content, "x")
    for number in range(files):
        match number % 4:
            case 0:
                altered = mutated(content, random)
            case 1:
                altered = replace(coded, payload=mutated(coded.payload, random)).to_bytes()
            case 2:
                altered = replace(coded, payload=other_words(coded.payload, random)).to_bytes()
            case _:
                altered = other_header(coded, random).to_bytes()
        begun = time.perf_counter()
        try:
            parsed = parse(altered, "x")
            decoded = codec.decode(parsed)
            assert decoded.size == (parsed.width, parsed.height)
            outcome = decoded.mode
        except CodecmillError as error:
            outcome = type(error).__name__
            assert str(error).endswith((".", ". ")) and len(str(error)) < 300
        longest = max(longest, time.perf_counter() - begun)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert longest < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # KiB
    return outcomes


ALTERED = """
import json, sys
from test_codec import outcomes_of_altered
print(json.dumps(outcomes_of_altered(int(sys.argv[1]), 5_000)))
"""


@pytest.mark.full
@pytest.mark.timeout(900)
def test_ten_thousand_altered_files_are_pictures_or_clear_errors():
    """Bytes changed, cut out and put in, and other headers, most under fitting checksums; in two processes."""
    environment = os.environ | {"PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}", "OMP_NUM_THREADS": "1"}

    def decoded_with(seed: int) -> Counter[str]:
        command = [sys.executable, "-c", ALTERED, str(seed)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stderr
        return Counter(json.loads(done.stdout))

    with ThreadPoolExecutor(2) as both:
        outcomes = sum(both.map(decoded_with, (0, 1)), Counter[str]())
    assert outcomes.total() == 10_000
    assert outcomes["InputError"] >= 2_500
    assert outcomes["CodecmillError"] >= 2_500
    assert outcomes["RGB"] > 50  # words that differ near their end, and steps: checksums alone find those


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(random.integers(1, 4)):
        place = int(random.integers(len(changed)))
        match random.integers(4):
            case 0 | 1:
                changed[place] ^= int(random.integers(1, 256))
            case 2:
                del changed[place : place + int(random.integers(1, 9))]
            case _:
                changed[place:place] = random.bytes(int(random.integers(1, 9)))
    return bytes(changed)


def other_words(payload: bytes, random: np.random.Generator) -> bytes:
    """Whole words cut off or added, which the range coder cannot tell from its own by their number."""
    count = int(random.integers(1, 9))
    return payload[: -4 * count] if random.integers(2) else payload + random.bytes(4 * count)


def other_header(coded: CodedPicture, random: np.random.Generator) -> CodedPicture:
    """One or all of the fields of another picture, of any size there is."""
    fields = {
        "width": int(2 ** random.uniform(0, 32)),
        "height": int(2 ** random.uniform(0, 32)),
        "step": int(random.integers(2**16) if random.integers(2) else random.integers(256, 2049)),
    }
    one = str(random.choice([*fields]))
    return replace(coded, **(fields if random.integers(2) else {one: fields[one]}))


@pytest.mark.parametrize(
    ("width", "height"), [(0, 5), (2**32 - 1, 2**32 - 1), (400_000_001, 1), (20_000, 20_001), (400_000_000, 1)]
)
def test_a_size_that_no_picture_has_is_neither_read_nor_written(width: int, height: int):
    """Memory goes by rows of latents, of which a picture one pixel high takes as many as one 64 high."""
    most = f"there must be some, 400,000,000 at most, and 800,000,000 at most with both sides rounded up to {BLOCK}"
    with pytest.raises(InputError, match=f"x claims {width} x {height} pixels; {most}"):
        parse(CodedPicture(width, height, 1000, SHA256, b"").to_bytes(), "x")
    image = cast("Image.Image", SimpleNamespace(width=width, height=height, size=(width, height)))
    with pytest.raises(InputError, match=f"A picture of {width} x {height} pixels cannot be coded: {most}"):
        codec_of("factorized").encode(image, 1000)


def test_the_largest_pictures_are_read():
    for width, height in ((20_000, 20_000), (12_499_968, 1), (64, 6_250_000)):
        coded = CodedPicture(width, height, 1000, SHA256, b"")
        assert parse(coded.to_bytes(), "x") == coded


def test_of_several_pictures_the_one_that_cannot_be_coded_is_named(tmp_path: Path):
    codec = codec_of("factorized")
    picture(24, 24).save(tmp_path / "a.png")
    Image.new("1", (12_499_969, 1)).save(tmp_path / "thin.tif", compression="group4")
    with pytest.raises(InputError, match=r"thin\.tif cannot be coded\. A picture of 12499969 x 1 pixels cannot be"):
        list(compress([tmp_path / "a.png", tmp_path / "thin.tif"], tmp_path / "coded", codec, 50, None))
    assert [file.name for file in (tmp_path / "coded").iterdir()] == ["a.cmill"]


def test_a_file_of_another_model_is_refused_by_name():
    codec = codec_of("factorized")
    content = CodedPicture(8, 8, 1000, "cd" * 32, b"").to_bytes()
    with pytest.raises(InputError, match="written by the model with sha256 cdcdcdcdcdcdcdcd"):
        codec.decode(parse(content, "x"))


def test_a_wanted_rate_is_met():
    codec = codec_of("hyperprior")
    image = picture(256, 256)
    reach = [bits_per_pixel(codec.encode(image, codec.step_of(quality)), image) for quality in (1, 100)]
    for share in (0.2, 0.5, 0.8):
        target = reach[0] + share * (reach[1] - reach[0])
        found = encode_to_rate(codec, image, target)
        assert found.is_reached
        assert bits_per_pixel(found.content, image) == pytest.approx(target, rel=0.02)
    for target, nearest in ((0.001, reach[0]), (90.0, reach[1])):
        found = encode_to_rate(codec, image, target)
        assert not found.is_reached
        assert bits_per_pixel(found.content, image) == nearest


@pytest.mark.parametrize("quality", [0.99, 100.01, float("nan")])
def test_a_quality_outside_is_refused(quality: float):
    with pytest.raises(InputError, match="not between 1 and 100"):
        codec_of("factorized").step_of(quality)


def test_the_container_is_what_its_description_says():
    content = CodedPicture(640, 480, 1500, SHA256, b"payload!").to_bytes()
    header = b"CMIL\1" + (640).to_bytes(4, "little") + (480).to_bytes(4, "little") + (1500).to_bytes(2, "little")
    header += bytes.fromhex(SHA256) + (8).to_bytes(4, "little")
    checksum = lambda part: zlib.crc32(part).to_bytes(4, "little")  # noqa: E731
    assert content == header + checksum(header) + b"payload!" + checksum(b"payload!")
    assert parse(content, "x") == CodedPicture(640, 480, 1500, SHA256, b"payload!")


def test_pictures_of_other_modes_become_rgb(tmp_path: Path):
    codec = codec_of("factorized")
    files = []
    for mode in ("L", "P", "RGBA", "1", "CMYK", "I;16"):
        file = tmp_path / f"{mode.replace(';', '')}.tiff"
        (picture(30, 20).convert("L") if mode == "I;16" else picture(30, 20)).convert(mode).save(file)
        files.append(file)
    written = list(compress(files, tmp_path / "coded", codec, 50, None))
    decoded = list(decompress([each.path for each in written], tmp_path / "decoded", codec, Root(tmp_path)))
    for each in decoded:
        with Image.open(io.BytesIO(each.path.read_bytes())) as image:
            assert (image.mode, image.size, image.format) == ("RGB", (30, 20), "PNG")
    assert {each.name for each in (tmp_path / "decoded").iterdir()} == {f"{file.stem}.png" for file in files}
