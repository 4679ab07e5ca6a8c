"""Vectors to codes: values, gradients against closed forms in float64, and what is asked of every layer."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.config import ModelConfig
from pipelines.errors import CodecmillError
from pipelines.model.latent_quantizers import DrawnCodes
from pipelines.model.straight_through import (
    LFQ,
    VectorQuantizer,
    binary_entropy_loss,
    nearest_code,
    rotation_trick,
    vector,
)


def test_autocast_chooses_the_same_codes():
    layer, x = VectorQuantizer(64, 6), random(8, 6, 16, 16).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    assert torch.equal(found.indices, layer(x).indices)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: Tensor, expected: Tensor) -> None:
    """To 1e-12, whatever the size of the numbers."""
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-12)


def test_the_nearest_code_is_that_of_the_smallest_distance():
    vectors, codebook = random(50, 6), random(9, 6, seed=1)
    assert torch.equal(nearest_code(vectors, codebook), torch.cdist(vectors, codebook).argmin(dim=1))
    assert nearest_code(torch.zeros(1, 2), torch.tensor([[1.0, 0], [0, 1], [-1, 0]])).tolist() == [0]


@pytest.mark.parametrize("codes", [2, 64, 512, 1000])
@pytest.mark.parametrize("channels", [1, 4, 24])
def test_in_blocks_the_nearest_codes_are_those_of_all_distances_at_once(
    codes: int, channels: int, monkeypatch: pytest.MonkeyPatch
):
    """In float32, to the last bit of what is compared, where a step learns from it."""
    codebook = random(codes, channels, seed=1).float()
    for count in (0, 1, 7, 64, 515):
        vectors = random(count, channels).float()
        expected = (codebook.square().sum(dim=1) - 2 * vectors @ codebook.T).argmin(dim=1)
        for most in (2**24, 100 * codes, 64 * codes + 1, 1):
            monkeypatch.setattr(vector, "MOST_DISTANCES", most)
            assert torch.equal(nearest_code(vectors, codebook), expected)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor had which was computed meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(each, Tensor):
                self.numbers = max(self.numbers, each.numel())
        return found


def test_many_vectors_and_codes_take_no_more_room_than_a_block_of_distances():
    layer, x = VectorQuantizer(8192, 4).eval(), random(1, 4, 64, 33).float()
    with Largest() as largest:
        layer(x)
    assert largest.numbers <= vector.MOST_DISTANCES < 64 * 33 * 8192


def test_gumbel_evaluates_as_by_its_scores_in_no_more_room_than_a_block_of_them(monkeypatch: pytest.MonkeyPatch):
    layer = DrawnCodes(ModelConfig(quantizer="gumbel", codes=1024, code_channels=3), seed=0).eval()
    x = random(1, 12, 32, 32).float()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = math.nan, math.inf
    vectors = x.view(1, 4, 3, 32, 32).movedim(2, -1)
    scores = 2 * vectors @ layer.codebook.T - layer.codebook.square().sum(dim=1)
    expected = layer.codebook[scores.argmax(dim=-1)]
    monkeypatch.setattr(vector, "MOST_DISTANCES", 2**17)
    with torch.no_grad(), Largest() as largest:
        found = layer(x).values
    assert torch.equal(found.isfinite(), x.isfinite()), "or nobody would hear of a training that has diverged"
    codes = found.view(1, 4, 3, 32, 32).movedim(2, -1)
    assert torch.equal(codes[vectors.isfinite()], expected[vectors.isfinite()])
    assert largest.numbers <= 2**17 < 4 * 32 * 32 * 1024


def rotation(soft: Tensor, hard: Tensor) -> Tensor:
    """|hard| / |soft| R of one vector, as a matrix, by the definition of a rotation in the plane of the two."""
    e, q = soft / soft.norm(), hard / hard.norm()
    across = q - (q @ e) * e
    f = across / across.norm()
    cos, sin = q @ e, q @ f
    plane = (cos - 1) * (torch.outer(e, e) + torch.outer(f, f)) + sin * (torch.outer(f, e) - torch.outer(e, f))
    return (torch.eye(len(e), dtype=torch.float64) + plane) * hard.norm() / soft.norm()


def test_the_rotation_trick_is_a_rotation_of_the_gradient():
    soft, hard, gradient = random(5, 7).requires_grad_(), random(5, 7, seed=1), random(5, 7, seed=2)
    found = rotation_trick(soft, hard)
    assert torch.equal(found, hard)
    (got,) = torch.autograd.grad(found, soft, gradient)
    for row in range(5):
        matrix = rotation(soft[row].detach(), hard[row])
        close(matrix @ soft[row].detach(), hard[row])
        close(got[row], matrix.T @ gradient[row])


def test_a_vector_without_a_direction_gets_the_gradient_as_it_is():
    soft = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    hard = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    gradient = random(3, 2)
    (got,) = torch.autograd.grad(rotation_trick(soft, hard), soft, gradient)
    assert torch.equal(got, gradient)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_vector_quantiser_against_its_closed_form(rotated: bool):
    layer = VectorQuantizer(5, 3, commitment=0.3, rotation=rotated).double()
    x = random(2, 3, 4, 2, seed=3).requires_grad_()
    found = layer(x)
    vectors = x.detach().movedim(1, -1).reshape(-1, 3)
    indices = torch.cdist(vectors, layer.codebook.detach()).argmin(dim=1)
    assert torch.equal(found.indices.flatten(), indices)
    assert torch.equal(found.values, layer.codebook.detach()[indices].view(2, 4, 2, 3).movedim(-1, 1))
    squares = (vectors - layer.codebook.detach()[indices]).square().view(2, -1).mean(dim=1)
    close(found.loss, 1.3 * squares)
    gradient = random(2, 3, 4, 2, seed=4)
    total = (found.values * gradient).sum() + found.loss.sum()
    to_x, to_codes = torch.autograd.grad(total, (x, layer.codebook))
    g = gradient.movedim(1, -1).reshape(-1, 3)
    codes = layer.codebook.detach()[indices]
    if rotated:
        g = torch.stack([rotation(v, c).T @ each for v, c, each in zip(vectors, codes, g, strict=True)])
    expected = g + 0.3 * 2 * (vectors - codes) / (24 / 1)
    close(to_x.movedim(1, -1).reshape(-1, 3), expected)
    drawn = torch.zeros_like(layer.codebook).index_add(0, indices, 2 * (codes - vectors) / 24)
    close(to_codes, drawn.detach())


def test_the_entropy_loss_against_its_definition():
    def entropy(p: Tensor) -> Tensor:
        return -(p * p.log() + (1 - p) * (1 - p).log())

    x = random(4, 3, 5)
    p = torch.sigmoid(4 * x / 0.7)
    expected = [sum((entropy(c).mean() - entropy(c.mean())).item() for c in sample) for sample in p]
    assert binary_entropy_loss(x, 0.7).tolist() == pytest.approx(expected, abs=1e-12)
    sure_and_spread = torch.tensor([[[1e3, -1e3]]], dtype=torch.float64)
    assert binary_entropy_loss(sure_and_spread).item() == pytest.approx(-math.log(2), abs=1e-12)


@pytest.mark.parametrize("value", [-100.0, -30.0, 0.0, 4.5, 30.0, 100.0])
def test_bits_that_are_the_same_everywhere_have_a_gradient(value: float):
    """As those of a flat picture: its sigmoid rounds to 1 in float32."""
    x = torch.full((1, 2, 3, 3), value, requires_grad=True)
    binary_entropy_loss(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_a_vector_that_is_no_number_has_no_code():
    x = random(1, 6, 2, 2).float()
    x[0, 3, 1, 0] = math.nan
    for layer in (VectorQuantizer(4, 6), VectorQuantizer(4, 6, rotation=True), VectorQuantizer(4, 6, decay=0.9)):
        assert layer(x).values[0, 3, 1, 0].isnan() and layer(x).loss.isnan()
        assert layer(x).values[..., 0, :].isfinite().all()


def test_bits_have_the_number_of_their_code():
    found = LFQ()(torch.tensor([[0.5, -2.0, 0.0]]))
    assert found.values.tolist() == [[1, -1, 1]] and found.indices.tolist() == [5]


def test_the_gradient_of_a_bit_is_that_of_its_value_however_large():
    x, weight = (3 * random(4, 5, 6)).requires_grad_(), random(4, 5, 6, seed=1)
    assert (x.abs() > 1).any() and (x.abs() < 1).any()
    (gradient,) = torch.autograd.grad(LFQ()(x).values, x, weight)
    assert torch.equal(gradient, weight)


@pytest.mark.parametrize("layer", [VectorQuantizer(4, 6), VectorQuantizer(4, 6, rotation=True), LFQ()])
def test_every_layer_takes_what_comes(layer: VectorQuantizer | LFQ):
    """Low precision, strides, and nothing at all."""
    x = random(2, 6, 4, 5).float()
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x.bfloat16())
    assert low.values.dtype == low.loss.dtype == torch.float32
    strided = layer(x.movedim(1, -1).contiguous().movedim(-1, 1))
    assert torch.equal(strided.indices, expected.indices) and torch.equal(strided.values, expected.values)
    empty = x[:0].requires_grad_()
    nothing = layer(empty)
    assert nothing.values.shape == (0, 6, 4, 5) and nothing.indices.shape == (0, 4, 5)
    (nothing.values.sum() + nothing.loss.sum()).backward()


@pytest.mark.parametrize(
    ("layer", "distances"),
    [
        (VectorQuantizer(4, 6), 2**24),
        (VectorQuantizer(4, 6, rotation=True), 2**24),
        (VectorQuantizer(4, 6, decay=0.9), 64),  # of 160: in three blocks
        (LFQ(), 2**24),
    ],
    ids=["by loss", "rotation", "moving averages", "lfq"],
)
def test_compiled_in_one_graph_values_and_gradients_equal_eager(
    layer: VectorQuantizer | LFQ, distances: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vector, "MOST_DISTANCES", distances)
    torch.compiler.reset()
    learned = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    weight = random(2, 6, 4, 5, seed=1).float()
    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)):
        x = random(2, 6, 4, 5).float().requires_grad_()
        found = run(x)
        total = (found.values * weight).sum() + sum(part.sum() for part in found[2:])
        results.append((*found, *torch.autograd.grad(total, (x, *learned))))
    assert len(results[0]) == len(results[1])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(compiled, eager)


@pytest.mark.parametrize("settings", [{}, {"rotation": True}, {"decay": 0.9}, {"decay": 0.9, "restart": 0.5}], ids=str)
def test_another_instance_takes_over_the_state_and_goes_on_alike(settings: dict[str, Any]):
    """Codes, counts and averages; also where codes are given up afterwards."""

    def trained(layer: VectorQuantizer, seeds: range) -> VectorQuantizer:
        for seed in seeds:
            layer.absorb(statistics_of(layer, random(2, 3, 9, seed=seed).float()))
        return layer.eval()

    layer = trained(VectorQuantizer(8, 3, **settings), range(9))
    other = VectorQuantizer(8, 3, seed=1, **settings).eval()
    x = random(2, 3, 30, seed=20).float()
    assert not torch.equal(other(x).values, layer(x).values)
    other.load_state_dict(copy.deepcopy(layer.state_dict()), strict=True)
    for _ in range(2):
        for mine, its in zip(layer(x)[:3], other(x)[:3], strict=True):
            assert torch.equal(its, mine)
        own = dict(layer.named_buffers()) | dict(layer.named_parameters())
        assert own.keys() >= {"codebook", "count", "total"}
        for name, value in (dict(other.named_buffers()) | dict(other.named_parameters())).items():
            assert torch.equal(value, own[name]), name
        for each in (layer, other):
            trained(each, range(10, 15))


def test_other_channels_than_the_codebooks_are_named():
    with pytest.raises(CodecmillError, match=r"vectors of 6 channels, but got \(1, 5\)"):
        VectorQuantizer(4, 6)(torch.zeros(1, 5))
    with pytest.raises(CodecmillError, match="two tensors of one shape"):
        rotation_trick(torch.zeros(1, 5), torch.zeros(2, 5))


def statistics_of(layer: VectorQuantizer, x: Tensor) -> Tensor:
    """What the backward pass of the samples' mean leaves for `absorb`."""
    layer.statistics.grad = None
    assert layer.eval()(x).statistics is None
    told = layer.train()(x).statistics
    assert told is not None and torch.equal(told, torch.zeros_like(told))
    told.mean().backward()
    assert layer.statistics.grad is not None and not layer.statistics.any()
    return layer.statistics.grad


