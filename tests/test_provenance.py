"""Which data made which checkpoint: all of it named in an instant, and every changed byte of it found."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make, picture
from processes import codecmill
from test_checkpoints import save
from test_command_line import HEAVY
from trainings import begin, train

from pipelines import checkpoints, tracking, versions
from pipelines.config import ModelConfig, RunConfig
from pipelines.data.shard_format import SPLITS
from pipelines.data.shard_set import ShardSet
from pipelines.data.shards import create_shards
from pipelines.durable_files import json_bytes, read_json, write_json
from pipelines.errors import CodecmillError, InputError
from pipelines.model.autoencoder import Autoencoder
from pipelines.promotion import Decision
from pipelines.provenance.chain import chain_of
from pipelines.provenance.explaining import Explanation, explain
from pipelines.provenance.ledger import Ledger
from pipelines.provenance.locating import Found, find
from pipelines.provenance.run_links import verify_choices, verify_pointer
from pipelines.provenance.verifying import Verification, verify
from pipelines.run_directory import Root, RunDirectory
from pipelines.runs import merge
from pipelines.sealed_json import read_sealed, write_sealed

STEPS = [5, 10, 12]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[RunDirectory]:
    """A registered run of twelve steps on pictures with masks, which began with the weights of another's checkpoint."""
    place = tmp_path_factory.mktemp("provenance")
    root = Root(place / "root")
    photos, masks = place / "photos", place / "masks"
    for folder in (photos, masks, root.path):
        folder.mkdir()
    for number in range(12):
        image = picture(number, 96 + 8 * number, 112 - 4 * number)
        image.save(photos / f"photo {number:02d}.png")
        image.getchannel("G").save(masks / f"photo {number:02d}.png")
    (photos / "broken.png").write_bytes(b"no image")
    shutil.copy(empty_database, root.mlflow_database)
    model = {"channels": 8, "latent_channels": 4, "downsamplings": 2}
    earlier = root.run("earlier")
    earlier.write_config(RunConfig.model_validate({"name": "earlier", "root": root.path}))
    parent = save(earlier, 7, weights=Autoencoder(ModelConfig.model_validate(model), seed=9).state_dict())
    training = {"steps": 12, "batch_size": 4, "crop_size": 16, "processes": 1, "threads": 1, "precision": "float32"}
    training |= {"checkpoint_interval": 5, "validation_interval": 5, "compile": False, "start_from": str(parent.path)}
    data = {"images": str(photos), "masks": str(masks), "patch_size": 32, "workers": 1, "validation_fraction": 0.2}
    values = {"name": "tiny", "root": str(root.path), "data": data, "model": model, "training": training}
    directory = begin(RunConfig.model_validate(values))
    best = checkpoints.best(directory) if train(directory) else None
    assert best is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        version = tracking.register_model(
            directory, best.path, best.sha256, best.manifest.shard_set, {"psnr": 30.0}, "7" * 64
        )
        tracking.promote(directory, version, Decision("champion", "The first."))
        alias = {"version": version, "alias": "champion", "reason": "The first.", "checkpoint_sha256": best.sha256}
        write_json(directory.promotion_file, alias)
        yield directory


def step_of(run: RunDirectory, step: int) -> Path:
    return checkpoints.folder_of(run, step)


def set_of(run: RunDirectory) -> Path:
    return Path(read_json(run.shard_set_file)["path"])


def found(run: RunDirectory, what: str | None = None, every: bool = True) -> Found:
    return find(what or run.path.name, run.root, Path("/nowhere"), every)


def verified(run: RunDirectory, what: str | None = None, with_sources: bool = False) -> Verification:
    return verify(found(run, what), with_sources)


def only_problem(run: RunDirectory, what: str | None = None, with_sources: bool = False) -> tuple[Path, str, str]:
    (problem,) = verified(run, what, with_sources).problems
    return problem.file, problem.how, problem.way_out


