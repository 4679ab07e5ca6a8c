"""What `codecmill clean` removes, and what it must never remove."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import make, picture
from processes import codecmill
from test_checkpoints import save
from trainings import begin

from pipelines import checkpoints, tracking
from pipelines.cleaning import find_removable, remove
from pipelines.data.remote_images import LISTING
from pipelines.data.shard_set import ShardSet
from pipelines.data.shards import create_shards
from pipelines.durable_files import read_json, write_json
from pipelines.locks import lock
from pipelines.promotion import Decision
from pipelines.run_directory import Root, RunDirectory
from pipelines.sealed_json import write_sealed


def age(folder: Path, days: float) -> None:
    """Have all in a folder be written so many days ago."""
    then = time.time() - days * 24 * 3600
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (then, then))


@pytest.fixture
def root(tiny: dict[str, Any]) -> Root:
    return Root(Path(tiny["root"]))


def test_shard_sets_that_no_run_names_go_once_they_are_old(tiny: dict[str, Any], root: Root):
    named = begin(make(tiny)).shard_set()
    old, young, held = (create_shards(make(tiny, data={"patch_size": size})).path for size in (16, 24, 48))
    for each in (named, old, held):
        age(each, 31)
    found = find_removable(root, days=30, runs=False)
    assert {each.path for each in found} == {old, held}
    assert all(each.kind == "shard set" and 30.9 < each.days < 31.1 and each.bytes > 10_000 for each in found)
    with lock(held.with_name(f".tmp-{held.name}.lock"), "a build", wait=0):
        assert {each.path for each in found if remove(each)} == {old}
    assert {path.name for path in root.shards.glob("[!.]*/")} == {named.name, young.name, held.name}
    assert not list(root.shards.glob(".tmp-removed*"))
    young.rename(young.with_name(f".tmp-removed-{young.name}"))  # as a kill would leave it
    (rest,) = (each for each in find_removable(root, days=30, runs=False) if each.kind == "rest")
    assert remove(rest)
    assert not rest.path.exists()


def test_a_root_that_was_moved_keeps_the_sets_of_its_runs(tiny: dict[str, Any], root: Root):
    made = begin(make(tiny)).shard_set()
    moved = Root(root.path.rename(root.path.with_name("moved")))
    age(moved.path, 31)
    assert find_removable(moved, days=30, runs=False) == []
    found = moved.run("tiny").shard_set()
    assert found == moved.shards / made.name
    assert ShardSet.open(found).read("train", 0, 0).image


def test_copies_of_images_in_a_store_go_once_no_run_has_looked_at_them_for_long(root: Root):
    for bucket in ("old", "young", "held"):
        (folder := root.images / bucket / "photos").mkdir(parents=True)
        picture(1, 32, 32).save(folder / "a.png")
        write_sealed(folder.parent / LISTING, {})
    age(root.images / "old", 31)
    age(root.images / "held", 31)
    age(root.images / "young" / "photos", 31)  # the images are old, the last look at them is not
    found = find_removable(root, days=30, runs=False)
    assert {(each.kind, each.path.name) for each in found} == {("images", "old"), ("images", "held")}
    with lock(root.images / ".tmp-held.lock", "a fetch", wait=0):
        assert {each.path.name for each in found if remove(each)} == {"old"}
    assert {path.name for path in root.images.glob("[!.]*")} == {"young", "held"}
    age(root.images / "young", 1)
    assert [each.path.name for each in find_removable(root, days=0, runs=False)] == ["held"], (
        "shards may be in the making"
    )


def test_a_dry_run_says_what_would_go_and_leaves_it(tiny: dict[str, Any], root: Root, tmp_path: Path):
    unnamed = create_shards(make(tiny)).path
    said = codecmill("clean", "--root", str(root.path), "--older-than", "0", "--dry-run", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert f"would remove the shard set {unnamed} (" in said.stdout
    assert "Without --dry-run they go." in said.stdout
    assert unnamed.is_dir()
    done = codecmill("clean", "--root", str(root.path), "--older-than", "0", cwd=tmp_path)
    assert f"removed the shard set {unnamed} (" in done.stdout
    assert not unnamed.exists()
    assert codecmill("clean", "--root", str(root.path), cwd=tmp_path).stdout == "Nothing to remove.\n"


def finished(tiny: dict[str, Any], name: str) -> RunDirectory:
    """A run that is said to be trained, evaluated and registered."""
    run = begin(make(tiny, name=name))
    save(run, 12, shard_set=run.shard_set().name)
    write_json(run.evaluation(12) / "evaluation.json", {"images": []})
    write_json(run.promotion_file, {"version": "1", "alias": "candidate"})
    age(run.path, 40)
    return run


def crown(run: RunDirectory) -> checkpoints.Checkpoint:
    """Have a run's checkpoint be the champion; returns it."""
    tracking.open_run(run, run.read_config())
    last = checkpoints.latest(run)
    assert last is not None
    number = tracking.register_model(run, last.path, last.sha256, last.manifest.shard_set, {"psnr": 30.0}, "0" * 64)
    tracking.promote(run, number, Decision("champion", "The first."))
    return last


