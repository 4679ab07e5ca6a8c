import copy
import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipelines.errors import CodecmillError
from pipelines.model.straight_through import (
    FSQ,
    Binarizer,
    ClampedRound,
    GumbelSoftmaxST,
    LowerBound,
    Round,
    SignSTE,
    SoftToHardQuantizer,
    UniformNoise,
    UniversalQuantizer,
    additive_noise,
    clamped_round,
    finite_scalar,
    finite_scalar_bound,
    gumbel_softmax,
    lower_bound,
    nearest_centre,
    round_ste,
    sign_ste,
    soft_assignment,
    soft_round,
    soft_round_inverse,
    soft_to_hard,
    stochastic_sign,
    straight_through,
    universal_quantise,
)

CENTRES = [-2.0, -0.5, 0.25, 3.0]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def normal(*shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def gradient(output: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
    (result,) = torch.autograd.grad(output, x, torch.ones_like(output) if weight is None else weight)
    return result


def first_of_two(x: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """What a choice between each value and a score of 0 gives the value."""
    return choose(torch.stack([x, torch.zeros_like(x)], dim=-1))[..., 0]


QUANTISERS = {
    "round": round_ste,
    "clamped_round": lambda x: clamped_round(x, 5),
    "sign": sign_ste,
    "soft_to_hard": lambda x: soft_to_hard(x, torch.tensor(CENTRES, dtype=x.dtype), 1.0),
    "noise": lambda x: additive_noise(x, torch.zeros(x.shape)),
    "universal": lambda x: universal_quantise(x, torch.full(x.shape, 0.3)),
    "stochastic_sign": lambda x: stochastic_sign(x, torch.full(x.shape, 0.1)),
    "lower_bound": lambda x: lower_bound(x, 0.25),
    "soft_round": lambda x: soft_round(x, 4.0),
    "soft_round_inverse": lambda x: soft_round_inverse(x, 4.0),
    "finite_scalar": lambda x: finite_scalar(x.reshape(1, 1, -1), [5]).reshape(x.shape),
    "gumbel_softmax": lambda x: first_of_two(x, lambda scores: gumbel_softmax(scores, None, 0.7)),
    "gumbel_softmax_st": lambda x: first_of_two(
        x, lambda scores: GumbelSoftmaxST(0.7)(scores, torch.full_like(scores, 0.25))
    ),
    "straight_through": lambda x: straight_through(x, x.detach().round()),
}


def test_straight_through_has_the_bits_of_hard_and_the_gradient_of_soft():
    soft, hard = double(0.1, 1e17, -0.3), double(0.7, 0.1, -1e-9)
    output = straight_through(soft, hard)
    assert torch.equal(output, hard)
    output.backward(double(2.0, -3.0, 5.0).detach())
    assert soft.grad is not None
    assert soft.grad.tolist() == [2.0, -3.0, 5.0]
    assert hard.grad is None


@given(st.lists(st.tuples(*[st.floats(-1e6, 1e6)] * 2), max_size=20))
def test_straight_through_is_the_formula_up_to_rounding(pairs: list[tuple[float, float]]):
    soft, hard = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).unbind(1)
    torch.testing.assert_close(straight_through(soft, hard), soft + (hard - soft).detach(), rtol=1e-12, atol=1e-9)


def test_straight_through_does_not_share_memory_with_hard():
    hard = torch.zeros(3)
    straight_through(torch.zeros(3), hard).add_(1)
    assert hard.tolist() == [0, 0, 0]


@pytest.mark.parametrize("hard", [torch.zeros(1, 3), torch.zeros(3, dtype=torch.int64)])
def test_straight_through_refuses_what_the_formula_would_broadcast_or_promote(hard: Tensor):
    kind = re.escape(f"hard {tuple(hard.shape)} {hard.dtype}: expand or convert one of them first.")
    with pytest.raises(CodecmillError, match=kind):
        straight_through(torch.zeros(3), hard)


def test_round_takes_halves_to_even_and_passes_the_gradient_on():
    x = double(-2.5, -1.5, -0.5, 0.5, 1.5, 2.4, 2.6)
    output = round_ste(x)
    assert output.tolist() == [-2, -2, 0, 0, 2, 2, 3]
    weight = normal(7)
    assert torch.equal(gradient(output, x, weight), weight)


def test_round_with_an_offset_keeps_to_the_shifted_grid_and_gives_the_offset_no_gradient():
    x, offset = double(0.2, 0.9, -1.1), double(0.25)
    output = round_ste(x, offset)
    torch.testing.assert_close(output, torch.tensor([0.25, 1.25, -0.75], dtype=torch.float64), rtol=0, atol=1e-12)
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1]
    assert offset.grad is None
    assert torch.equal(round_ste(x, 0.25), output)


@pytest.mark.parametrize("shape", [(2, 3), (4,)])
def test_round_refuses_an_offset_that_would_grow_the_input(shape: tuple[int, ...]):
    with pytest.raises(
        CodecmillError, match=re.escape(f"The offset has shape {shape}, which does not broadcast to (3,)")
    ):
        round_ste(torch.zeros(3), torch.zeros(shape))


@pytest.mark.parametrize(("levels", "low", "high"), [(2, -1, 0), (5, -2, 2), (8, -4, 3)])
def test_clamped_round_takes_each_of_its_levels_and_no_other(levels: int, low: int, high: int):
    values = clamped_round(torch.linspace(-20, 20, 4001), levels)
    assert sorted(set(values.tolist())) == list(range(low, high + 1))
    assert len(range(low, high + 1)) == levels


def test_clamped_round_passes_outside_its_range_only_the_gradient_that_leads_back():
    x = double(-9.0, -9.0, -2.0, -2.0, 0.3, 2.0, 2.0, 9.0, 9.0)
    weight = torch.tensor([3.0, -3.0, 3.0, -3.0, 7.0, 5.0, -5.0, 5.0, -5.0], dtype=torch.float64)
    # Descent moves against the gradient: below the range a negative one leads back, above it a positive one.
    assert gradient(clamped_round(x, 5), x, weight).tolist() == [0, -3, 3, -3, 7, 5, -5, 5, 0]


def test_sign_of_zero_is_one_and_the_gradient_passes_up_to_one():
    x = double(-3.0, -1.0, -0.2, -0.0, 0.0, 0.2, 1.0, 1.0001)
    output = sign_ste(x)
    assert output.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    assert output.dtype == torch.float64
    weight = normal(8)
    inside = torch.tensor([0, 1, 1, 1, 1, 1, 1, 0], dtype=torch.float64)
    assert torch.equal(gradient(output, x, weight), weight * inside)


def test_soft_to_hard_is_the_nearest_centre_forward():
    x = torch.tensor([-7.0, -1.25, -1.2, -0.125, 0.0, 1.6, 1.7], dtype=torch.float64)
    centres = torch.tensor(CENTRES, dtype=torch.float64)
    # -1.25 and -0.125 lie midway: the first of equals.
    assert nearest_centre(x, centres).tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert nearest_centre(x, centres).dtype == torch.int64
    assert soft_to_hard(x, centres, 0.7).tolist() == [CENTRES[i] for i in (0, 0, 1, 1, 2, 2, 3)]


def test_soft_to_hard_has_the_closed_form_gradient_of_the_soft_assignment():
    sigma, x, centres = 0.7, normal(50).requires_grad_(), double(*CENTRES)
    weight = normal(50)
    by_x, by_centres = torch.autograd.grad(soft_to_hard(x, centres, sigma), (x, centres), weight)
    p = torch.exp(-sigma * (x[:, None] - centres) ** 2).detach()
    p /= p.sum(dim=1, keepdim=True)
    c, distance = centres.detach(), (x[:, None] - centres).detach()
    mean = (p * c).sum(dim=1, keepdim=True)
    # d(sum p c)/dx = 2 sigma Var_p(c); d/dc_j = p_j (1 + 2 sigma (c_j - mean) (x - c_j)).
    variance = (p * (c - mean) ** 2).sum(dim=1)
    torch.testing.assert_close(by_x, weight * 2 * sigma * variance, rtol=1e-12, atol=1e-12)
    expected = (weight[:, None] * p * (1 + 2 * sigma * (c - mean) * distance)).sum(dim=0)
    torch.testing.assert_close(by_centres, expected, rtol=1e-12, atol=1e-12)


def test_the_soft_assignment_passes_gradcheck():
    x, centres = normal(3, 4).requires_grad_(), double(*CENTRES)
    assert torch.autograd.gradcheck(lambda x, c: soft_assignment(x, c, 0.7), (x, centres))


def test_additive_noise_passes_gradcheck():
    x, noise = normal(3, 4).requires_grad_(), normal(3, 4, scale=0.1)
    assert torch.autograd.gradcheck(lambda x: additive_noise(x, noise), (x,))


def test_soft_assignment_of_far_values_is_the_outer_centre_and_not_nan():
    centres = torch.tensor(CENTRES)
    assert soft_assignment(torch.tensor([-1e4, 1e4]), centres, 1.0).tolist() == [-2.0, 3.0]


def test_uniform_noise_adds_what_it_is_given_in_training_and_rounds_in_evaluation():
    layer, x, noise = UniformNoise(), torch.tensor([0.25, 1.5]), torch.tensor([0.5, -0.25])
    assert layer(x, noise).tolist() == [0.75, 1.25]
    assert layer.eval()(x, noise).tolist() == layer(x).tolist() == [0, 2]


def test_uniform_noise_says_what_it_misses():
    layer = UniformNoise()
    with pytest.raises(
        CodecmillError, match=re.escape("needs noise in training, but got none: draw it uniform on [-0.5, 0.5)")
    ):
        layer(torch.zeros(3))
    with pytest.raises(CodecmillError, match=re.escape("The noise has shape (1,), but the latents have (3,)")):
        layer(torch.zeros(3), torch.zeros(1))


def test_universal_quantisation_keeps_to_the_shifted_grid_and_passes_the_gradient_on():
    x, u = normal(1000).requires_grad_(), torch.rand(1000, dtype=torch.float64) - 0.5
    output = universal_quantise(x, u)
    steps = output - u
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-12)
    assert (output - x).abs().max() <= 0.5
    weight = normal(1000)
    assert torch.equal(gradient(output, x, weight), weight)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 4.0, 12.0])