@contextmanager
def changed(file: Path, content: bytes | None) -> Iterator[None]:
    """Another content for a while; None removes the file."""
    former = file.read_bytes()
    file.unlink()
    try:
        if content is not None:
            file.write_bytes(content)
        yield
    finally:
        file.unlink(missing_ok=True)
        file.write_bytes(former)


def with_a_flip(content: bytes, place: int) -> bytes:
    place %= len(content)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_run_that_was_left_alone_is_all_as_it_was(run: RunDirectory):
    result = verified(run, with_sources=True)
    assert (result.problems, result.notes) == ((), ())
    assert result.checkpoints == tuple(step_of(run, step) for step in STEPS)
    read = [file for step in STEPS for file in step_of(run, step).iterdir()]
    read += [run.config_file, run.shard_set_file, run.start_weights / "model.safetensors"]
    read += [*set_of(run).iterdir(), *run.root.path.parent.glob("photos/photo*"), *run.root.path.parent.glob("masks/*")]
    assert (result.files, result.bytes) == (len(read), sum(file.stat().st_size for file in read))
    assert result.sources == 12


FILES = [
    *(f"runs/tiny/checkpoints/step_00000010/{name}" for name in ("checkpoint.json", "model.safetensors")),
    *(f"runs/tiny/checkpoints/step_00000010/training_state.{suffix}" for suffix in ("json", "safetensors")),
    *(f"runs/tiny/{name}" for name in ("start_from/model.safetensors", "config.json", "shard_set.json")),
    *(f"shards/*/{split}-000000.{suffix}" for split in SPLITS for suffix in ("tar", "index", "sources.jsonl")),
    "shards/*/manifest.json",
    "../photos/photo 03.png",
    "../masks/photo 03.png",
]


