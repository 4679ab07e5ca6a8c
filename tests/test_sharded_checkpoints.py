"""Checkpoints in the files of several ranks: read as one, whole or by rows; what was altered or made up is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from pipelines import checkpoints
from pipelines.checkpoint_format import SHARDED_VERSION
from pipelines.checkpoint_tensors import read_weights, stored_state, stored_weights
from pipelines.config import ModelConfig
from pipelines.durable_files import built_folder, json_bytes
from pipelines.errors import CodecmillError
from pipelines.file_digests import file_sha256
from pipelines.run_directory import RunDirectory
from pipelines.sealed_json import read_sealed, write_sealed
from pipelines.sharded_saving import Share, Shares, complete, write_shard
from pipelines.stored_tensors import as_one_file, of_file

TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def tensors() -> dict[str, Tensor]:
    """Of all types, with rows that no number of ranks divides, fewer rows than ranks, none, and no axes."""
    generator = torch.Generator().manual_seed(0)
    named = {
        f"{i}.{name}": torch.randn(7, 3, 2, generator=generator).mul(9).to(getattr(torch, name))
        for i, name in enumerate(TYPES)
    }
    return named | {
        "wide": torch.randn(2, 50, generator=generator),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(5.0),
    }


def shares_of(
    named: dict[str, Tensor], number: int, count: int, whole: tuple[str, ...] = ("scalar",)
) -> dict[str, Share]:
    """What one of `count` ranks holds, cut as `fully_shard` cuts; some tensors all of them hold."""
    found = {}
    for name, tensor in named.items():
        each = -(-len(tensor) // count) if tensor.dim() else 0
        rows = (tensor if number == 0 else None) if name in whole else tensor[number * each : (number + 1) * each]
        found[name] = Share(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), rows)
    return found


def save_sharded(
    run: RunDirectory, step: int, count: int, weights: dict[str, Tensor] | None = None
) -> checkpoints.Checkpoint:
    about: dict[str, Any] = {
        "step": step,
        "position": step * 16,
        "model": ModelConfig(),
        "normalization": {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)},
        "shard_set": "0" * 64,
        "parent": None,
        "validation": {},
        "best": None,
        "versions": {"torch": "2"},
    }
    weights = tensors() if weights is None else weights
    moments = {"exp_avg/wide": weights["wide"] * 2, "step/wide": torch.tensor(3.0)}
    all_shares: list[Shares] = [
        {"model": shares_of(weights, i, count), "training_state": shares_of(moments, i, count, ("step/wide",))}
        for i in range(count)
    ]
    final = checkpoints.folder_of(run, step)
    with built_folder(final) as folder:
        records = [write_shard(folder, i, count, shares) for i, shares in enumerate(all_shares)]
        complete(folder, run.path.name, about, all_shares[0], records, {"optimizer": "adam", "scaler": {}})
    return checkpoints.open_checkpoint(final)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "r")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_files_is_the_same_weights_and_is_known_by_the_same_name(run: RunDirectory, count: int):
    saved = save_sharded(run, 10, count)
    expected = tensors()
    found = read_weights(saved)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor), name
    assert saved.sha256 == hashlib.sha256(save(expected)).hexdigest(), "as the one file, written by safetensors itself"
    assert torch.equal(stored_state(saved)["exp_avg/wide"][...], expected["wide"] * 2)
    assert stored_state(saved)["step/wide"][...] == 3


def test_a_file_of_safetensors_and_what_is_put_together_are_the_same_bytes(tmp_path: Path):
    file = tmp_path / "x.safetensors"
    save_file(tensors(), file)
    assert b"".join(as_one_file(of_file(file))) == file.read_bytes()


def test_rows_are_read_across_files_and_from_no_others(run: RunDirectory):
    saved = save_sharded(run, 10, 3)  # 7 rows are 3, 3 and 1
    for name in ("shard_00000_of_00003.safetensors",):
        (saved.path / name).write_bytes(b"")
    weights, expected = stored_weights(saved), tensors()["1.float32"]
    for start in range(3, 8):
        for stop in range(start, 8):
            assert torch.equal(weights["1.float32"][start:stop], expected[start:stop])
    with pytest.raises(CodecmillError, match=r"shard_00000_of_00003\.safetensors is no intact safetensors file"):
        weights["1.float32"][2:4]


def test_a_rank_verifies_only_the_files_that_it_reads(run: RunDirectory):
    path = save_sharded(run, 10, 3).path
    file = path / "shard_00001_of_00003.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CodecmillError, match=r"shard_00001_of_00003\.safetensors was changed: its sha256 is"):
        checkpoints.open_checkpoint(path)
    weights = stored_weights(checkpoints.open_checkpoint(path, but_shards=True))
    assert torch.equal(weights["1.float32"][:3], tensors()["1.float32"][:3])
    with pytest.raises(CodecmillError, match=r"shard_00001_of_00003\.safetensors was changed: its sha256 is"):
        weights["1.float32"][:4]
    file.write_bytes(content[:-1])
    with pytest.raises(CodecmillError, match=r"shard_00001_of_00003\.safetensors has \d+ bytes instead of \d+"):
        checkpoints.open_checkpoint(path, but_shards=True)


@pytest.mark.parametrize(
    "name",
    ["shard_00000_of_00002.safetensors", "shard_00001_of_00002.safetensors", "sharding.json", "training_state.json"],
)
def test_one_that_lost_a_file_is_passed_over_for_the_one_before(run: RunDirectory, name: str):
    save_sharded(run, 10, 2)
    (save_sharded(run, 20, 2).path / name).unlink()
    found = checkpoints.latest(run)
    assert found is not None
    assert found.step == 10


def test_ranks_that_do_not_hold_all_of_a_tensor_make_no_checkpoint(run: RunDirectory):
    weights = tensors()
    shares = [shares_of(weights, i, 2) for i in range(2)]
    shares[1]["wide"] = shares[1]["wide"]._replace(rows=weights["wide"][:0])
    text = r"saved 1 rows of 'model/wide', whose shape is \[2, 50\]"
    with pytest.raises(CodecmillError, match=text), built_folder(checkpoints.folder_of(run, 10)) as folder:
        records = [write_shard(folder, i, 2, {"model": each, "training_state": {}}) for i, each in enumerate(shares)]
        complete(folder, "r", {}, {"model": shares[0], "training_state": {}}, records, {})
    assert list(run.checkpoints.iterdir()) == []


def reseal(path: Path, name: str, content: bytes) -> None:
    """Put another file into a checkpoint whose manifest then names it: as somebody may who means it."""
    (path / name).write_bytes(content)
    manifest, _ = read_sealed(path / "checkpoint.json")
    record = {"bytes": len(content), "sha256": file_sha256(path / name)}
    write_sealed(path / "checkpoint.json", manifest | {"files": {**manifest["files"], name: record}})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"offsets": [0, 3, 6]},
            r"sharding\.json is damaged: model\.1\.float32: .*do not lead from 0 up to its 7 rows",
        ),
        ({"offsets": [0, 8, 7]}, r"do not lead from 0 up to its 7 rows"),
        ({"offsets": [-1, 4, 7]}, r"greater than or equal to 0"),
        ({"offsets": [0, 7]}, r"2 files have 3 offsets in each tensor"),
        ({"offsets": []}, r"do not lead from 0 up to its 7 rows"),
        ({"shape": [7, 2**40, 2**40]}, r"no tensor has shape \[7, 1099511627776, 1099511627776\]"),
        ({"shape": [0, 2**47, 2**47, 0], "offsets": [0, 0, 0]}, r"no tensor has shape \[0, 140737488355328, "),
        (
            {"shape": [7, 3, 3]},
            r"holds 'model/1\.float32' as float32 \[4, 3, 2\], and is said to hold it as float32 \[4, 3, 3\]",
        ),
        ({"dtype": "float64"}, r"holds 'model/1\.float32' as float32 \[4, 3, 2\], and is said to hold it as float64"),
        ({"dtype": "complex64"}, r"sharding\.json is damaged: model\.1\.float32\.dtype"),
        ({"shape": [10**12, 3, 2], "offsets": [0, 4, 10**12]}, r"is said to hold it as float32 \[999999999996, 3, 2\]"),
    ],
)
def test_what_is_said_of_the_files_is_checked(run: RunDirectory, change: dict[str, Any], text: str):
    path = save_sharded(run, 10, 2).path
    said = json.loads((path / "sharding.json").read_bytes())
    said["model"]["1.float32"] |= change
    reseal(path, "sharding.json", json_bytes(said))
    with pytest.raises(CodecmillError, match=text):
        read_weights(checkpoints.open_checkpoint(path))


def test_a_name_that_no_file_can_hold_is_refused(run: RunDirectory):
    path = save_sharded(run, 10, 2).path
    said = json.loads((path / "sharding.json").read_bytes())
    said["model"]["\ud800"] = said["model"].pop("1.float32")
    reseal(path, "sharding.json", json.dumps(said).encode())
    with pytest.raises(CodecmillError, match=r"sharding\.json is damaged: .*no tensor is called '\\ud800'"):
        read_weights(checkpoints.open_checkpoint(path))


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "model.safetensors"])
def test_files_elsewhere_are_not_read(run: RunDirectory, name: str):
    path = save_sharded(run, 10, 2).path
    said = json.loads((path / "sharding.json").read_bytes())
    said["files"][1] = name
    reseal(path, "sharding.json", json_bytes(said))
    with pytest.raises(CodecmillError, match=r"sharding\.json is damaged: files|is not named by its checkpoint"):
        read_weights(checkpoints.open_checkpoint(path))


def test_weights_under_the_name_of_others_are_refused(run: RunDirectory):
    path = save_sharded(run, 10, 2).path
    manifest, _ = read_sealed(path / "checkpoint.json")
    write_sealed(path / "checkpoint.json", manifest | {"weights_sha256": "1" * 64})
    with pytest.raises(
        CodecmillError, match=r"The shards in .* do not make the weights that its checkpoint\.json names: their sha256"
    ):
        read_weights(checkpoints.open_checkpoint(path))


def test_each_kind_has_its_own_version(run: RunDirectory):
    path = save_sharded(run, 10, 2).path
    manifest, _ = read_sealed(path / "checkpoint.json")
    assert manifest["format_version"] == SHARDED_VERSION == 2
    for wrong, text in (
        (manifest | {"format_version": 1}, "weights_sha256 belongs to sharded checkpoints"),
        ({**manifest, "weights_sha256": None}, "weights_sha256 belongs to sharded checkpoints"),
        (manifest | {"format_version": 3}, "has format version 3; this codecmill reads 1 and 2"),
    ):
        write_sealed(path / "checkpoint.json", wrong)
        with pytest.raises(CodecmillError, match=text):
            checkpoints.open_checkpoint(path)


def test_a_whole_checkpoint_says_nothing_of_shards(run: RunDirectory):
    about = save_sharded(run, 10, 1).manifest.model_dump(exclude={"files", "format_version", "run", "weights_sha256"})
    saved = checkpoints.save(run, about | {"step": 11}, {"w": torch.zeros(2)}, {}, {})
    manifest, _ = read_sealed(saved.path / "checkpoint.json")
    assert manifest["format_version"] == 1, "what older codecmills read"
    assert "weights_sha256" not in manifest
    assert stored_weights(saved)["w"][1:].tolist() == load_file(saved.path / "model.safetensors")["w"][1:].tolist()
