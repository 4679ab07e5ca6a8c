"""What is done with a checkpoint is done with a sharded one: looked at, verified, used, sent and brought."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make, picture
from object_store import Proxy
from safetensors.torch import save
from test_storage import contents, the_store
from trainings import begin, train

from pipelines import checkpoints, tracking
from pipelines.checkpoint_tensors import read_weights
from pipelines.codec.files import compress, decompress
from pipelines.codec.opening import open_codec
from pipelines.data.shard_set import ShardSet
from pipelines.errors import CodecmillError
from pipelines.evaluation.stage import evaluate_run
from pipelines.model.build import build_model
from pipelines.provenance.explaining import explain
from pipelines.provenance.locating import find
from pipelines.provenance.reproducing import reproduce
from pipelines.provenance.verifying import verify
from pipelines.registration import register
from pipelines.run_directory import Root, RunDirectory
from pipelines.sealed_json import read_sealed, write_sealed
from pipelines.status import run_status
from pipelines.storage.bringing import bring
from pipelines.storage.sending import Sending
from pipelines.weights import export_classic, load_weights

pytestmark = pytest.mark.full

CODEC = {"entropy": "factorized", "downsamplings": 2, "latent_channels": 4}
SHARED = {"parallel": "fsdp", "processes": 2, "steps": 6}


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[RunDirectory]:
    """A codec that two ranks trained in shares."""
    root = Root(tmp_path_factory.mktemp("sharded") / "root")
    training = {"batch_size": 4, "crop_size": 16, "threads": 1, "precision": "float32", "compile": False}
    values: dict[str, Any] = {
        "name": "shares",
        "root": str(root.path),
        "data": {"images": str(photos), "patch_size": 32, "workers": 1, "validation_fraction": 0.2},
        "model": {"channels": 8, **CODEC},
        "training": training | {"checkpoint_interval": 3, "validation_interval": 3, **SHARED},
        "evaluation": {"curve_images": 0},
    }
    directory = begin(make(values))
    shutil.copy(empty_database, root.mlflow_database)
    train(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield directory


def newest(run: RunDirectory) -> checkpoints.Checkpoint:
    found = checkpoints.latest(run)
    assert found is not None
    assert found.manifest.is_sharded
    return found


def test_it_is_evaluated_registered_fetched_and_codes_pictures(run: RunDirectory, tmp_path: Path):
    last, shard_set = newest(run), ShardSet.open(run.shard_set())
    choice = run.read_config().evaluation
    evaluation = evaluate_run(run, last, shard_set, choice)
    registered = register(run, last, shard_set, dict(evaluation.means), evaluation.folder, choice)
    assert (registered.alias, registered.checkpoint_sha256) == ("champion", last.sha256)
    fetched = checkpoints.open_checkpoint(
        tracking.fetch_checkpoint("models:/codecmill@champion", run.root, tmp_path / "fetched")
    )
    assert fetched.sha256 == last.sha256
    assert contents(fetched.path) == contents(last.path)
    picture(3, 40, 32).save(tmp_path / "a.png")
    (coded,) = compress([tmp_path / "a.png"], tmp_path / "coded", open_codec(None, run.root), 60, None)
    (decoded,) = decompress([coded.path], tmp_path / "decoded", None, run.root)
    assert (decoded.width, decoded.height) == (40, 32)
    status = run_status(run)
    assert (status.step, status.alias, status.problems) == (6, "champion", ())


def test_it_is_explained_verified_and_trained_again(run: RunDirectory, tmp_path: Path):
    last = newest(run)
    about = explain(find(str(last.path / "sharding.json"), run.root, tmp_path))
    assert (about.step, about.files.keys()) == (6, last.manifest.files.keys())
    found = find(run.path.name, run.root, tmp_path, every=True)
    assert verify(found).problems == ()
    file = last.path / "checkpoint.json"
    manifest, _ = read_sealed(file)
    write_sealed(file, manifest | {"weights_sha256": "2" * 64})
    (problem,) = verify(found).problems
    assert problem.file == last.path / "sharding.json"
    assert problem.how.startswith("makes weights with another sha256 than its checkpoint's")
    write_sealed(file, manifest)
    shard = last.path / "shard_00001_of_00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (problem,) = verify(found).problems
    assert problem.file == shard
    assert problem.how.startswith("was changed: its sha256 is")
    shard.write_bytes(content)
    again = reproduce(find(str(last.path), run.root, tmp_path), on_line=print)
    assert (again.differing, again.sha256_again) == ((), last.sha256)


def test_others_begin_with_its_weights(run: RunDirectory, tmp_path: Path):
    last = newest(run)
    weights = read_weights(last)
    assert last.sha256 == hashlib.sha256(save(weights)).hexdigest()
    config = run.read_config()
    model = build_model(config.model, seed=5)
    assert len(load_weights(model, last.path).loaded) == len(weights)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    larger = build_model(config.model.model_copy(update={"residual_blocks": 2}))
    with pytest.raises(CodecmillError, match="do not match the model"):
        load_weights(larger, last.path)
    assert load_weights(larger, last.path, strict=False).missing
    export_classic(last, tmp_path / "model.pt")
    states = torch.load(tmp_path / "model.pt", weights_only=True)
    assert torch.equal(states["decoder_state_dict"]["transform.given"], weights["decoder.transform.given"])
    training = config.training.model_copy(update={"start_from": str(last.path), "steps": 2})
    child = begin(config.model_copy(update={"name": "child", "training": training}))
    parent = train(child).manifest.parent
    assert parent == last.sha256, "the same name as its one file"
    about = explain(find("child", run.root, tmp_path))
    assert about.parent is not None
    assert about.parent.checkpoint == last.path


def test_it_goes_to_a_store_and_comes_back(run: RunDirectory, tmp_path: Path, proxy: Proxy):
    Sending(run, the_store()).send()
    there = Root(tmp_path / "elsewhere").run(run.path.name)
    there.path.mkdir(parents=True)
    with there.locked():
        brought = bring(there, the_store())
    assert brought is not None
    assert contents(brought.path) == contents(newest(run).path)
