import re
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.config import LossConfig, ModelConfig, TrainingConfig
from pipelines.data.images import Normalization
from pipelines.errors import CodecmillError, InputError
from pipelines.model import autoencoder
from pipelines.model.autoencoder import Autoencoder
from pipelines.model.build import build_model, count_parameters, most_parameters
from pipelines.model.layers import leaky_relu
from pipelines.model.straight_through import nearest_centre
from pipelines.training.codebooks import absorb, learned_parameters
from pipelines.training.step import QUANTIZER_WEIGHTS, TrainingStep

QUARTERS = Normalization(mean=(0.25, 0.25, 0.25), std=(0.25, 0.25, 0.25))
SMALL = ModelConfig(channels=8, latent_channels=6, downsamplings=2, codes=64, code_channels=3)


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def changed(model: Autoencoder) -> Autoencoder:
    """The model as after some training: no weight is zero any more."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


QUANTIZERS = get_args(ModelConfig.model_fields["quantizer"].annotation)


@pytest.mark.parametrize("downsamplings", [1, 2, 3, 5])
def test_latents_are_smaller_by_the_stride_and_images_come_back_in_their_size(downsamplings: int):
    config = SMALL.model_copy(update={"downsamplings": downsamplings})
    model = Autoencoder(config)
    output = model(pixels(2, 3, 32, 64))
    assert model.stride == 2**downsamplings
    assert output.image.shape == (2, 3, 32, 64)
    assert output.latents.shape == (2, 6, 32 // model.stride, 64 // model.stride)


@pytest.mark.parametrize(
    ("quantizer", "allowed"),
    [
        ("round", None),
        ("clamped_round", range(-4, 4)),
        ("sign", (-1, 1)),
        ("noise", None),
        ("universal", None),
        ("binarizer", (-1, 1)),
        ("lfq", (-1, 1)),
    ],
)
def test_latents_take_the_values_of_the_quantiser(quantizer: str, allowed):
    model = Autoencoder(ModelConfig.model_validate({**SMALL.model_dump(), "quantizer": quantizer})).eval()
    values = set(model(3 * pixels(2, 3, 32, 32)).latents.flatten().tolist())
    assert all(value.is_integer() for value in values)
    assert len(values) > 1
    assert allowed is None or values <= set(allowed)


def test_soft_to_hard_latents_are_learned_centres():
    model = changed(Autoencoder(SMALL.model_copy(update={"quantizer": "soft_to_hard", "levels": 5})))
    latents = model(pixels(2, 3, 32, 32)).latents
    centres = model.state_dict()["quantizer.centres"]
    assert torch.equal(centres[nearest_centre(latents, centres)], latents)


@pytest.mark.parametrize("quantizer", ["vq", "gumbel"])
def test_latents_are_codes_of_the_codebook(quantizer: str):
    config = ModelConfig.model_validate({**SMALL.model_dump(), "quantizer": quantizer, "codes": 9, "code_channels": 3})
    model = changed(Autoencoder(config)).eval()
    vectors = model(pixels(2, 3, 32, 32)).latents.reshape(2, 2, 3, 64).movedim(2, -1).reshape(-1, 3)
    (codebook,) = (value for name, value in model.state_dict().items() if name.endswith("codebook"))
    # By differences: by a product of matrices, cdist takes a vector to be 3e-4 away from itself on some processors.
    nearest = torch.cdist(vectors, codebook, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    assert nearest.values.max() < 1e-5
    assert len(nearest.indices.unique()) > 1


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = Autoencoder(SMALL, seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, third = Autoencoder(SMALL, seed=4).state_dict(), Autoencoder(SMALL, seed=5).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["encoder.stages.0.down.weight"], third["encoder.stages.0.down.weight"])


@pytest.mark.parametrize("quantizer", ["vq", "gumbel"])
def test_another_seed_draws_other_codes(quantizer: str):
    config = SMALL.model_copy(update={"quantizer": quantizer})
    one, other = (
        {name: value for name, value in Autoencoder(config, seed).state_dict().items() if name.endswith("codebook")}
        for seed in (1, 2)
    )
    assert len(one) == 1
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_the_start_is_the_identity_where_the_latents_hold_everything():
    # With all 48 coefficients of 4x4 blocks, only the rounding to quarters is lost: uniform, of variance 1/12/16.
    model = Autoencoder(ModelConfig(channels=4, latent_channels=48, downsamplings=2))
    x = pixels(4, 3, 64, 64)
    error = (model(x).image - x).square().mean().item()
    assert error == pytest.approx(1 / 192, rel=0.05)


def test_more_latents_than_pixels_and_single_channels_work():
    wide = Autoencoder(ModelConfig(channels=4, latent_channels=20, downsamplings=1))
    x = pixels(1, 3, 16, 16)
    assert (wide(x).image - x).square().mean() < 0.01
    assert Autoencoder(ModelConfig(channels=4, latent_channels=1, downsamplings=1))(x).image.isfinite().all()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_few_steps_reach_every_weight_and_lower_the_loss(quantizer: str):
    model = Autoencoder(ModelConfig.model_validate({**SMALL.model_dump(), "quantizer": quantizer}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam([parameter for _, parameter in learned_parameters(model)], lr=3e-3)
    x = torch.nn.functional.interpolate(pixels(8, 3, 8, 8), scale_factor=4, mode="bilinear")
    shape = model.noise_shape(8, 32, 32)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.5 if shape else None
    losses = []
    for _ in range(20):
        output = model(x, noise)
        error = (output.image - x).square().mean()
        model.zero_grad()
        # Weights are for errors on the scale 0 to 1: on this one they are 16 times as large.
        loss = error if output.loss is None else error + 16 * QUANTIZER_WEIGHTS[quantizer] * output.loss.mean()
        if output.statistics is not None:
            loss = loss + output.statistics.mean()
        loss.backward()
        absorb(model, 1.0)
        optimizer.step()
        losses.append(error.item())
    assert losses[-1] < 0.8 * losses[0]
    still = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert [name for name in still if not name.endswith(".statistics")] == []


@pytest.mark.parametrize("decay", [0.9, None])
def test_what_a_codebook_is_told_depends_on_no_weight_of_the_loss(decay: float | None):
    config = SMALL.model_copy(update={"quantizer": "vq", "codebook_decay": decay})
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    told = []
    for weight in (0.0, 0.1, 7.0):
        loss = LossConfig(quantizer_weight=weight)
        step = TrainingStep(Autoencoder(config), QUARTERS, loss, TrainingConfig(precision="float32"), "cpu")
        step(images, None, None).loss.mean().backward()
        statistics = step.get_parameter("model.quantizer.codes.statistics").grad
        assert statistics is not None
        told.append(statistics)
    assert told[0][:, 0].sum().item() == pytest.approx(2 * 8 * 8), "of each sample, two vectors a place"
    assert torch.equal(told[1], told[0]) and torch.equal(told[2], told[0])


def test_noise_is_wanted_by_one_quantiser_in_training_only():
    model = Autoencoder(SMALL.model_copy(update={"quantizer": "noise"}))
    assert Autoencoder(SMALL).noise_shape(2, 32, 64) is None
    assert model.noise_shape(2, 32, 64) == (2, 6, 8, 16)
    x = pixels(2, 3, 32, 64)
    noise = torch.full((2, 6, 8, 16), 0.25)
    torch.testing.assert_close(model(x, noise).latents, model.encoder(x) + 0.25)
    with pytest.raises(CodecmillError, match="needs noise in training, but got none"):
        model(x)
    assert torch.equal(model.eval()(x).latents, model.encoder(x).round())


def test_under_autocast_latents_are_float32_and_exact():
    model = changed(Autoencoder(SMALL))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixels(2, 3, 32, 32))
    assert output.latents.dtype == torch.float32
    assert torch.equal(output.latents, output.latents.round())
    assert output.image.dtype == torch.bfloat16


def test_float64_stays_float64():
    model = Autoencoder(SMALL).double()
    output = model(pixels(1, 3, 16, 16).double())
    assert output.image.dtype == output.latents.dtype == torch.float64


def test_residual_blocks_add_names_and_change_no_other_name_shape_or_start():
    small, large = (Autoencoder(SMALL.model_copy(update={"residual_blocks": n})).state_dict() for n in (1, 2))
    assert small.keys() < large.keys()
    assert all("blocks.1." in name for name in large.keys() - small.keys())
    assert all(torch.equal(small[name], large[name]) for name in small)


def test_a_block_added_to_a_trained_model_leaves_what_it_computes():
    small = changed(Autoencoder(SMALL))
    large = Autoencoder(SMALL.model_copy(update={"residual_blocks": 3}))
    result = large.load_state_dict(small.state_dict(), strict=False)
    assert result.missing_keys
    assert result.unexpected_keys == []
    x = pixels(1, 3, 32, 32)
    assert torch.equal(large(x).image, small(x).image)


def test_state_round_trip_is_strict_and_names_its_parts():
    model, other = changed(Autoencoder(SMALL)), Autoencoder(SMALL, seed=1)
    other.load_state_dict(model.state_dict(), strict=True)
    assert {name.split(".")[0] for name in model.state_dict()} == {"encoder", "decoder"}
    x = pixels(1, 3, 32, 32)
    assert torch.equal(model(x).image, other(x).image)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (1, 1), (3, 50)])
def test_reconstruct_pads_by_the_edge_and_crops_back(size: tuple[int, int]):
    model = changed(Autoencoder(SMALL))
    image = pixels(3, *size)
    height, width = -(-size[0] // 4) * 4, -(-size[1] // 4) * 4
    rows = torch.arange(height).clamp(max=size[0] - 1)
    columns = torch.arange(width).clamp(max=size[1] - 1)
    expected = model(image[:, rows][:, :, columns][None]).image[0, :, : size[0], : size[1]]
    assert torch.equal(model.reconstruct(image), expected)
    assert torch.equal(model.reconstruct(image[None]), expected[None])


def test_reconstruct_takes_bytes_and_normalises_both_ways():
    model = changed(Autoencoder(SMALL))
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = model((image / 255 - 0.25)[None] * 4).image[0] / 4 + 0.25
    result = model.reconstruct(image, QUARTERS)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.reconstruct(image / 255, QUARTERS), result)
    assert torch.equal(model.reconstruct(image), model.reconstruct(image / 255))
    assert not result.requires_grad


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_reconstruct_quantises_as_in_evaluation_in_training_mode_too(quantizer: str):
    model = Autoencoder(ModelConfig.model_validate({**SMALL.model_dump(), "quantizer": quantizer}))
    image = pixels(3, 16, 16)
    result = model.reconstruct(image)
    assert model.training
    assert torch.equal(result, model.eval()(image[None]).image[0])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.zeros(3, 32, 32),
            "got torch.float32 of shape (3, 32, 32): add the batch axis with x.unsqueeze(0), or call",
        ),
        (
            torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
            "got torch.uint8 of shape (1, 3, 32, 32): call model.reconstruct(image)",
        ),
        (torch.zeros(1, 3, 32, 30), "(1, 3, 32, 30): make H and W multiples of 4, or call model.reconstruct(image)"),
        (torch.zeros(1, 1, 32, 32), "(1, 1, 32, 32): bring it to that layout"),
        (torch.zeros(32, 32), "(32, 32): bring it to that layout"),
        (torch.zeros(1, 3, 0, 32), "(1, 3, 0, 32): give it at least one image of at least one pixel."),
        (torch.zeros(0, 3, 32, 32), "(0, 3, 32, 32): give it at least one image of at least one pixel."),
        (
            torch.zeros(1, 3, 32, 32, dtype=torch.float64),
            "convert it to the type of the weights with x.to(torch.float32).",
        ),
    ],
)
def test_the_model_says_how_to_mend_its_input(x: Tensor, message: str):
    with pytest.raises(InputError, match=re.escape(message)):
        Autoencoder(SMALL)(x)


@pytest.mark.parametrize(
    "image", [torch.zeros(32, 32), torch.zeros(3, 8, 8, dtype=torch.int64), torch.zeros(1, 8, 8), torch.zeros(3, 0, 8)]
)
def test_reconstruct_refuses_what_is_no_image(image: Tensor):
    with pytest.raises(InputError, match=re.escape(f"but got {image.dtype} of shape {tuple(image.shape)}: ")):
        Autoencoder(SMALL).reconstruct(image)


def test_other_memory_layouts_compute_the_same():
    model = changed(Autoencoder(SMALL))
    x = pixels(2, 3, 16, 32)
    turned = pixels(2, 3, 32, 16).copy_(x.transpose(2, 3)).transpose(2, 3)
    torch.testing.assert_close(model(turned).image, model(x).image, rtol=1e-4, atol=1e-4)


NARROW = {"channels": 8, "entropy_channels": 4}


@pytest.mark.parametrize(
    "kind",
    [
        *({"entropy": entropy} for entropy in ("none", "factorized", "hyperprior")),
        *({"quantizer": name, "codes": 40_000, "code_channels": 40} | NARROW for name in ("vq", "gumbel")),
    ],
)
@pytest.mark.parametrize("sizes", [{}, {"channels": 24, "residual_blocks": 3}])
def test_parameters_are_counted_without_a_model(kind: dict[str, Any], sizes: dict[str, int]):
    config = ModelConfig.model_validate({"latent_channels": 40, **kind, **sizes})
    count = sum(parameter.numel() for parameter in build_model(config).parameters())
    assert count_parameters(config) == count <= most_parameters(config)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_model_of_which_only_shapes_are_wanted_takes_no_memory(quantizer: str):
    with torch.device("meta"):
        model = Autoencoder(SMALL.model_copy(update={"quantizer": quantizer}))
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_the_activation_is_torchs_bit_for_bit_with_its_gradient():
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, torch.inf, -torch.inf, torch.nan, 3e38, -3e38])
    for x in (
        special,
        pixels(2, 3, 4, 5),
        pixels(2, 3, 4, 5).bfloat16(),
        pixels(2, 3, 4, 5).half(),
        pixels(7).double(),
    ):
        gradient = pixels(*x.shape, seed=1).to(x.dtype)
        theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, found = F.leaky_relu(theirs, 0.1), leaky_relu(ours, 0.1)
        expected.backward(gradient)
        found.backward(gradient)
        assert theirs.grad is not None and ours.grad is not None
        for one, other in ((expected, found), (theirs.grad, ours.grad)):
            assert torch.equal(one.detach().view(torch.uint8), other.detach().view(torch.uint8))
    torch.autograd.gradcheck(lambda x: leaky_relu(x, 0.1), pixels(2, 3, 4, 5).double().requires_grad_())


def test_what_the_backward_pass_needs_is_kept_once(monkeypatch: pytest.MonkeyPatch):
    """Torch's own activation keeps what goes into it beside what the next convolution keeps of the same numbers."""
    model = changed(Autoencoder(SMALL.model_copy(update={"residual_blocks": 2})))
    x = pixels(2, 3, 32, 32)

    def kept() -> tuple[int, Tensor]:
        storages: dict[int, Tensor] = {}

        def note(each: Tensor) -> Tensor:
            storages[each.untyped_storage().data_ptr()] = each
            return each

        with torch.autograd.graph.saved_tensors_hooks(note, lambda each: each):
            model(x).image.square().sum().backward()
        gradients = torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])
        model.zero_grad()
        return sum(each.untyped_storage().nbytes() for each in storages.values()), gradients

    ours, found = kept()
    monkeypatch.setattr(autoencoder, "leaky_relu", F.leaky_relu)
    theirs, expected = kept()
    assert torch.equal(found, expected)
    assert ours < 0.7 * theirs
