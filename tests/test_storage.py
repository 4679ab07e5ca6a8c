"""Runs and shard sets in a store: sent behind the training, resumed elsewhere to the same bits, never half believed."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import make, picture
from object_store import AWS, Fault, Kind, Proxy, in_a_process, the_store
from processes import PROJECT, clean_environment, wait_for
from test_checkpoints import save
from test_pipeline import under_way
from trainings import begin, directory_of, ranks_alive, result, steps_done, train

from flows.__main__ import main
from flows.cli.syncing import sync
from pipelines import checkpoints, storage, tracking
from pipelines.checkpoint_format import MANIFEST, WEIGHTS
from pipelines.data import other_manifests, shard_cache, shard_format
from pipelines.data.shard_set import ShardSet
from pipelines.doctor.object_store import examine_store
from pipelines.doctor.s3_server import examine_s3
from pipelines.durable_files import write_json
from pipelines.errors import CodecmillError, DiskFullError, InputError
from pipelines.file_digests import file_sha256
from pipelines.provenance.explaining import explain
from pipelines.provenance.locating import find
from pipelines.provenance.reproducing import reproduce
from pipelines.provenance.verifying import verify
from pipelines.run_directory import Root, RunDirectory
from pipelines.status import run_status
from pipelines.storage import DamagedObject, MissingObject, StoreUnavailable, objects, patience, s3
from pipelines.storage.bringing import bring, catch_up
from pipelines.storage.keys import complete_steps
from pipelines.storage.sending import Sending
from pipelines.storage.sending_sets import send_shard_set
from pipelines.storage.store import open_store
from pipelines.tracking.marks import Marks, read_marks, write_marks
from pipelines.training import launch
from pipelines.training.journal import Journal

TRAIN = """
import sys
from pathlib import Path
from pipelines.run_directory import RunDirectory
from pipelines.storage.bringing import catch_up
from pipelines.training import launch
from pipelines.training.journal import Journal
from pipelines.training.uploading import Uploading
from pipelines.storage import patience
patience.USUAL_SECONDS = 2.0
directory = RunDirectory(Path(sys.argv[1]))
with directory.locked(wait=30) as lock:
    catch_up(directory)
    with Uploading(directory, warn=lambda text: print("WARNING", text, flush=True)):
        launch.train(directory, lock, on_line=lambda line: print(line, flush=True))
