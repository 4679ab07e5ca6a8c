"""One machine at a time works on a run: who holds its lease in the store, who is refused, and who has lost it."""

import os
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import make
from object_store import BUCKET, Proxy, in_a_process, the_store
from processes import wait_for
from trainings import begin, beginnings, ranks_alive, steps_done

from pipelines import tracking
from pipelines.durable_files import read_json
from pipelines.errors import BusyError
from pipelines.run_directory import Root, RunDirectory
from pipelines.storage import StoreUnavailable, lease, patience
from pipelines.storage.bringing import catch_up
from pipelines.storage.keys import complete_steps
from pipelines.storage.lease import Lease, LostLease, lease_of, leased
from pipelines.storage.sending import Sending
from pipelines.tracking.connection import connected
from pipelines.tracking.killed import mark_all_killed
from pipelines.training import launch
from pipelines.training.shipping import Shipping


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 2.0)


def on(machine: Path, lost: Any = lambda: None, name: str = "r") -> Lease:
    """The lease of the same run on a machine, which is a root here."""
    run = Root(machine).run(name)
    run.path.mkdir(parents=True, exist_ok=True)
    return Lease(run, the_store(), lost)


@pytest.mark.timeout(60)
def test_a_lease_that_is_renewed_is_refused_to_others_and_free_when_it_is_let_go(
    tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 600.0)  # none of which is waited for
    here, there = on(tmp_path / "here"), on(tmp_path / "there")
    here.confirm()
    assert here.epoch == 1
    keeper = threading.Thread(target=here.keep)
    keeper.start()
    with pytest.raises(
        BusyError, match=rf"Run 'r' is in use by process {os.getpid()} on .*, says s3://.*/runs/r/lease"
    ):
        there.confirm()
    here.release()
    keeper.join()
    there.confirm()
    assert there.epoch == 2
    with pytest.raises(LostLease, match="was taken over by another machine while this one did not answer"):
        here.confirm()


def test_a_lease_in_a_bucket_that_encrypts_is_taken_again_and_again(tmp_path: Path, proxy: Proxy):
    """With a key of KMS, an ETag is no MD5 of the content."""
    from boto3 import client

    bucket = client("s3", endpoint_url=proxy.upstream)
    rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": "key"}}
    bucket.put_bucket_encryption(Bucket=BUCKET, ServerSideEncryptionConfiguration={"Rules": [rule]})
    try:
        for epoch in (1, 2):
            here = on(tmp_path / "here")
            here.confirm()
            about = the_store().find("runs/r/lease.json")
            assert (here.epoch, about and about.has_plain_etag) == (epoch, False)
            proxy.break_("lost", "PUT", "lease.json", times=1)
            here.confirm()
            here.release()
    finally:
        bucket.delete_bucket_encryption(Bucket=BUCKET)


def test_only_a_lease_that_another_machine_renews_is_anothers(tmp_path: Path, proxy: Proxy):
    here, there = on(tmp_path / "here"), on(tmp_path / "there")
    assert not here.is_anothers(), "nobody has it"
    there.confirm()
    assert not here.is_anothers(), "its holder is dead"
    keeper = threading.Thread(target=there.keep)
    keeper.start()
    assert here.is_anothers()
    assert not on(tmp_path / "there").is_anothers()
    there.release()
    keeper.join()
    assert not here.is_anothers(), "it was let go"


def test_a_silent_holder_loses_it_and_cannot_touch_it_any_more(tmp_path: Path, proxy: Proxy):
    lost = threading.Event()
    here, there = on(tmp_path / "here", lost.set), on(tmp_path / "there")
    here.confirm()
    begun = time.monotonic()
    there.confirm()
    assert 2.0 <= time.monotonic() - begun < 10
    here.keep()  # awake again
    assert lost.is_set()
    here.release()
    there.confirm()


