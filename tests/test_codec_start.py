"""What a codec starts from, and which steps it is trained with: against the definitions, on the same blocks."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make
from safetensors.torch import load_file
from test_distributed import run_ranks
from torch import Tensor
from trainings import begin

from pipelines.config import ModelConfig
from pipelines.data import block_statistics
from pipelines.data.block_statistics import block_transform
from pipelines.data.images import decode_png, to_tensor
from pipelines.data.randomness import random_generator
from pipelines.data.shard_set import ShardSet
from pipelines.data.shards import create_shards
from pipelines.model.build import build_model
from pipelines.model.codec import TransformCodec
from pipelines.model.codec_start import Coefficients, start_from

SIZE, COUNT = 4, 8
CODEC = {"entropy": "factorized", "channels": 8, "latent_channels": COUNT, "downsamplings": 2}


@pytest.fixture
def shard_set(tiny: dict[str, Any]) -> ShardSet:
    return create_shards(make(tiny))


def patches(shard_set: ShardSet) -> list[Tensor]:
    found = [to_tensor(decode_png(sample.image)) for sample in shard_set.samples("train")]
    assert len(found) <= 512, "all of them are looked at"
    return found


def covariance(shard_set: ShardSet) -> np.ndarray:
    """Of the numbers of a block, channel by channel and row by row, (3 * SIZE^2, 3 * SIZE^2)."""
    blocks = []
    for patch in patches(shard_set):
        rows, columns = patch.shape[1] // SIZE, patch.shape[2] // SIZE
        cut = patch.numpy().astype(np.float64).reshape(3, rows, SIZE, columns, SIZE)
        blocks.append(cut.transpose(1, 3, 0, 2, 4).reshape(-1, 3 * SIZE**2))
    return np.cov(np.concatenate(blocks), rowvar=False, bias=True)


def codec(settings: dict[str, Any] | None = None) -> TransformCodec:
    model = build_model(ModelConfig.model_validate(CODEC | (settings or {})))
    assert isinstance(model, TransformCodec)
    return model


def test_the_transform_is_that_of_the_principal_components_of_the_patches(shard_set: ShardSet):
    rows, deviation = (part.double().numpy() for part in block_transform(shard_set, SIZE, COUNT))
    expected = covariance(shard_set)
    values = np.linalg.eigvalsh(expected)[::-1]
    np.testing.assert_allclose(deviation, np.sqrt(values[:COUNT]), rtol=1e-5)
    np.testing.assert_allclose(rows @ rows.T, np.eye(COUNT), atol=1e-6)
    np.testing.assert_allclose(expected @ rows.T, rows.T * values[:COUNT], atol=1e-5 * values[0])
    assert (rows[np.arange(COUNT), np.abs(rows).argmax(axis=1)] > 0).all()


@pytest.mark.parametrize("most", [5, 7, 20, 1000])
def test_of_few_shards_every_nth_patch_is_looked_at(shard_set: ShardSet, most: int, monkeypatch: pytest.MonkeyPatch):
    """As ever: the first weights of a run that is begun again are those that it had."""
    monkeypatch.setattr(block_statistics, "MOST_PATCHES", most)
    found, every = list(block_statistics._patches(shard_set)), patches(shard_set)
    assert len(shard_set.counts("train")) <= block_statistics.FEW_SHARDS
    assert torch.equal(torch.stack(found), torch.stack(every[:: -(-len(every) // most)]))


def test_an_untrained_codec_loses_what_its_transform_leaves_out_and_no_more(shard_set: ShardSet):
    images = torch.stack(patches(shard_set))
    values = np.linalg.eigvalsh(covariance(shard_set))[::-1]
    fine = {"finest_step": 2.0}

    def error(model: TransformCodec) -> float:
        """In grey levels."""
        found = model.reconstruct(images, shard_set.measured, step=2.0)
        return (found * 255 - images).square().mean().item()

    cosines, components = codec(fine), codec(fine)
    start_from(components, Coefficients(*block_transform(shard_set, SIZE, COUNT)), shard_set.measured, seed=0)
    left_out = values[COUNT:].sum() / values.size
    rounding = 2.0**2 / 12 * COUNT / values.size
    assert error(components) == pytest.approx(left_out + rounding, rel=0.02)
    assert error(components) < 0.7 * error(cosines)
    assert error(cosines) < 0.5 * values.sum() / values.size, "with no transform at all the pictures would be grey"


def test_both_ranks_start_from_the_transform_that_the_first_one_found(tmp_path: Path, tiny: dict[str, Any]):
    directory = begin(make(tiny, model=CODEC, training={"processes": 2}))
    body = f"""