"""


def start(directory: RunDirectory) -> "subprocess.Popen[str]":
    """A training with its uploads."""
    return in_a_process(TRAIN, directory)


@pytest.fixture
def run(tiny: dict[str, Any]) -> RunDirectory:
    """A run with a config, a shard set, a journal and three checkpoints, none of which any step was trained for."""
    run = begin(make(tiny, training={"keep_latest": 5}))
    for step in (5, 10, 12):
        save(run, step, best={"step": 5, "psnr": 30.0})
    with Journal(run.journal) as journal:
        for step in range(1, 14):
            journal.append(step, {"train/loss": 1 / step})
    return run


def elsewhere(tmp_path: Path) -> RunDirectory:
    return Root(tmp_path / "elsewhere").run("tiny")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def files_of(run: RunDirectory) -> dict[str, bytes]:
    return {str(file.relative_to(run.path)): file.read_bytes() for file in run.path.rglob("*") if file.is_file()}


def test_a_run_is_sent_once_and_brought_as_it_was(run: RunDirectory, tmp_path: Path, proxy: Proxy):
    store = the_store()
    Sending(run, store).send()
    assert complete_steps(store, "tiny") == [5, 12]  # the newest, and the best that it names
    kept = {each.key for each in store.list("")}
    assert {f"runs/tiny/{name}" for name in ("config.json", "shard_set.json", "metrics.jsonl")} < kept
    rows = ShardSet.open(run.shard_set()).manifest.shards
    assert sum(key.startswith("shards/") for key in kept) == 1 + 3 * len(rows)
    proxy.requests.clear()
    Sending(run, store).send()
    assert proxy.count("PUT", "") == 0

    there = elsewhere(tmp_path)
    with there.locked():
        brought = bring(there, store)
        assert brought is not None
        assert brought.step == 12
        assert bring(there, store) is None
    assert checkpoints.steps_on_disk(there) == [5, 12]
    for step in (5, 12):
        assert contents(checkpoints.folder_of(there, step)) == contents(checkpoints.folder_of(run, step))
    assert there.journal.read_bytes() == run.journal.read_bytes()
    assert there.read_config() == run.read_config().model_copy(update={"root": tmp_path / "elsewhere"})
    assert not list(there.shard_set().glob("*.tar"))
    save(run, 15)
    config = run.read_config()
    run.write_config(config.model_copy(update={"training": config.training.model_copy(update={"steps": 15})}))
    Sending(run, store).send()
    with there.locked():
        assert (brought := bring(there, store)) and brought.step == 15
    assert there.read_config().training.steps == 15


def test_which_mlflow_run_it_is_goes_along_where_mlflow_is_the_same(
    run: RunDirectory, tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    marks = Marks(run_id="1f", experiment_id="1", tracking_uri="http://mlflow.here:5000", journal_step=13)
    write_marks(run, marks)
    Sending(run, the_store()).send()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.there:5000")
    bring(Root(tmp_path / "another").run("tiny"), the_store())
    assert not Root(tmp_path / "another").run("tiny").mlflow_file.exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.here:5000")
    bring(elsewhere(tmp_path), the_store())
    assert read_marks(elsewhere(tmp_path)) == marks


def test_manifests_are_sent_when_all_else_is_there(run: RunDirectory, proxy: Proxy):
    Sending(run, the_store()).send()
    puts = [path.partition("?")[0] for method, path in proxy.requests if method == "PUT"]
    checkpoint = [path for path in puts if "step_00000012/" in path]
    assert checkpoint[-1].endswith("checkpoint.json") and len(checkpoint) == 4
    assert puts.index(checkpoint[-1]) > puts.index(next(path for path in puts if path.endswith("metrics.jsonl")))
    shards = [path for path in puts if "/shards/" in path]
    assert shards[-1].endswith("manifest.json")
    assert puts.index(checkpoint[-1]) < puts.index(shards[0])


def test_what_is_looked_at_offline_is_looked_at_without_the_store(run: RunDirectory, tmp_path: Path, proxy: Proxy):
    save(run, 20, shard_set=ShardSet.open(run.shard_set()).fingerprint)
    Sending(run, the_store()).send()
    there = elsewhere(tmp_path)
    with there.locked():
        bring(there, the_store())
    ShardSet.open(there.shard_set()).read("train", 0, 0)
    proxy.requests.clear()
    found = run_status(there)
    assert (found.step, found.problems, found.stages[0].state) == (20, (), "done")
    explained = explain(find("tiny", there.root, tmp_path, every=False), 3)
    assert explained.shard_set.path == there.shard_set()
    assert explained.shard_set.problem is not None
    assert f"lies in {storage.store_url()}/shards/" in explained.shard_set.problem
    verified = verify(find(str(checkpoints.folder_of(there, 20)), there.root, tmp_path, every=True))
    assert verified.problems == ()
    assert any(" shards of " in note and " only, and were not read." in note for note in verified.notes)
    assert proxy.requests == []


def test_a_checkpoint_that_is_not_what_was_saved_is_passed_over_for_the_one_before(
    run: RunDirectory, tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    impatient(monkeypatch)
    store = the_store()
    save(run, 15, best={"step": 10, "psnr": 31.0})
    sending = Sending(run, store)
    sending.send()
    for step in (5, 12):
        sending._send_checkpoint(step)
    assert complete_steps(store, "tiny") == [5, 10, 12, 15]
    for step, altered in ((15, WEIGHTS), (12, MANIFEST)):
        content = bytearray((checkpoints.folder_of(run, step) / altered).read_bytes())
        content[-9] ^= 4
        (tmp_path / "altered").write_bytes(content)
        store.send(tmp_path / "altered", f"runs/tiny/checkpoints/step_{step:08d}/{altered}")
    store.remove("runs/tiny/checkpoints/step_00000010/training_state.json")
    there = elsewhere(tmp_path)
    with there.locked():
        brought = bring(there, store)
    assert brought is not None
    assert brought.step == 5
    assert checkpoints.steps_on_disk(there) == [5]
    skipped = [line for line in caplog.messages if line.startswith("Skipping a checkpoint in the store: ")]
    assert len(skipped) == 3
    assert "and at last it was changed: its sha256 is" in skipped[0]
    assert "was altered after it was written" in skipped[1]
    assert "there is no such object" in skipped[2]


def test_a_store_that_is_away_is_an_error_only_where_nothing_is_here(
    run: RunDirectory,
    tmp_path: Path,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    impatient(monkeypatch)
    proxy.break_("503", "GET", "")
    proxy.break_("503", "HEAD", "")
    there = elsewhere(tmp_path)
    with (
        there.locked(),
        pytest.raises(StoreUnavailable, match=r"config.json could not be read, \d times in \d s: Serv"),
    ):
        catch_up(there)
    with run.locked():
        catch_up(run)
    assert "Going on with what is here of the run: s3://" in caplog.text


@pytest.mark.parametrize(
    ("sections", "difference"),
    [
        ({"seed": 7}, "seed 7 here, 0 there"),
        ({"training": {"learning_rate": 0.5}}, r"training.learning_rate 0.5 here, 0.0\d+ there"),
        ({"data": {"patch_size": 24}}, "data.patch_size 24 here, 32 there; shard set .* here, .* there"),
    ],
)
def test_another_run_of_the_same_name_is_neither_taken_over_nor_written_over(
    run: RunDirectory, tiny: dict[str, Any], tmp_path: Path, proxy: Proxy, sections: dict[str, Any], difference: str
):
    store = the_store()
    Sending(run, store).send()
    other = begin(make(tiny, root=str(tmp_path / "elsewhere"), **sections))
    save(other, 99)  # further than what is there
    here, there = files_of(other), {each.key: each.etag for each in store.list("")}
    advice = "Give one of them another --name, or this root another store"
    for attempt in (lambda: catch_up(other), lambda: Sending(other, store).send()):
        with pytest.raises(InputError, match=rf"has another run called 'tiny': ({difference})\. {advice}"):
            attempt()
    assert files_of(other) == here
    assert {each.key: each.etag for each in store.list("")} == there


def of_two_machines(tiny: dict[str, Any], photos: Path, tmp_path: Path) -> tuple[RunDirectory, RunDirectory]:
    """Runs 'a' and 'b' with sets of the same images, which lie elsewhere on the second one."""
    shutil.copytree(photos, tmp_path / "photos of b")
    a = begin(make(tiny, name="a", root=str(tmp_path / "a")))
    return a, begin(make(tiny, name="b", root=str(tmp_path / "b"), data={"images": str(tmp_path / "photos of b")}))


def test_a_set_that_two_machines_made_of_images_in_other_places_is_one_in_their_store(
    tiny: dict[str, Any], photos: Path, tmp_path: Path, proxy: Proxy
):
    """It has the same tars, and two manifests: whoever reads by the first goes on, and checkpoints may name either."""
    store = the_store()
    a, b = of_two_machines(tiny, photos, tmp_path)
    train(b)
    manifests = [file_sha256(run.shard_set() / shard_format.MANIFEST) for run in (a, b)]
    assert a.shard_set().name == b.shard_set().name and manifests[0] != manifests[1]
    Sending(a, store).send()
    sent = {each.key: each.etag for each in store.list("shards/")}
    for run in (b, a, b):
        Sending(run, store).send()
    now = {each.key: each.etag for each in store.list("shards/")}
    assert {key: etag for key, etag in now.items() if key in sent} == sent, "nothing is written over"
    assert set(now) - set(sent) == {f"shards/{a.shard_set().name}/manifests/{manifests[1]}.json"}

    with (brought := Root(tmp_path / "b").run("a")).locked():
        bring(brought, store)
    assert other_manifests.is_known_as(b.shard_set(), manifests[0]), "where the set was made already, too"

    d = Root(tmp_path / "d").run("b")
    with d.locked():
        assert bring(d, store) is not None
    assert file_sha256(d.shard_set() / shard_format.MANIFEST) == manifests[0]
    found = find("b", d.root, tmp_path)
    assert verify(found).problems == ()
    assert reproduce(found, lambda line: None).differing == ()
    (other := next((d.shard_set() / "manifests").iterdir())).write_bytes(other.read_bytes().replace(b"a", b"b", 1))
    (problem,) = verify(found).problems
    assert problem.file == d.shard_set() / shard_format.MANIFEST


def test_of_two_machines_that_send_the_same_set_at_once_one_sends_what_names_places(
    tiny: dict[str, Any], photos: Path, tmp_path: Path, proxy: Proxy
):
    store = the_store()
    a, b = of_two_machines(tiny, photos, tmp_path)
    begun: list[None] = []

    def meanwhile() -> None:
        if not begun:
            begun.append(None)
            send_shard_set(store, b.shard_set())

    send_shard_set(store, a.shard_set(), between=meanwhile)
    there = {each.key.rpartition("/")[2]: each for each in store.list("shards/")}
    for name, _, digest in (each for row in ShardSet.open(b.shard_set()).manifest.shards for each in row.files()):
        sent = store.find(there[name].key)
        assert sent is not None and sent.sha256 == digest
    of_a = file_sha256(a.shard_set() / shard_format.MANIFEST)
    assert f"{of_a}.json" in there, "its checkpoints name the set by it"


def test_the_same_run_under_way_on_other_hardware_is_no_other(
    run: RunDirectory, tiny: dict[str, Any], tmp_path: Path, proxy: Proxy
):
    Sending(run, the_store()).send()
    elsewhere_too = make(tiny, root=str(tmp_path / "elsewhere"), training={"processes": 2, "steps": 20, "threads": 2})
    other = begin(elsewhere_too)
    catch_up(other)
    assert checkpoints.steps_on_disk(other) == [5, 12]


def test_a_fingerprint_from_a_store_leads_to_no_other_folder(run: RunDirectory, tmp_path: Path, proxy: Proxy):
    store = the_store()
    Sending(run, store).send()
    (precious := tmp_path / "precious").mkdir()
    (precious / "photo.jpg").touch()
    write_json(tmp_path / "shard_set.json", {"fingerprint": "../../precious", "path": "x"})
    store.send(tmp_path / "shard_set.json", "runs/tiny/shard_set.json")
    store.send(next(run.root.shards.glob("*/manifest.json")), "shards/precious/manifest.json")
    with pytest.raises(CodecmillError, match=r"names no shard set: '../../precious' is no fingerprint"):
        catch_up(elsewhere(tmp_path))
    assert [file.name for file in precious.iterdir()] == ["photo.jpg"]


def test_a_set_that_lies_in_another_store_is_not_taken_for_sent(run: RunDirectory, tmp_path: Path, proxy: Proxy):
    Sending(run, the_store()).send()
    there = elsewhere(tmp_path)
    catch_up(there)
    other = open_store(f"{the_store().url}/other")
    with pytest.raises(
        CodecmillError, match=r"lies in s3://.*, and only some of it is here. Copy it to s3://.*/other/"
    ):
        Sending(there, other).send()
    for row in ShardSet.open(run.shard_set()).manifest.shards:
        for name, _, _ in row.files():
            shutil.copyfile(run.shard_set() / name, there.shard_set() / name)
    Sending(there, other).send()
    assert other.find(f"shards/{run.shard_set().name}/manifest.json") is not None


def test_the_store_keeps_of_a_run_what_its_disk_keeps(run: RunDirectory, proxy: Proxy):
    config = run.read_config()
    run.write_config(config.model_copy(update={"training": config.training.model_copy(update={"keep_latest": 2})}))
    store, sending = the_store(), Sending(run, the_store())
    for step in (15, 20, 25, 30):
        save(run, step, best={"step": 10, "psnr": 31.0})
        sending.send()
    assert complete_steps(store, "tiny") == [10, 25, 30]
    assert not list(store.list("runs/tiny/checkpoints/step_00000015/"))


def test_what_is_gone_of_a_checkpoint_in_the_store_is_sent_again(run: RunDirectory, tmp_path: Path, proxy: Proxy):
    store = the_store()
    Sending(run, store).send()
    for step in (5, 12):
        store.remove(f"runs/tiny/checkpoints/step_{step:08d}/{WEIGHTS}")
    Sending(run, store).send()
    there = elsewhere(tmp_path)
    catch_up(there)
    for step in (5, 12):
        assert contents(checkpoints.folder_of(there, step)) == contents(checkpoints.folder_of(run, step))


def test_nothing_stays_of_a_checkpoint_that_was_sent_by_half(
    run: RunDirectory, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    impatient(monkeypatch)
    fault = proxy.break_("503", "PUT", "step_00000012/training_state")
    sending, store = Sending(run, the_store()), the_store()
    with pytest.raises(StoreUnavailable):
        sending.send()
    assert fault.met and [*store.list("runs/tiny/checkpoints/step_00000012/")]
    save(run, 15, best={"step": 5, "psnr": 30.0})  # overtaken
    sending.send()
    assert complete_steps(store, "tiny") == [5, 15]
    assert not [*store.list("runs/tiny/checkpoints/step_00000012/")]


def test_a_machine_that_is_behind_takes_nothing_back(
    run: RunDirectory, tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    """Here it ended; elsewhere it was extended, and that machine was lost after its first checkpoint, or before."""
    monkeypatch.setattr(tracking, "bring_level", lambda run, **_: None)
    Sending(run, the_store()).send()
    there = elsewhere(tmp_path)
    catch_up(there)
    config = there.read_config()

    def extended(steps: int) -> None:
        there.write_config(config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})}))
        Sending(there, the_store()).send()

    for steps, saved in ((2000, []), (3000, [20])):
        for step in saved:
            save(there, step, best={"step": 5, "psnr": 30.0})
        extended(steps)
        sync(run)
        assert the_store().read_object("runs/tiny/config.json")["training"]["steps"] == steps
        assert run.read_config().training.steps == steps
    assert checkpoints.steps_on_disk(run)[-1] == 20


@pytest.mark.parametrize("saved", [[], [20]])
def test_what_began_while_the_store_was_away_sends_nothing_that_is_older(
    run: RunDirectory, tmp_path: Path, proxy: Proxy, saved: list[int]
):
    store = the_store()
    Sending(run, store).send()
    there = elsewhere(tmp_path)
    catch_up(there)
    config = there.read_config()
    there.write_config(config.model_copy(update={"training": config.training.model_copy(update={"steps": 20})}))
    with Journal(there.journal, 12) as journal:
        journal.append(13, {"train/loss": 0.0})
    for step in saved:
        save(there, step, best={"step": 5, "psnr": 30.0})
    Sending(there, store).send()
    before = {each.key: store.read(each.key) for each in store.list("runs/tiny/")}
    sending = Sending(run, store)
    sending.send()
    assert {each.key: store.read(each.key) for each in store.list("runs/tiny/")} == before
    run.write_config(there.read_config())
    save(run, 20, best={"step": 5, "psnr": 30.0})  # it has come as far
    sending.send()
    assert complete_steps(store, "tiny")[-1] == 20


def test_a_full_disk_ends_the_bringing_of_a_run_instead_of_beginning_it_anew(
    run: RunDirectory, tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    Sending(run, the_store()).send()
    fetch, there = s3.S3.fetch, elsewhere(tmp_path)

    def full(self: s3.S3, key: str, *rest: Any) -> None:
        if "checkpoints/" in key:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fetch(self, key, *rest)

    monkeypatch.setattr(s3.S3, "fetch", full)
    with pytest.raises(DiskFullError, match="There is no room in "):
        catch_up(there)
    assert not there.config_file.exists()


@pytest.mark.parametrize("url", ["s3://photos[ab]/x", "s3://[bucket]/x", "s3://photos-*/x", "s3://a/x?y", "s3:///x"])
def test_what_is_no_address_is_one_sentence(url: str):
    with pytest.raises(InputError, match=r"The store is 's3://.*', which is no address such as s3://bucket or"):
        open_store(url)


def test_the_checkpoint_that_a_loss_takes_the_run_back_to_goes_along(run: RunDirectory, tmp_path: Path, proxy: Proxy):
    config = run.read_config()
    run.write_config(config.model_copy(update={"training": config.training.model_copy(update={"keep_latest": 1})}))
    for step in (9, 10, 11, 12):  # the run was stopped after 11 steps, and after 12
        training = {"on_nonfinite": "rollback", "checkpoint_interval": 5}
        save(run, step, best={"step": 5, "psnr": 30.0}, training=training)
    sending = Sending(run, the_store())
    sending.send()
    assert complete_steps(the_store(), "tiny") == [5, 10, 12]
    sending._send_checkpoint(11)
    there = elsewhere(tmp_path)
    with there.locked():
        bring(there, the_store())
    assert checkpoints.steps_on_disk(there) == [5, 10, 12], "what a stop has left in between stays where it is"
    found = checkpoints.latest_regular(there)
    assert found is not None
    assert found.step == 10


def test_the_best_that_failed_after_the_newest_is_sent_next_time(
    run: RunDirectory, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    impatient(monkeypatch)
    proxy.break_("503", "PUT", "step_00000005/")
    with pytest.raises(StoreUnavailable, match=r"step_00000005/.* could not be sent"):
        Sending(run, the_store()).send()
    assert complete_steps(the_store(), "tiny") == [12]
    proxy.faults.clear()
    Sending(run, the_store()).send()  # of another process: the first was killed, say
    assert complete_steps(the_store(), "tiny") == [5, 12]
    assert "is not sent" not in caplog.text


def test_a_best_that_is_damaged_or_gone_here_is_not_tried_again_and_again(
    run: RunDirectory, proxy: Proxy, caplog: pytest.LogCaptureFixture
):
    (checkpoints.folder_of(run, 5) / WEIGHTS).write_bytes(b"")
    sending = Sending(run, the_store())
    for _ in range(3):
        sending.send()
    assert caplog.text.count("A checkpoint is not sent to the store: ") == 1
    shutil.rmtree(checkpoints.folder_of(run, 5))
    Sending(run, the_store()).send()
    assert caplog.text.count("A checkpoint is not sent to the store: ") == 1
    assert complete_steps(the_store(), "tiny") == [12]


def test_a_checkpoint_that_the_training_deletes_meanwhile_is_sent_to_its_end(
    run: RunDirectory, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    send_file = storage.Store.send

    def send(self: storage.Store, file: Path, *rest: Any) -> bool:
        shutil.rmtree(checkpoints.folder_of(run, 12), ignore_errors=True)
        return send_file(self, file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(storage.Store, "send", send)
        Sending(run, the_store())._send_checkpoints()
    assert 12 in complete_steps(the_store(), "tiny")
    assert not list(run.checkpoints.glob(".tmp-*"))


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "USUAL_SECONDS", 0.2)
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(s3, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(s3, "SLOWEST", 2**30)


@contextmanager
def fresh_connection() -> Iterator[None]:
    """Read the environment's keys anew."""
    s3._connection.cache_clear()
    yield
    s3._connection.cache_clear()