def taken(run: RunDirectory) -> bool:
    """Whether another machine could take over, which it cannot at a moment in which this one says that it lives."""
    with suppress(BusyError):
        Lease(run, the_store()).confirm()
        return True
    return False


def test_a_run_that_was_lost_before_its_training_is_not_trained_here(
    tiny: dict[str, Any], tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.0)  # nobody looks whether it is held
    run = begin(make(tiny))
    with run.locked() as lock, leased(run):
        (there := tmp_path / "there" / "runs" / "tiny").mkdir(parents=True)
        wait_for(lambda: taken(RunDirectory(there)))
        wait_for(run.stop_request.exists)
        with pytest.raises(LostLease, match="Run 'tiny' was taken over by another machine"), Shipping(run, print):
            launch.train(run, lock, on_line=print)
    assert not run.logs.exists(), "no rank was started"
    with connected(run.root) as client:
        status = client.get_run(read_json(run.mlflow_file)["run_id"]).info.status
    assert status == "RUNNING", "as the other machine has it, for all that is known here"


@pytest.mark.timeout(60)
def test_the_same_machine_need_not_wait_for_its_dead(tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 600.0)
    on(tmp_path / "here").confirm()
    again = on(tmp_path / "here")
    again.confirm()
    assert again.epoch == 2