def test_moving_averages_against_their_definition():
    layer = VectorQuantizer(3, 2, decay=0.9).double()
    count, total = torch.ones(3, dtype=torch.float64), layer.codebook.detach().clone()
    for seed in range(5):
        x = random(4, 2, 7, seed=seed)
        vectors = x.movedim(1, -1).reshape(-1, 2)
        chosen = torch.nn.functional.one_hot(nearest_code(vectors, layer.codebook), 3).double()
        layer.absorb(statistics_of(layer, x))
        count = 0.9 * count + 0.1 * chosen.sum(dim=0) / 4
        total = 0.9 * total + 0.1 * chosen.T @ vectors / 4
        smooth = (count + 1e-5) / (count.sum() + 3e-5) * count.sum()
        close(layer.codebook, total / smooth[:, None])
    assert not layer.codebook.requires_grad


def test_halves_of_a_batch_say_what_the_batch_says():
    """So ranks, whose gradients are averaged, move their codes alike."""
    layer = VectorQuantizer(5, 3, decay=0.9).double()
    x = random(6, 3, 4, 4)
    halves = (statistics_of(layer, x[::2]).clone() + statistics_of(layer, x[1::2])) / 2
    close(halves, statistics_of(layer, x))


@pytest.mark.parametrize("decay", [None, 0.9])
def test_codes_that_nobody_chooses_are_put_to_use(decay: float | None):
    def used_after(steps: int, restart: float) -> int:
        layer = VectorQuantizer(16, 2, decay=decay, restart=restart)
        optimizer = torch.optim.Adam([layer.codebook], lr=1e-2) if decay is None else None
        x = random(8, 2, 32).float() * 0.1 + 5  # far from all first codes: one of them is nearest to everything
        for _ in range(steps):
            layer.zero_grad()
            found = layer(x)
            assert found.statistics is not None
            (found.loss + found.statistics).mean().backward()
            assert layer.statistics.grad is not None
            layer.absorb(layer.statistics.grad)
            if optimizer:
                optimizer.step()
        return len(layer(x).indices.unique())

    assert used_after(1000, restart=0.0) <= 2
    assert used_after(1000, restart=0.1) == 16


def test_the_same_vectors_give_the_same_codes_again():
    def codes() -> Tensor:
        layer = VectorQuantizer(8, 2, decay=0.9, restart=0.5, seed=3)
        for seed in range(50):
            layer.absorb(statistics_of(layer, random(2, 2, 9, seed=seed).float()))
        return layer.codebook.detach()

    assert torch.equal(codes(), codes())