@pytest.mark.parametrize("pattern", FILES)
def test_one_changed_byte_in_any_file_is_named_and_so_is_its_absence(run: RunDirectory, pattern: str):
    (file,) = run.root.path.glob(pattern) if "*" in pattern else [(run.root.path / pattern).resolve()]
    whole = file.read_bytes()
    # A root may be moved: that the set lies elsewhere than it is said to is a note.
    vital = whole.index(b'"path"') if file.name == "shard_set.json" else len(whole)
    for place in (0, 1, vital // 3, vital // 2, -2, -1):
        with changed(file, with_a_flip(whole, place)):
            result = verified(run, with_sources=True)
        assert {problem.file for problem in result.problems} == {file}, place
        assert all(problem.how and problem.way_out for problem in result.problems)
    with changed(file, None):
        result = verified(run, with_sources=True)
        named = {problem.file: problem.how for problem in result.problems}
        if pattern.endswith("manifest.json"):  # a folder without it is no shard set
            assert "which was not found" in named[step_of(run, 12) / "checkpoint.json"]
        else:
            assert set(named) == {file}
            assert "missing" in named[file] or "no such file" in named[file]
    with changed(file, whole + b"\n"):
        assert {problem.file for problem in verified(run, with_sources=True).problems} == {file}
    assert verified(run, with_sources=True).problems == ()


def test_every_single_byte_of_the_runs_own_files_is_named(run: RunDirectory):
    chains = [chain_of(step_of(run, step), run, run.root) for step in STEPS]
    for file, check in ((run.config_file, verify_choices), (run.shard_set_file, verify_pointer)):
        whole = file.read_bytes()
        for place in range(len(whole)):
            ledger = Ledger(1)
            with changed(file, with_a_flip(whole, place)):
                check(run, chains, ledger)
            assert {problem.file for problem in ledger.problems} == {file} or str(file) in ledger.notes[0]


def test_what_a_resumed_run_may_change_is_worth_a_note_and_no_more(run: RunDirectory):
    config = run.read_config()
    longer = config.training.model_copy(update={"steps": 20, "keep_latest": 9})
    with changed(run.config_file, json_bytes(config.model_copy(update={"training": longer}).model_dump(mode="json"))):
        result = verified(run)
    assert result.problems == ()
    steps = "step_00000005, step_00000010, step_00000012"
    assert set(result.notes) == {
        f"{run.config_file} says training.steps 20 instead of 12 in {steps}; this may change.",
        f"{run.config_file} says training.keep_latest 9 instead of 3 in {steps}; this may change.",
    }
    inexact = merge(config, make(config.model_dump(), training={"precision": "bf16"}), allow_inexact=True)
    with changed(run.config_file, json_bytes(inexact.model_dump(mode="json"))):
        result = verified(run)
    assert result.problems == (), "what resume --allow-inexact has changed"
    note = f'{run.config_file} says training.precision "bf16" instead of "float32" in {steps}; this may change.'
    assert result.notes == (note,)
    without = {key: value for key, value in read_json(run.config_file).items() if key != "seed"}
    with changed(run.config_file, json_bytes(without)):
        assert only_problem(run)[1] == f"says seed nothing instead of 0 in {steps}"
    for update in ({"learning_rate": 0.5}, {"steps": 6}):
        other = config.model_copy(update={"training": config.training.model_copy(update=update)})
        with changed(run.config_file, json_bytes(other.model_dump(mode="json"))):
            file, how, way_out = only_problem(run, str(step_of(run, 5)))
        assert file == run.config_file
        (name,) = update
        before = getattr(config.training, name)
        assert how == f"says training.{name} {update[name]} instead of {before} in step_00000005"
        assert way_out == f"Restore it; what it said is in: codecmill explain {step_of(run, 5)} --json"


def test_a_checkpoint_is_verified_alone_and_a_run_with_all_of_its_checkpoints(run: RunDirectory):
    file = step_of(run, 5) / "model.safetensors"
    with changed(file, with_a_flip(file.read_bytes(), 3000)):
        assert verified(run, str(step_of(run, 12))).problems == ()
        at, how, way_out = only_problem(run)
    assert at == file
    assert how.startswith("was changed: its sha256 is ")
    assert f"instead of {sha256(file)[:16]}..." in how
    # MLflow may have got this one, too, on a machine that trains slowly enough.
    assert re.fullmatch(r"Restore it from a copy( \(MLflow has .*\))?; no training goes on from it as it is\.", way_out)


def test_a_copy_in_mlflow_is_named_as_a_way_out(run: RunDirectory):
    best = found(run, every=False).folders[0]
    file = best / "training_state.json"
    with changed(file, b"{}"):
        _, how, way_out = only_problem(run)
    assert re.fullmatch(r"has 2 bytes instead of \d\d", how)
    run_id = read_json(run.mlflow_file)["run_id"]
    assert f"(MLflow has runs:/{run_id}/checkpoints/{best.name})" in way_out


def test_the_parents_checkpoint_replaces_its_damaged_copy(run: RunDirectory):
    file = run.start_weights / "model.safetensors"
    with changed(file, b""):
        _, _, way_out = only_problem(run)
    parent = run.root.run("earlier").checkpoints / "step_00000007" / "model.safetensors"
    assert way_out == f"Copy {parent} there."
    assert parent.read_bytes() == file.read_bytes()


def test_damage_in_a_tar_is_named_by_its_samples(run: RunDirectory):
    tar = set_of(run) / "train-000000.tar"
    spans = np.load(tar.with_suffix(".index"))
    whole, start = tar.read_bytes(), [int(span["offset"]) for span in spans]
    with changed(tar, with_a_flip(with_a_flip(whole, start[3] + 700), start[7])):
        assert only_problem(run)[1].endswith(f"; damaged: 2 of its {len(spans)} samples, with the numbers 3, 7")
    with changed(tar, with_a_flip(whole, -1)):
        assert only_problem(run)[1].endswith(", though no sample of it is damaged")


@pytest.mark.parametrize(
    "name", ["manifest.json", "train-000000.tar", "train-000000.index", "test-000000.sources.jsonl"]
)
def test_the_way_out_of_a_damaged_shard_set_is_one(run: RunDirectory, name: str):
    file = set_of(run) / name
    with changed(file, with_a_flip(file.read_bytes(), 300)):
        _, _, way_out = only_problem(run)
        assert way_out == f"Delete it and run: codecmill shards --config {run.config_file} --root {run.root.path}"
        file.unlink()
        create_shards(run.read_config())
        assert verified(run).problems == ()


def test_a_set_that_is_not_made_of_its_sources_contradicts_its_name(run: RunDirectory):
    """An older checkpoint does not name the digest of the manifest, but the set's name is a hash of what is in it."""
    folder = set_of(run)
    manifest, sources = folder / "manifest.json", folder / "train-000000.sources.jsonl"
    value, seal = read_sealed(step_of(run, 12) / "checkpoint.json")
    assert seal
    older = json_bytes({**value, "config": None, "shard_manifest_sha256": None})
    with changed(step_of(run, 12) / "checkpoint.json", older):
        with changed(manifest, json_bytes(read_json(manifest) | {"versions": {"pil": "0"}})):
            file, how, _ = only_problem(run, str(step_of(run, 12)))
            assert (file, how) == (manifest, "contradicts itself: settings_digest is not of its settings")
        lines = sources.read_bytes().replace(b'"sha256":"', b'"sha256":"0', 1)
        rows = read_json(manifest)["shards"]
        rows[0] |= {"sources_sha256": hashlib.sha256(lines).hexdigest(), "sources_bytes": len(lines)}
        with changed(sources, lines), changed(manifest, json_bytes(read_json(manifest) | {"shards": rows})):
            file, how, _ = only_problem(run, str(step_of(run, 12)))
            assert file == manifest
            assert how.startswith("contradicts itself: its sources make the set ")
        assert "is of an older codecmill" in verified(run, str(step_of(run, 12))).notes[0]


def test_source_images_are_read_only_where_it_is_asked_for(run: RunDirectory):
    photo, other = (run.root.path.parent / "photos" / f"photo 0{number}.png" for number in (3, 4))
    with changed(photo, with_a_flip(photo.read_bytes(), 50)):
        os.utime(photo, (1_000_000_000, 1_000_000_000))
        assert verified(run).problems == ()
        assert verified(run).sources is None
        file, how, way_out = only_problem(run, with_sources=True)
        assert file == photo
        assert how.startswith("was changed: its sha256 is ")
        assert way_out == "Restore it from a copy; what was trained on is still in the shards."
    with changed(photo, None), changed(other, b"short"):
        os.mkfifo(photo)
        problems = {problem.file: problem.how for problem in verified(run, with_sources=True).problems}
    assert problems == {photo: "is no regular file", other: f"has 5 bytes instead of {other.stat().st_size}"}


def test_a_checkpoint_that_a_training_deletes_meanwhile_is_no_problem(run: RunDirectory, tmp_path: Path):
    everything = found(run)
    shutil.move(step_of(run, 5), tmp_path / "away")
    try:
        result = verify(everything)
    finally:
        shutil.move(tmp_path / "away", step_of(run, 5))
    assert result.problems == ()
    assert result.notes == (f"{step_of(run, 5)} was deleted meanwhile, as one too many.",)


def test_explain_names_every_link(run: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("explain is offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    about = explain(found(run, str(step_of(run, 12))))
    folder = step_of(run, 12)
    assert (about.run, about.step, about.checkpoint, about.run_directory) == ("tiny", 12, folder, run.path)
    assert {name: record.sha256 for name, record in about.files.items()} == {
        file.name: sha256(file) for file in folder.iterdir() if file.name != "checkpoint.json"
    }
    assert about.manifest_sha256 == sha256(folder / "checkpoint.json")
    assert about.config_file == run.config_file
    assert about.config == read_json(run.config_file)
    assert about.git_commit == versions_now()[0]
    assert about.versions == versions_now()[1]
    parent = run.root.run("earlier").checkpoints / "step_00000007"
    assert about.parent is not None
    assert about.parent.model_dump() == {
        "sha256": sha256(parent / "model.safetensors"),
        "named": str(parent),
        "kept": run.start_weights / "model.safetensors",
        "checkpoint": parent,
    }
    shards = about.shard_set
    assert (shards.path, shards.fingerprint[:16]) == (set_of(run), set_of(run).name)
    assert shards.manifest_sha256 == sha256(set_of(run) / "manifest.json")
    assert {row.tar: row.sha256 for row in shards.shards} == {f.name: sha256(f) for f in set_of(run).glob("*.tar")}
    place = run.root.path.parent
    assert {row.path: row.sha256 for row in shards.sources} == {str(f): sha256(f) for f in place.glob("photos/photo*")}
    assert {row.mask: row.mask_sha256 for row in shards.sources} == {str(f): sha256(f) for f in place.glob("masks/*")}


def versions_now() -> tuple[str | None, dict[str, str]]:
    return versions.git_commit(), versions.package_versions()


def test_explain_says_which_samples_were_consumed(run: RunDirectory):
    per_epoch = sum(ShardSet.open(set_of(run)).counts("train"))
    for step, epochs in ((5, 0), (12, 0)):
        assert explain(found(run, str(step_of(run, step)))).samples.model_dump() == {
            "count": 4 * step,
            "first": 0,
            "last": 4 * step - 1,
            "epochs": epochs,
            "of_next": 4 * step,
            "samples_per_epoch": per_epoch,
        }
    file = step_of(run, 12) / "checkpoint.json"
    value, _ = read_sealed(file)
    former = file.read_bytes()
    try:
        write_sealed(file, value | {"position": 3 * per_epoch + 2})
        samples = explain(found(run, str(file.parent))).samples
    finally:
        file.write_bytes(former)
    assert (samples.last, samples.epochs, samples.of_next) == (3 * per_epoch + 1, 3, 2)


def test_a_checkpoint_is_found_by_each_of_its_names(run: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    best = checkpoints.best(run)
    assert best is not None
    run_id = read_json(run.mlflow_file)["run_id"]
    names = [run.path.name, str(run.path), str(best.path), str(best.path / "model.safetensors")]
    names += [f"runs:/{run_id}/checkpoints/{best.path.name}", "models:/codecmill/1", "models:/codecmill@champion"]
    for name in names:
        assert found(run, name, every=False).folders == (best.path,), name
        assert found(run, name, every=False).run == run
    assert found(run, f"runs:/{run_id}").folders == (step_of(run, 12),), "without a path the newest, as for start_from"
    assert found(run).folders == tuple(step_of(run, step) for step in STEPS)
    with pytest.raises(InputError, match=r"There is no models:/codecmill/2 in .*mlflow\.db"):
        found(run, "models:/codecmill/2")


def test_with_a_server_that_is_away_a_version_is_found_by_what_its_run_wrote_down(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    sent = read_json(run.mlflow_file) | {"tracking_uri": "http://user:***@127.0.0.1:9"}
    best = checkpoints.best(run)
    assert best is not None
    with changed(run.mlflow_file, json_bytes(sent)):
        for name in ("models:/codecmill/1", "models:/codecmill@champion"):
            meant = found(run, name)
            assert (meant.folders, meant.how) == ((best.path,), f"version 1, as {run.promotion_file} says")
    with pytest.raises(CodecmillError, match=r"127\.0\.0\.1:9 cannot be reached"):
        found(run, "models:/codecmill/1")


def test_a_checkpoint_without_its_run_is_explained_and_its_data_looked_for_under_the_root(
    run: RunDirectory, tmp_path: Path
):
    alone = tmp_path / "from a friend"
    shutil.copytree(step_of(run, 12), alone)
    meant = find(str(alone), run.root, tmp_path)
    assert (explain(meant).run, explain(meant).run_directory, explain(meant).config_file) == ("tiny", None, None)
    assert explain(meant).config == read_json(run.config_file)
    assert verify(meant).problems == ()
    nowhere = find(str(alone), Root(tmp_path), tmp_path)
    assert explain(nowhere).shard_set.problem == "It is not on this machine, or not under this root (--root)."
    (problem,) = verify(nowhere).problems
    assert problem.how == f"names shard set {set_of(run).name}, which was not found"
    assert problem.way_out == "Name the folder that holds it with --root."


def test_a_root_that_was_moved_is_verified_where_it_is(run: RunDirectory, tmp_path: Path):
    moved = Root(tmp_path / "elsewhere")
    shutil.copytree(run.root.path, moved.path)
    copy = moved.run("tiny")
    tar = moved.shards / set_of(run).name / "train-000000.tar"
    result = verified(copy)
    assert result.problems == ()
    assert result.shard_sets == (tar.parent,)
    assert result.notes == (f"{copy.shard_set_file} names the folder {set_of(run)}; the set lies in {tar.parent}.",)
    tar.write_bytes(with_a_flip(tar.read_bytes(), 0))
    assert only_problem(copy)[0] == tar, "not the whole one that the run was trained on"


HOSTILE = "../../../../../../../../etc/passwd"


def test_a_manifest_that_names_files_elsewhere_is_one_clear_sentence(run: RunDirectory):
    manifest = set_of(run) / "manifest.json"
    value = read_json(manifest)
    for name in (HOSTILE, "/etc/passwd", "train-000000/../x"):
        rows = [value["shards"][0] | {"name": name}, *value["shards"][1:]]
        with changed(manifest, json_bytes(value | {"shards": rows})):
            file, how, _ = only_problem(run)
            assert file == manifest
            assert how.startswith("is damaged: shards.0.name: String should match pattern")
            assert "is damaged: shards.0.name" in str(explain(found(run, every=False)).shard_set.problem)


@pytest.mark.parametrize("fingerprint", [HOSTILE, "", "../" * 8, "f" * 64])
def test_a_checkpoint_that_names_another_set_is_one_clear_sentence(run: RunDirectory, fingerprint: str):
    file = step_of(run, 12) / "checkpoint.json"
    former = file.read_bytes()
    value, _ = read_sealed(file)
    try:
        write_sealed(file, value | {"shard_set": fingerprint})
        problems = {p.file: p.how for p in verified(run, str(file.parent)).problems}
        assert problems[file] == f"names shard set {fingerprint[:16]}, which was not found"
        assert explain(found(run, str(file.parent))).shard_set.path is None
    finally:
        file.write_bytes(former)


@pytest.mark.parametrize("fingerprint", [[], {}, 3, None, "0" * 64])
def test_a_pointer_that_names_another_set_or_none_is_wrong(run: RunDirectory, fingerprint: object):
    chains = [chain_of(step_of(run, 12), run, run.root)]
    ledger = Ledger(1)
    with changed(run.shard_set_file, json_bytes(read_json(run.shard_set_file) | {"fingerprint": fingerprint})):
        verify_pointer(run, chains, ledger)
    (problem,) = ledger.problems
    assert problem.how.startswith(f"names shard set {str(fingerprint)[:16]}, but the checkpoints were trained on ")


def test_a_pointer_to_a_folder_of_another_name_is_not_followed(run: RunDirectory, tmp_path: Path):
    shutil.copytree(run.path, tmp_path / "runs" / "tiny")
    copy = RunDirectory(tmp_path / "runs" / "tiny")
    shutil.copytree(set_of(run), tmp_path / "secret")
    write_json(copy.shard_set_file, read_json(run.shard_set_file) | {"path": str(tmp_path / "secret")})
    assert "which was not found" in str(verified(copy).problems)
    for path in ("\0", "x" * 9000, 3, None):
        write_json(copy.shard_set_file, read_json(run.shard_set_file) | {"path": path})
        assert "which was not found" in str(verified(copy).problems)


def test_a_list_of_sources_that_is_none_is_named(run: RunDirectory):
    sources, manifest = set_of(run) / "train-000000.sources.jsonl", set_of(run) / "manifest.json"
    for lines in (b"[1]\n", b"{\n", b'{"path": 3}\n', b"\xff\n"):
        rows = read_json(manifest)["shards"]
        rows[0] |= {"sources_sha256": hashlib.sha256(lines).hexdigest(), "sources_bytes": len(lines)}
        with changed(sources, lines), changed(manifest, json_bytes(read_json(manifest) | {"shards": rows})):
            assert {p.file for p in verified(run, with_sources=True).problems} == {manifest, sources}
            assert "train-000000.sources.jsonl is damaged: line 1 says" in str(
                explain(found(run, every=False)).shard_set.problem
            )


def test_the_commands_print_what_is_so_and_exit_with_what_is_wrong(run: RunDirectory, tmp_path: Path):
    root = ["--root", str(run.root.path)]
    shown = codecmill("explain", "tiny", *root, cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    best = found(run, every=False).folders[0]
    for named in (str(best), sha256(best / "model.safetensors"), "positions 0 to ", str(run.config_file), "torch 2"):
        assert named in shown.stdout
    assert "... and 7 more" in shown.stdout
    listed = codecmill("explain", str(best), "--json", *root, cwd=tmp_path)
    assert len(Explanation.model_validate_json(listed.stdout).shard_set.sources) == 12
    sound = codecmill("verify", "tiny", "--sources", *root, cwd=tmp_path)
    assert (sound.returncode, sound.stdout[:48]) == (0, "All as it was: 3 checkpoints and 1 shard set, 12")
    photo = run.root.path.parent / "photos" / "photo 05.png"
    with changed(photo, b"\x1b[2J"):
        wrong = codecmill("verify", "tiny", "--sources", "--json", *root, cwd=tmp_path)
        assert wrong.returncode == 1
        assert wrong.stderr.endswith("codecmill: 1 problem in what 'tiny' comes from.\n")
        assert json.loads(wrong.stdout)["problems"][0]["file"] == str(photo)
        told = codecmill("verify", "tiny", "--sources", *root, cwd=tmp_path).stdout
        assert told.splitlines()[0].startswith(f"{photo} has 4 bytes instead of ")
        assert "All as it was" not in told
    unknown = codecmill("verify", "nothing", *root, cwd=tmp_path)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "There is no run 'nothing'" in unknown.stderr


@pytest.mark.parametrize("what", ["tiny", "models:/codecmill@champion"])
def test_explain_imports_nothing_that_takes_seconds(run: RunDirectory, what: str, tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-c", HEAVY, "explain", what, "--root", str(run.root.path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.endswith("HEAVY ['numpy']\n")


def test_the_commit_of_a_checkout_around_the_environment_is_not_ours(tmp_path: Path):
    ours = tmp_path / "venv" / "pipelines" / "versions.py"
    ours.parent.mkdir(parents=True)
    ours.touch()
    (tmp_path / "theirs.py").touch()

    def git(*words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@x"]
        return subprocess.run(
            ["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert versions.git_commit(ours) is None
    git("init")
    git("add", "theirs.py")
    git("commit", "-m", "one")
    assert versions.git_commit(ours) is None
    git("add", "venv")
    git("commit", "-m", "two")
    assert versions.git_commit(ours) == git("rev-parse", "HEAD")
    ours.write_text("changed")
    assert versions.git_commit(ours) == git("rev-parse", "HEAD") + "+changes"