def test_old_finished_runs_go_where_asked_but_not_the_champions_nor_one_at_work(tiny: dict[str, Any], root: Root):
    old, champion, busy = (finished(tiny, name) for name in ("old", "champion", "busy"))
    unfinished = begin(make(tiny, name="unfinished"))
    age(unfinished.path, 40)
    crown(champion)
    age(champion.path, 40)
    with busy.locked():
        assert [each.path for each in find_removable(root, days=30, runs=True)] == [old.path]
    age(busy.path, 40)  # whoever holds a run has written into it
    found = find_removable(root, days=30, runs=True)
    assert {each.path for each in found} == {old.path, busy.path}
    with busy.locked():
        assert [each.path for each in found if remove(each)] == [old.path]
    assert sorted(path.name for path in root.runs.iterdir()) == ["busy", "champion", "unfinished"]
    assert find_removable(root, days=50, runs=True) == []


def test_nothing_goes_where_mlflow_cannot_say_whose_the_champion_is(
    tiny: dict[str, Any], root: Root, monkeypatch: pytest.MonkeyPatch
):
    finished(tiny, "old")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(tracking.TrackingUnavailable):
        find_removable(root, days=30, runs=True)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_set_that_a_checkpoint_names_stays_whatever_has_become_of_its_runs_pointer(
    tiny: dict[str, Any], root: Root, damage: str, caplog: pytest.LogCaptureFixture
):
    """`verify` says of such a pointer: delete it."""
    run = begin(make(tiny))
    shard_set, unnamed = run.shard_set(), create_shards(make(tiny, data={"patch_size": 16})).path
    checkpoint = save(run, 12, shard_set=read_json(run.shard_set_file)["fingerprint"])
    if damage == "cut":
        run.shard_set_file.write_bytes(run.shard_set_file.read_bytes()[:40])
    else:
        run.shard_set_file.unlink()
    age(shard_set, 31)
    age(unnamed, 31)
    assert [each.path for each in find_removable(root, days=30, runs=False)] == [unnamed]
    (checkpoint.path / "checkpoint.json").write_text("{")
    assert find_removable(root, days=30, runs=False) == []
    assert "No shard set is removed: run 'tiny' no longer says which is its own." in caplog.text


@pytest.mark.parametrize("how", ["a run names it", "it was found made"])
def test_a_set_that_is_wanted_since_it_was_listed_stays(tiny: dict[str, Any], root: Root, how: str):
    config = make(tiny, data={"patch_size": 16})
    shard_set = create_shards(config)
    age(shard_set.path, 31)
    (found,) = find_removable(root, days=30, runs=False)
    if how == "a run names it":
        pointer = {"fingerprint": shard_set.fingerprint, "path": str(shard_set.path)}
        write_json(root.run("new").shard_set_file, pointer)
    else:
        create_shards(config)
    assert not remove(found)
    assert shard_set.path.is_dir()
    assert find_removable(root, days=30, runs=False) == []