def test_soft_rounding_and_its_gradient_are_the_closed_forms(alpha: float):
    x = double(-1.9, -0.5, 0.0, 0.2, 0.5, 1.0, 3.4999)
    expected, slopes = [], []
    for value in x.tolist():
        middle = math.floor(value) + 0.5
        tanh = math.tanh(alpha * (value - middle))
        expected.append(middle + tanh / (2 * math.tanh(alpha / 2)))
        slopes.append(alpha * (1 - tanh**2) / (2 * math.tanh(alpha / 2)))
    output = soft_round(x, alpha)
    torch.testing.assert_close(output, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(output, x), torch.tensor(slopes, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_soft_rounding_goes_from_the_identity_to_rounding():
    x = normal(200)
    assert torch.equal(soft_round(x, 0.0), x)
    torch.testing.assert_close(soft_round(x, 2e-3), x, rtol=0, atol=1e-6)
    torch.testing.assert_close(soft_round(x, 1e4), torch.floor(x) + (x - torch.floor(x) > 0.5), rtol=0, atol=1e-2)
    with pytest.raises(CodecmillError, match="hardness alpha of 0 or more, but got -1"):
        soft_round(x, -1.0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 3.0, 8.0])
def test_soft_rounding_is_undone(alpha: float):
    x = torch.cat([normal(500), torch.arange(-3, 4) / 2])
    torch.testing.assert_close(soft_round_inverse(soft_round(x, alpha), alpha), x, rtol=0, atol=1e-9)
    inner = (torch.floor(x) + 0.1 + 0.8 * torch.rand(x.shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: soft_round_inverse(y, alpha), inner)


def test_a_stochastic_sign_is_right_on_average_and_passes_the_gradient_on():
    noise = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000 - 0.5  # each value of a uniform number once
    for mean in (-1.0, -0.4, 0.0, 0.25, 1.0):
        signs = stochastic_sign(torch.full((1000,), mean, dtype=torch.float64), noise)
        assert set(signs.tolist()) <= {-1.0, 1.0}
        assert (signs == 1).sum().item() == round(1000 * (1 + mean) / 2)
    x, weight = normal(1000).requires_grad_(), normal(1000)
    assert torch.equal(gradient(stochastic_sign(x, noise), x, weight), weight)


@pytest.mark.parametrize("training", [True, False])
def test_the_binarizers_gradient_is_that_of_its_tanh(training: bool):
    x, weight = normal(50).requires_grad_(), normal(50)
    output = Binarizer().train(training)(x, torch.zeros(50))
    assert torch.equal(output, torch.where(x >= 0, 1.0, -1.0).double())  # noise 0: the likelier of the two
    expected = weight * (1 - torch.tanh(x.detach()) ** 2)
    torch.testing.assert_close(gradient(output, x, weight), expected, rtol=1e-12, atol=1e-12)


def test_below_a_bound_only_the_gradient_that_leads_back_passes():
    x = double(-1.0, -1.0, 0.5, 0.5, 2.0, 2.0)
    output = lower_bound(x, 0.5)
    assert output.tolist() == [0.5, 0.5, 0.5, 0.5, 2.0, 2.0]
    weight = double(3.0, -3.0, 3.0, -3.0, 3.0, -3.0).detach()
    assert gradient(output, x, weight).tolist() == [0.0, -3.0, 3.0, -3.0, 3.0, -3.0]


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8, 255])
def test_finite_scalars_take_each_of_their_levels_and_no_other(levels: int):
    x = torch.linspace(-12, 12, 40_001, dtype=torch.float64).reshape(1, 1, -1)
    expected = (torch.arange(levels, dtype=torch.float64) - levels // 2) / (levels // 2)
    assert torch.equal(finite_scalar(x, [levels]).unique(), expected)
    symbols = FSQ([levels]).symbols(x)
    assert torch.equal(symbols.unique(), torch.arange(levels))
    torch.testing.assert_close((symbols - levels // 2) / (levels // 2), finite_scalar(x, [levels]).float())
    middle = finite_scalar_bound(torch.zeros(1, 1, dtype=torch.float64), [levels]).item()
    assert middle == pytest.approx(-0.5 if levels == 2 else 0, abs=1e-15), "of two levels, the threshold"


def test_finite_scalars_have_the_closed_form_gradient_of_their_bound():
    levels = [3, 4, 8]
    x, weight = normal(5, 3).requires_grad_(), normal(5, 3)
    expected = torch.empty(5, 3, dtype=torch.float64)
    for channel, count in enumerate(levels):
        half = (count - 1) / 2 + 1e-3
        shift = math.atanh((0.5 if count % 2 == 0 else 0.0) / half)
        expected[:, channel] = weight[:, channel] * half * (1 - torch.tanh(x[:, channel].detach() + shift) ** 2)
        expected[:, channel] /= count // 2
    torch.testing.assert_close(gradient(FSQ(levels)(x), x, weight), expected, rtol=1e-12, atol=1e-12)
    assert FSQ([8, 4]).bits == 5


@pytest.mark.parametrize("count", [3, 4, 5, 7, 8])
def test_finite_scalars_are_those_of_the_papers_listing(count: int):
    """Mentzer 2023, appendix A.1; this bound is wider by a margin on either side of the listing's."""
    z = normal(20_000, scale=1.5)
    half = (count - 1) * (1 - 1e-3) / 2
    offset = 0.0 if count % 2 else 0.5
    bounded = torch.tanh(z + math.tan(offset / half)) * half - offset
    margin = 1e-3 * (1 + (count - 1) / 2) + 1e-3  # the two margins, and what tan differs from the inverse of tanh
    found = finite_scalar_bound(z[:, None], [count])[:, 0]
    torch.testing.assert_close(found, bounded, rtol=0, atol=margin)
    is_sure = (bounded - torch.floor(bounded) - 0.5).abs() > margin
    assert is_sure.double().mean() > 0.95
    assert torch.equal(finite_scalar(z[:, None], [count])[is_sure, 0], (bounded.round() / (count // 2))[is_sure])


@pytest.mark.parametrize(("levels", "shape"), [([3, 4], (5, 3)), ([1], (5, 1)), ([4], (5,))])
def test_finite_scalars_say_what_does_not_fit(levels: list[int], shape: tuple[int, ...]):
    with pytest.raises(CodecmillError, match="give it the number of levels of each channel"):
        finite_scalar(torch.zeros(shape), levels)


def test_gumbel_softmax_is_one_hot_with_the_closed_form_gradient_of_the_softmax():
    logits, noise, weight = normal(6, 4).requires_grad_(), normal(6, 4), normal(6, 4)
    output = gumbel_softmax(logits, noise, 0.7)
    scores = logits.detach() + noise
    assert torch.equal(output, torch.nn.functional.one_hot(scores.argmax(-1), 4).double())
    p = torch.softmax(scores / 0.7, -1)
    expected = p * (weight - (p * weight).sum(-1, keepdim=True)) / 0.7
    torch.testing.assert_close(gradient(output, logits, weight), expected, rtol=1e-12, atol=1e-12)


def test_gumbel_softmax_draws_each_category_with_its_probability():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    uniform = torch.rand(100_000, 4, dtype=torch.float64, generator=generator)
    layer = GumbelSoftmaxST(1.0)
    drawn = layer(p.log().expand(100_000, 4), uniform).mean(0)
    torch.testing.assert_close(drawn, p, rtol=0, atol=5 * 0.5 / 100_000**0.5)  # five standard deviations
    assert layer.eval()(p.log()).tolist() == [1, 0, 0, 0]
    for text, call in {
        "needs uniform numbers": lambda: layer.train()(p.log()),
        "temperature above 0, but got 0": lambda: gumbel_softmax(p, None, 0.0),
        "noise has shape": lambda: gumbel_softmax(p, p[:2], 1.0),
    }.items():
        with pytest.raises(CodecmillError, match=text):
            call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_uniform_numbers_that_a_low_precision_rounds_to_0_and_1_give_draws_too(dtype: torch.dtype):
    p = torch.tensor([0.6, 0.3, 0.1])
    uniform = torch.rand(50_000, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)
    uniform[0] = torch.tensor([0.0, 1.0, 0.0])
    uniform[1] = torch.tensor([1.0, 0.0, 0.0])
    assert dtype.itemsize > 2 or (uniform[2:] == 1).any()
    logits = p.log().expand(50_000, 3).clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        drawn = GumbelSoftmaxST(1.0)(logits, uniform)
    assert drawn.dtype == torch.float32 and torch.equal(drawn.sum(-1), torch.ones(50_000))
    assert drawn[:2].tolist() == [[0, 1, 0], [1, 0, 0]]
    assert gradient(drawn, logits, normal(50_000, 3).float()).isfinite().all()
    torch.testing.assert_close(drawn.mean(0), p, rtol=0, atol=5 * 0.5 / 50_000**0.5)  # five standard deviations


@pytest.mark.parametrize("name", QUANTISERS)
def test_empty_and_non_contiguous_inputs_keep_their_shape_forward_and_backward(name: str):
    quantise = QUANTISERS[name]
    empty = torch.zeros(0, 3, 4, dtype=torch.float64, requires_grad=True)
    assert gradient(quantise(empty), empty).shape == quantise(empty).shape == empty.shape
    x = normal(6, 4).requires_grad_()
    turned = x.T[:, ::2]
    weight = normal(3, 4).T
    assert torch.equal(quantise(turned), quantise(turned.contiguous()))
    expected = gradient(quantise(turned.contiguous()), x, weight.contiguous())
    assert torch.equal(gradient(quantise(turned), x, weight), expected)
    spread = torch.ones((), dtype=torch.float64).expand(3, 2)  # what sum() sends back: one number seen many times
    assert gradient(quantise(x[:3, :2]), x, spread).shape == x.shape


@pytest.mark.parametrize("name", QUANTISERS)
def test_input_and_gradient_are_left_as_they_were(name: str):
    x = normal(5).requires_grad_()
    weight = normal(5)
    before = x.detach().clone(), weight.clone()
    result = gradient(QUANTISERS[name](x), x, weight)
    if name != "noise":  # a plain sum, whose gradient torch itself hands on without a copy
        result.add_(1)
    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])


@pytest.mark.parametrize("name", sorted(QUANTISERS.keys() - {"straight_through"}))
def test_under_autocast_and_in_bfloat16_the_result_is_that_of_float32(name: str):
    quantise = QUANTISERS[name]
    x = normal(200, scale=3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        low = x.clone().requires_grad_()
        output = quantise(low)
    wide = x.float().requires_grad_()
    expected = quantise(wide)
    assert output.dtype == torch.float32
    assert torch.equal(output, expected)
    weight = normal(200).float()
    assert torch.equal(gradient(output, low, weight), gradient(expected, wide, weight).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert quantise(x.double()).dtype == torch.float64


def test_learned_centres_are_not_rounded_to_bfloat16_under_autocast():
    layer = SoftToHardQuantizer(3, sigma=1.0)
    layer.load_state_dict({"centres": torch.tensor([-1.001, 0.1234567, 2.0002])})
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.tensor([0.1], dtype=torch.bfloat16)).item() == torch.tensor(0.1234567).item()


@pytest.mark.parametrize("name", QUANTISERS)
def test_nan_comes_out_as_nan(name: str):
    output = QUANTISERS[name](torch.tensor([float("nan"), 1.0]))
    assert output.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("layer", "function"),
    [
        (Round(), round_ste),
        (ClampedRound(6), lambda x: clamped_round(x, 6)),
        (SignSTE(), sign_ste),
        (UniformNoise().eval(), round_ste),
        (UniversalQuantizer().eval(), round_ste),
        (Binarizer().eval(), sign_ste),
        (LowerBound(0.3), lambda x: lower_bound(x, 0.3)),
        (SoftToHardQuantizer(4, 2.0), lambda x: soft_to_hard(x, torch.tensor([-1.5, -0.5, 0.5, 1.5]), 2.0)),
    ],
)
def test_a_module_computes_what_its_function_does(layer: nn.Module, function):
    x = normal(40).float()
    assert torch.equal(layer(x), function(x))


def test_centres_start_one_apart_about_zero_and_travel_in_the_state():
    layer = SoftToHardQuantizer(5, sigma=1.0)
    assert layer.centres.tolist() == [-2, -1, 0, 1, 2]
    other = SoftToHardQuantizer(5, sigma=1.0)
    with torch.no_grad():
        layer.centres.mul_(1.7)
    other.load_state_dict(copy.deepcopy(layer.state_dict()), strict=True)
    x = normal(30).float()
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.symbols(x), nearest_centre(x, layer.centres))


class AllQuantisers(nn.Module):
    def __init__(self):
        super().__init__()
        self.soft_to_hard = SoftToHardQuantizer(4, 1.0)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        hard = straight_through(x, x.detach().round())
        parts = (
            round_ste(x, 0.25),
            clamped_round(x, 4),
            sign_ste(x),
            self.soft_to_hard(x),
            additive_noise(x, noise),
            universal_quantise(x, noise),
            stochastic_sign(x, noise),
            lower_bound(x, 0.25),
            finite_scalar(x, [5] * 8),
            gumbel_softmax(x, noise, 0.5),
            hard,
            soft_round(x, 4.0),
        )
        return torch.stack(parts)


def test_compiled_without_graph_breaks_all_equal_eager():
    model = AllQuantisers()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    noise, weight = normal(3, 8).float() / 10, normal(12, 3, 8).float()
    results = []
    for run in (model, compiled):
        x = normal(3, 8).float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = run(x, noise)
        results.append((output, *torch.autograd.grad(output, (x, model.soft_to_hard.centres), weight)))
    assert torch.equal(results[0][0][:-1], results[1][0][:-1])  # all but the smooth one have levels
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "layer",
    [UniformNoise(), UniversalQuantizer(), Binarizer(), GumbelSoftmaxST(0.7)],
    ids=lambda layer: type(layer).__name__,
)
def test_compiled_in_one_graph_modules_with_noise_equal_eager(layer: nn.Module, training: bool):
    torch.compiler.reset()
    compiled = torch.compile(layer.train(training), backend="aot_eager", fullgraph=True, dynamic=False)
    uniform = torch.rand(5, 8, generator=torch.Generator().manual_seed(1))
    noise = uniform if isinstance(layer, GumbelSoftmaxST) else uniform - 0.5
    can_be_hard = isinstance(layer, UniformNoise | UniversalQuantizer)
    for is_hard in (False, True) if can_be_hard else (False,):
        if can_be_hard:
            layer.get_buffer("hard").fill_(is_hard)  # as a schedule does, without compiling again
        results = []
        for run in (layer, compiled):
            x = normal(5, 8).float().requires_grad_()
            output = run(x, noise)
            results.append((output, gradient(output, x, normal(5, 8, scale=1.0).float())))
        assert torch.equal(results[1][0], results[0][0])
        assert torch.equal(results[1][1], results[0][1])
        assert bool(results[0][1].any()) == (not (is_hard and training))


def test_compiled_in_one_graph_the_inverse_of_soft_rounding_equals_eager():
    torch.compiler.reset()

    def inverse(y: Tensor) -> Tensor:
        return soft_round_inverse(y, 4.0)

    results = []
    for run in (inverse, torch.compile(inverse, backend="aot_eager", fullgraph=True, dynamic=False)):
        y = normal(50).float().requires_grad_()
        output = run(y)
        results.append((output, gradient(output, y, normal(50).float())))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)