@pytest.mark.parametrize("differs", ["the volume", "the name"])
def test_another_container_on_the_same_machine_is_not_taken_for_a_dead_process_of_this_one(
    differs: str, tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    here = on(tmp_path / "root")
    here.confirm()
    if differs == "the volume":  # at the same path
        (tmp_path / "root").rename(tmp_path / "root of the other")
    else:
        monkeypatch.setattr(socket, "gethostname", lambda: "other")
    there = on(tmp_path / "root")
    keeper = threading.Thread(target=here.keep)
    keeper.start()
    try:
        with pytest.raises(BusyError, match=r"Run 'r' is in use by process"):
            there.confirm()
    finally:
        here.release()
        keeper.join()


def test_of_many_who_take_it_at_once_one_gets_it(tmp_path: Path, proxy: Proxy, caplog: pytest.LogCaptureFixture):
    leases = [on(tmp_path / str(number)) for number in range(6)]

    def take(each: Lease) -> bool:
        try:
            each.confirm()
        except BusyError:
            return False
        threading.Thread(target=each.keep, daemon=True).start()
        return True

    with ThreadPoolExecutor(6) as pool:
        taken = list(pool.map(take, leases))
    for each in leases:
        each.release()
    assert sum(taken) == 1
    assert "takes no conditions" not in caplog.text


def test_a_lost_answer_is_no_lost_lease(tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch):
    here = on(tmp_path / "here")
    proxy.break_("lost", "PUT", "lease.json", times=1)
    here.confirm()
    proxy.break_("lost", "PUT", "lease.json", times=1)
    here.confirm()
    assert [fault.met for fault in proxy.faults] == [1, 1]
    monkeypatch.setattr(patience, "USUAL_SECONDS", 0.2)
    there = on(tmp_path / "there")
    for each, epoch in ((here, 1), (there, 2)):
        proxy.break_("lost", "PUT", "lease.json")
        with pytest.raises(StoreUnavailable):
            each.confirm()
        proxy.faults.clear()
        each.confirm()
        assert each.epoch >= epoch
        each.release()


def test_a_store_that_takes_no_conditions_is_told_of_and_a_lost_lease_is_seen_all_the_same(
    tmp_path: Path, proxy: Proxy, caplog: pytest.LogCaptureFixture
):
    proxy.takes_conditions = False
    here, there = on(tmp_path / "here"), on(tmp_path / "there")
    here.confirm()
    assert "takes no conditions (If-Match): two machines that start this run in the same second" in caplog.text
    here.confirm()
    there.confirm()
    with pytest.raises(LostLease):
        here.confirm()


def test_nothing_is_sent_without_the_lease(
    tiny: dict[str, Any], tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(patience, "USUAL_SECONDS", 0.3)
    run = begin(make(tiny))
    other = on(tmp_path / "there", name="tiny")
    proxy.break_("503", "HEAD", "lease.json")
    with run.locked(), leased(run):  # the store is away: the run goes on
        held = lease_of(run)
        assert held is not None
        assert held.epoch == 0
        with pytest.raises(StoreUnavailable):
            Sending(run, the_store()).send()
        proxy.faults.clear()
        Sending(run, the_store()).send()
        assert held.epoch == 1
        held._ending.set()  # as a machine that sleeps
        time.sleep(0.5)
        other.confirm()
        proxy.requests.clear()
        with pytest.raises(LostLease):
            Sending(run, the_store()).send()
        assert proxy.count("PUT", "config.json") == 0
    assert lease_of(run) is None


TRAIN = """
import logging, sys
from pathlib import Path
from pipelines.run_directory import RunDirectory
from pipelines.storage import lease, patience
from pipelines.storage.bringing import catch_up
from pipelines.storage.lease import leased
from pipelines.training import launch
from pipelines.training.shipping import Shipping
from pipelines.training.uploading import Uploading
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
lease.RENEW_SECONDS, lease.LEASE_SECONDS, patience.USUAL_SECONDS = 0.5, 3.0, 1.0
directory = RunDirectory(Path(sys.argv[1]))
with directory.locked(wait=30) as lock, leased(directory):
    catch_up(directory)
    with Uploading(directory, warn=print):
        launch.train(directory, lock, on_line=lambda line: print(line, flush=True))
"""


def start(directory: RunDirectory) -> "subprocess.Popen[str]":
    return in_a_process(TRAIN, directory, stderr=subprocess.STDOUT)


def test_a_run_that_another_machine_has_taken_over_is_not_called_killed(
    tiny: dict[str, Any], tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    """Its processes here were killed; the other machine goes on with it in the same MLflow run."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/shared.db")
    run = begin(make(tiny))
    there = Root(tmp_path / "there").run("tiny")
    tracked = tracking.open_run(run, run.read_config())
    Sending(run, the_store()).send()

    def status() -> str:
        with connected(run.root) as client:
            return client.get_run(tracked.run_id).info.status

    with there.locked(), leased(there):
        catch_up(there)
        assert tracking.open_run(there, there.read_config()).run_id == tracked.run_id
        mark_all_killed(run.root, ["tiny"])
        assert status() == "RUNNING"
    mark_all_killed(run.root, ["tiny"])
    assert status() == "KILLED"


@pytest.mark.full
def test_a_machine_that_did_not_answer_for_some_time_stops_when_it_is_back(
    tiny: dict[str, Any], tmp_path: Path, proxy: Proxy
):
    run = begin(make(tiny, training={"steps": 1_000_000, "checkpoint_interval": 50, "validation_interval": 10**6}))
    there = Root(tmp_path / "there").run("tiny")
    first = start(run)
    second = None
    try:
        wait_for(lambda: complete_steps(the_store(), "tiny") != [], 60)
        wait_for(lambda: the_store().find(f"shards/{run.shard_set().name}/manifest.json") is not None, 60)
        refused, _ = start(there).communicate(timeout=60)
        assert "Run 'tiny' is in use by process" in refused
        os.kill(first.pid, signal.SIGSTOP)
        second = start(there)
        wait_for(lambda: beginnings(there) != [], 60)
        begun = steps_done(there)
        wait_for(lambda: steps_done(there) > begun + 100)
        os.kill(first.pid, signal.SIGCONT)
        woken = time.monotonic()
        said, _ = first.communicate(timeout=30)
        assert time.monotonic() - woken < 30
        assert "was taken over by another machine while this one did not answer" in said
        assert "Training was asked to stop and saved step" in said
        assert second.poll() is None
    finally:
        for process in (first, second):
            if process:
                process.kill()
                process.communicate()
        wait_for(lambda: not ranks_alive(run) and not ranks_alive(there))