def test_runs_stay_that_an_mlflow_may_have_as_its_champion_which_nobody_names(tiny: dict[str, Any], root: Root):
    runs = [finished(tiny, name) for name in ("served", "local", "old")]
    marks = {"run_id": "1", "experiment_id": "1", "tracking_uri": "http://server:5000"}
    write_json(runs[0].mlflow_file, marks)
    write_json(runs[1].promotion_file, {"version": "1", "alias": "champion"})
    for run in runs:
        age(run.path, 40)
    assert [each.path for each in find_removable(root, days=30, runs=True) if each.kind == "run"] == [runs[2].path]


def test_a_run_that_was_only_to_be_trained_goes_as_others_do(tiny: dict[str, Any], root: Root):
    run = begin(make(tiny, name="only-trained", data={"test_fraction": 0}))
    save(run, 12, shard_set=run.shard_set().name)
    age(run.path, 40)
    assert [each.path for each in find_removable(root, days=30, runs=True) if each.kind == "run"] == [run.path]


def test_what_went_on_from_the_champion_stays_so_that_a_watch_does_not_try_it_again(tiny: dict[str, Any], root: Root):
    champion, candidate = finished(tiny, "champion"), begin(make(tiny, name="candidate"))
    last = crown(champion)
    save(candidate, 12, shard_set=candidate.shard_set().name, parent=last.sha256)
    write_json(candidate.evaluation(12) / "evaluation.json", {"images": []})
    write_json(candidate.promotion_file, {"version": "2", "alias": "candidate"})
    for run in (champion, candidate):
        age(run.path, 40)
    assert [each for each in find_removable(root, days=30, runs=True) if each.kind == "run"] == []


def test_a_run_that_is_a_link_or_that_its_lock_keeps_out_stays_whole_and_is_told(
    tiny: dict[str, Any], root: Root, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    linked, closed, old = (finished(tiny, name) for name in ("linked", "closed", "old"))
    linked.path.rename(tmp_path / "other disk")
    linked.path.symlink_to(tmp_path / "other disk")
    closed.lock_file.unlink(missing_ok=True)
    closed.lock_file.mkdir()  # nobody may open it to write, not even root
    age(closed.path, 40)
    found = find_removable(root, days=30, runs=True)
    assert {each.path for each in found} == {linked.path, closed.path, old.path}
    assert [each.path for each in found if remove(each)] == [old.path]
    assert checkpoints.latest(linked)
    assert checkpoints.latest(closed)
    assert f"{linked.path} stays: it is a link" in caplog.text
    assert f"{closed.path} stays: Is a directory" in caplog.text


def test_a_folder_that_cannot_be_removed_keeps_no_other(
    tiny: dict[str, Any], root: Root, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    create_shards(make(tiny))
    for name in ("a", "b"):
        (root.shards / f".tmp-removed-{name}").mkdir()
        (root.shards / f".tmp-removed-{name}" / "file").touch()
    rests = [each for each in find_removable(root, days=30, runs=False) if each.kind == "rest"]
    real = os.unlink

    def refuse(path: Any, **more: Any) -> None:
        if str(path) == "file" and not (root.shards / ".tmp-removed-a" / "seen").exists():
            (root.shards / ".tmp-removed-a" / "seen").touch()
            raise PermissionError(1, "Operation not permitted", str(path))
        real(path, **more)

    monkeypatch.setattr(os, "unlink", refuse)
    assert [remove(each) for each in rests] == [False, True]
    assert "cannot be removed: [Errno 1] Operation not permitted" in caplog.text
    assert remove(rests[1]), "another cleaning was there first"