import time
from pathlib import Path
from safetensors.torch import save_file
from pipelines.data.shard_set import ShardSet
from pipelines.durable_files import read_json
from pipelines.run_directory import RunDirectory
from pipelines.training import preparation
directory = RunDirectory(Path({str(directory.path)!r}))
shard_set = ShardSet.open(Path(read_json(directory.shard_set_file)["path"]))
if ranks.rank == 1:  # another processor may find another one, and fetches the shards for it
    del preparation.block_transform
else:
    found = preparation.block_transform

    def slowly(*given):
        time.sleep(1)  # as one that fetches shards
        return found(*given)

    preparation.block_transform = slowly
beats = []
state = preparation.prepare(directory, directory.read_config(), shard_set, ranks, lambda *given: beats.append(given))
say(str(len(beats)) + " " + str(set(beats)))
tensors = {{name: tensor.contiguous() for name, tensor in state.model.state_dict().items()}}
save_file(tensors, f"{{os.path.dirname(__file__)}}/start_{{ranks.rank}}.safetensors")
"""
    said = run_ranks(tmp_path, 2, body)
    shard_set = create_shards(directory.read_config())
    signs = [re.fullmatch(r"[01] (\d+) {\(0, 'warming up'\)}", line) for line in said]
    counts = [int(match[1]) for match in signs if match]
    assert len(counts) == 2 and counts[0] >= len(patches(shard_set)), "a sign of life for each patch"
    assert counts[1] >= 5, "and of who waits for the first one"
    first, second = (load_file(tmp_path / f"start_{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(second[name], value) for name, value in first.items())
    rows, deviation = block_transform(shard_set, SIZE, COUNT)
    levels = 255 * torch.tensor(shard_set.measured.std).repeat_interleave(SIZE**2)
    torch.testing.assert_close(first["encoder.transform.given"][..., 0, 0], rows * levels)
    torch.testing.assert_close(first["decoder.transform.given"][..., 0, 0], (rows / levels).T)
    # A Laplace variable's deviation is its scale times the root of 2; at a step of one, in grey levels.
    at_step_one = first["entropy.scale"].flatten() - 5.5 * first["entropy.slope"].flatten()
    torch.testing.assert_close(2**at_step_one * 2**0.5, deviation)
    assert not first["encoder.transform.learned"].any() and not first["decoder.transform.learned"].any()


def test_steps_are_drawn_log_uniformly_from_the_finest_to_the_coarsest():
    model = codec({"finest_step": 5.0, "coarsest_step": 80.0})
    shape = model.noise_shape(1, 16, 16)
    drawn = [random_generator(3, 1 + number // 64, number, "noise").random(shape, "float32") for number in range(4000)]
    noise = torch.from_numpy(np.concatenate(drawn)) - 0.5
    steps = model.drawn_step(noise)
    torch.testing.assert_close(steps.double(), 5 * 16 ** (noise[:, 0].double() + 0.5), rtol=1e-5, atol=0)
    ends = noise[:2].clone()
    ends[:, 0] = torch.tensor([-0.5, 0.5])
    assert model.drawn_step(ends).tolist() == pytest.approx([5, 80], rel=1e-6)
    # Kolmogorov and Smirnov: a uniform sample of n is further away than 1.95 / sqrt(n) once in a thousand times.
    shares = np.sort(np.log(steps.double().numpy() / 5) / np.log(16))
    places = np.arange(len(shares) + 1) / len(shares)
    distance = max((places[1:] - shares).max(), (shares - places[:-1]).max())
    assert distance < 1.95 / len(shares) ** 0.5
    x = torch.zeros(3, 3, 16, 16)
    assert torch.equal(model.train()(x, noise[:3]).step, steps[:3])