FETCH = "x/object could not be fetched, "
SEND = "x/object could not be sent, "


@pytest.mark.parametrize(
    ("kind", "of_fetch", "of_send"),
    [
        pytest.param(
            "500",
            f"{FETCH}.*: Internal Server Error. Look at",
            f"{SEND}.*: Internal Server Error. Look at",
            marks=pytest.mark.full,
        ),
        ("503", f"{FETCH}.*: Service Unavailable. Look at", f"{SEND}.*: Service Unavailable. Look at"),
        pytest.param("close", f"{FETCH}.*Connection was", f"{SEND}.*Connection was", marks=pytest.mark.full),
        pytest.param("stall", f"{FETCH}.*: it stalled. Look", f"{SEND}.*: it stalled", marks=pytest.mark.full),
        pytest.param("trickle", f"{FETCH}.*: it stalled. Look at", None, marks=pytest.mark.full),
        ("half", f"{FETCH}.*Response payload is not completed", None),
        (
            "flip",
            "was fetched \\d times in .*damaged on the way",
            "was sent \\d times in .*had ETag .* afterwards instead of",
        ),
    ],
)
def test_a_store_that_fails_is_tried_again_and_then_named(
    kind: Kind, of_fetch: str, of_send: str | None, tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    impatient(monkeypatch)
    store = the_store()
    content = hashlib.shake_256(b"object").digest(300_000)
    (file := tmp_path / "object").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    store.send(file, "x/object")
    target = tmp_path / "target"

    def fetch() -> None:
        store.fetch("x/object", target, len(content), sha256)

    proxy.break_(kind, "GET", "x/object", times=1)
    fetch()
    assert target.read_bytes() == content
    target.unlink()
    fault = proxy.break_(kind, "GET", "x/object")
    with pytest.raises((StoreUnavailable, DamagedObject), match=of_fetch):
        fetch()
    assert fault.met >= patience.LEAST_TRIES
    assert [each.name for each in tmp_path.iterdir()] == ["object"]
    proxy.faults.clear()
    if of_send is not None:
        store.remove("x/object")
        proxy.break_(kind, "PUT", "x/object", times=1)
        assert store.send(file, "x/object")
        store.remove("x/object")
        proxy.break_(kind, "PUT", "x/object")
        with pytest.raises((StoreUnavailable, DamagedObject), match=of_send):
            store.send(file, "x/object")


def test_what_answers_otherwise_than_s3_is_no_store(proxy: Proxy, monkeypatch: pytest.MonkeyPatch):
    """A console's address, or a proxy's page while the store is mended: each with a 200."""
    impatient(monkeypatch)
    store = the_store()
    for method in ("HEAD", "GET", "PUT"):
        proxy.break_("page", method, "")
    for ask in (
        lambda: store.find("x"),
        lambda: list(store.list("")),
        lambda: store.write_if("x", b"content", None),
    ):
        with pytest.raises(StoreUnavailable, match="what answers there does not answer as S3 does"):
            ask()


def test_what_this_disk_refuses_is_no_fault_of_a_key():
    refused = PermissionError(errno.EACCES, "Permission denied", "/images/x")
    with pytest.raises(CodecmillError) as said:
        patience.patiently("s3://bucket/x", "fetched", lambda: (_ for _ in ()).throw(refused))
    assert str(said.value) == "s3://bucket/x could not be fetched: /images/x: Permission denied."


def test_what_no_further_try_changes_is_said_at_once(
    tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (file := tmp_path / "object").write_bytes(b"object")
    with pytest.raises(
        MissingObject, match="s3://nowhere/x could not be sent: there is no such object, or no such bucket"
    ):
        storage.open_store("s3://nowhere").send(file, "x")
    with pytest.raises(MissingObject, match="could not be read: there is no such object"):
        the_store().read("nothing")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with (
        fresh_connection(),
        pytest.raises(
            storage.StoreError, match=r"Unable to locate credentials. Look at AWS_ACCESS_KEY_ID, AWS_SECRET_"
        ),
    ):
        the_store().find("x")
    for url, why in (
        ("s3://key:secret@bucket/x", "holds a key or password, which would end in logs"),
        ("/srv/store", "no address such as s3://bucket"),
        ("s3://", "no address such as"),
    ):
        assert main(["run", "--store", url]) == 2
        said = capsys.readouterr().err
        assert why in said and "secret@" not in said


@pytest.mark.full
def test_parts_of_a_large_object_are_put_together_again(tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(objects, "PART_BYTES", 5 * 2**20)
    content = hashlib.shake_256(b"large").digest(5 * 2**20) * 2 + b"rest"
    (file := tmp_path / "large").write_bytes(content)
    proxy.break_("500", "PUT", "partNumber=2", times=1)
    assert the_store().send(file, "large")
    assert proxy.count("PUT", "partNumber") >= 4
    assert not the_store().send(file, "large")
    the_store().fetch("large", tmp_path / "again", len(content), hashlib.sha256(content).hexdigest())
    assert (tmp_path / "again").read_bytes() == content


LONG = {"steps": 600, "checkpoint_interval": 50, "validation_interval": 200}


@pytest.mark.full
def test_a_training_outlives_the_absence_of_its_store_which_then_gets_all(
    tiny: dict[str, Any], tmp_path: Path, proxy: Proxy
):
    run = begin(make(tiny, training=LONG | {"steps": 3000, "checkpoint_interval": 100}))
    process = start(run)
    wait_for(lambda: complete_steps(the_store(), "tiny") != [], 60)
    proxy.faults += [
        Fault(kind, lambda method, path, n=n: len(path) % 2 == n) for n, kind in enumerate(("503", "close"))
    ]
    reached = steps_done(run)
    wait_for(lambda: steps_done(run) > reached + 500, 60)
    assert process.poll() is None and process.stdout
    out = ""
    while "gets what it is missing later" not in out:
        line = process.stdout.readline()
        assert line, "the absence was told before the end"
        out += line
    proxy.faults.clear()
    out += process.communicate(timeout=200)[0]
    assert process.returncode == 0
    assert out.count("WARNING The store gets what it is missing later, or by codecmill sync tiny --root ") == 1
    assert complete_steps(the_store(), "tiny")[-1] == 3000


@pytest.mark.full
def test_two_ranks_on_a_cache_smaller_than_the_shards_train_to_the_same_bits(
    tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, Any]
):
    (pictures := tmp_path / "pictures").mkdir()
    for number in range(64):
        picture(number, 256, 192).save(pictures / f"photo {number:02d}.png")
    data = {"images": str(pictures), "max_shard_mib": 1, "shuffle_window": 2, "patch_size": 64}
    training = LONG | {"processes": 2, "virtual_ranks": 2, "steps": 150}
    alone = begin(make(tiny, name="alone", data=data, training=training))
    train(alone)
    with (run := begin(make(tiny, data=data, training=training))).locked(wait=5) as lock:
        launch.train(run, lock, on_line=print, until=20)
    Sending(run, the_store()).send()
    rows = ShardSet.open(run.shard_set()).manifest.shards
    limit = 3 * max(row.bytes for row in rows)
    assert sum(row.bytes for row in rows) > 2 * limit
    monkeypatch.setenv(shard_cache.CACHE_BYTES, str(limit))
    there = elsewhere(tmp_path)
    process = start(there)
    largest = 0
    while process.poll() is None:
        folder = tmp_path / "elsewhere" / "shards" / run.shard_set().name
        largest = max(largest, sum(size_of_file(file) for file in folder.glob("*.tar*") if file.suffix != ".lock"))
        time.sleep(0.005)
    print(process.communicate()[0])
    assert 0 < largest <= limit
    assert {name: value for name, value in result(there).items() if name != "journal"} == {
        name: value for name, value in result(alone).items() if name != "journal"
    }


def size_of_file(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.full
def test_the_command_goes_on_on_another_machine_to_the_report_and_the_registered_version(
    tiny: dict[str, Any], tmp_path: Path, proxy: Proxy
):
    config = make(tiny, training=LONG | {"steps": 1500})
    alone = begin(make(tiny, name="alone", training=LONG | {"steps": 1500}))
    train(alone)
    expected = result(alone)
    with under_way(config, tmp_path, "run") as process:
        run = directory_of(config)
        wait_for(lambda: complete_steps(the_store(), "tiny") != [] and steps_done(run) > 300, 120)
        wait_for(lambda: the_store().find(f"shards/{run.shard_set().name}/manifest.json") is not None)
        process.kill()
        process.wait()
        wait_for(lambda: not ranks_alive(run), 30)
    assert steps_done(run) < 1500
    shutil.rmtree(tmp_path / "root")
    done = subprocess.run(
        [sys.executable, "-m", "flows", "resume", "tiny", "--root", str(tmp_path / "elsewhere")],
        cwd=PROJECT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "what it is missing later" not in done.stderr, "the store got all at once"
    there = elsewhere(tmp_path)
    assert result(there) == expected
    assert run_status(there).state == "done"
    for secret in (AWS["AWS_SECRET_ACCESS_KEY"],):
        for file in (tmp_path / "elsewhere").rglob("*"):
            assert not file.is_file() or secret.encode() not in file.read_bytes(), file


def test_the_doctor_looks_at_the_store(proxy: Proxy, monkeypatch: pytest.MonkeyPatch):
    impatient(monkeypatch)
    assert [(each.about, each.state) for each in examine_store()] == [("store", "good"), ("lease", "good")]
    assert list(the_store().list("")) == []
    assert list(examine_s3()) == [], "it is not asked twice"
    proxy.takes_conditions = False
    assert [(each.about, each.state) for each in examine_store()] == [("store", "good"), ("lease", "note")]
    proxy.break_("500", "PUT", "")
    (found,) = examine_store()
    assert found.state == "fault"
    assert "could not be written, " in found.text
    assert found.remedy.startswith("Look at the store (AWS_ENDPOINT_URL, network)")
    monkeypatch.setenv(storage.STORE, "gs://elsewhere")
    (found,) = examine_store()
    assert "is 'gs://elsewhere', which is no address" in found.text
    monkeypatch.delenv(storage.STORE)
    assert [each.state for each in examine_store()] == ["good"]
