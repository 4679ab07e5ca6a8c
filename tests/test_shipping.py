"""What a training sends to MLflow beside itself: everything, once, also after an absence and a kill."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import make
from object_store import Fault, Proxy
from processes import PROJECT, clean_environment, wait_for
from test_tracking import end, points, serve
from trainings import Undisturbed, begin, directory_of, ranks_alive, result, start, steps_done

from flows.__main__ import main
from flows.cli.services import free_port
from pipelines import checkpoints, tracking
from pipelines.durable_files import read_json
from pipelines.run_directory import Root, RunDirectory
from pipelines.runs import start_or_continue
from pipelines.storage import patience
from pipelines.tracking.connection import connected
from pipelines.training import launch
from pipelines.training.journal import Journal, read
from pipelines.training.shipping import Shipping


def steps_in_mlflow(run: RunDirectory) -> list[int]:
    """The steps of the checkpoints that MLflow has, by their manifests."""
    run_id = read_json(run.mlflow_file)["run_id"]
    with connected(run.root) as client:
        folders = [file.path for file in client.list_artifacts(run_id, "checkpoints")]
        contents = {folder: [file.path for file in client.list_artifacts(run_id, folder)] for folder in folders}
    return sorted(int(folder[-8:]) for folder, files in contents.items() if f"{folder}/checkpoint.json" in files)


def points_in_mlflow(run: RunDirectory, metric: str) -> list[int]:
    with connected(run.root) as client:
        return [point.step for point in client.get_metric_history(read_json(run.mlflow_file)["run_id"], metric)]


def test_every_checkpoint_reaches_mlflow_and_only_then_makes_room(tiny: dict[str, Any]):
    run = begin(make(tiny, training={"checkpoint_interval": 2, "keep_latest": 1, "validation_interval": 12}))
    warnings: list[str] = []
    with run.locked(wait=5) as lock, Shipping(run, warnings.append):
        launch.train(run, lock, on_line=print)
    assert warnings == []
    assert steps_in_mlflow(run) == [2, 4, 6, 8, 10, 12]
    assert checkpoints.steps_on_disk(run) == [12]
    assert points_in_mlflow(run, "train/loss") == list(range(1, 13))


@pytest.mark.parametrize("lost", ["a shard", "all"])
def test_what_became_of_the_shards_keeps_nothing_from_mlflow(
    tiny: dict[str, Any], empty_database: Path, lost: str, caplog: pytest.LogCaptureFixture
):
    run = begin(make(tiny))
    shutil.copy(empty_database, run.root.mlflow_database)
    with Journal(run.journal) as journal:
        journal.append(1, {"train/loss": 0.5})
    if lost == "all":
        shutil.rmtree(run.shard_set())
    else:
        next(run.shard_set().glob("train-*.tar")).unlink()
    tracking.bring_level(run)
    assert points_in_mlflow(run, "train/loss") == [1]
    with connected(run.root) as client:
        known = client.get_run(read_json(run.mlflow_file)["run_id"])
    assert known.info.status == "KILLED"
    fingerprint = read_json(run.shard_set_file)["fingerprint"]
    assert known.data.tags.get("codecmill.shard_set") == (None if lost == "all" else fingerprint)
    assert ("MLflow is not told which shard set 'tiny' has" in caplog.text) == (lost == "all")


class Broken(BaseHTTPRequestHandler):
    """A server that has lost its database, or its mind."""

    seconds = 0.0

    def answer(self) -> None:
        time.sleep(self.seconds)
        self.send_error(500)

    do_GET = do_POST = do_PUT = do_PATCH = answer

    def log_message(self, format: str, *args: Any) -> None:
        return


class Slow(Broken):
    seconds = 3600.0


class Nonsense(Broken):
    """No MLflow at all."""

    def answer(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"experiment": 1}')

    do_GET = do_POST = do_PUT = do_PATCH = answer


@contextmanager
def serving(handler: type[Broken] | None) -> Iterator[str]:
    """The address of such a server; without a handler, one where nobody listens."""
    if handler is None:
        yield "http://127.0.0.1:1"
        return
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_what_mlflows_client_never_thought_of_ends_nothing(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    run = begin(make(tiny, name="nonsense"))
    warnings: list[str] = []
    with serving(Nonsense) as address, run.locked():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with Shipping(run, warnings.append):
            pass
    (warning,) = warnings
    assert warning.startswith("MLflow gets what it is missing later: unexpected ")


def test_what_mlflow_does_not_take_is_tried_ever_more_rarely_until_it_takes_it(
    tiny: dict[str, Any], empty_database: Path, monkeypatch: pytest.MonkeyPatch
):
    run = begin(make(tiny))
    shutil.copy(empty_database, run.root.mlflow_database)
    shipping, waits = Shipping(run, print), []

    class Waiting(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            if len(waits) == 8:
                monkeypatch.delenv("MLFLOW_TRACKING_URI")
            return len(waits) == 10

    monkeypatch.setattr(shipping, "_ending", Waiting())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    shipping._work()
    assert waits == [5, 10, 20, 40, 80, 160, 160, 160, 5, 5]


@pytest.mark.full
@pytest.mark.usefixtures("used_root")
@pytest.mark.parametrize("handler", [None, Broken, Slow], ids=["refused", "500", "slow"])
def test_what_mlflow_missed_while_it_was_away_arrives_with_sync(
    tiny: dict[str, Any], tmp_path: Path, undisturbed: Undisturbed, handler: type[Broken] | None
):
    run = begin(make(tiny, name="away"))
    warnings: list[str] = []
    with serving(handler) as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", address)
        process = start(run)
        wait_for(lambda: steps_done(run) >= 6)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with run.locked(wait=30) as lock, Shipping(run, warnings.append):
            launch.train(run, lock, on_line=print)
    assert len(warnings) == 1, "an absence is said once"
    assert "MLflow gets what it is missing later" in warnings[0]
    assert result(run) == undisturbed(make(tiny))
    assert not run.mlflow_file.exists()

    sync = [sys.executable, "-m", "flows", "sync", "away", "--root", str(run.root.path)]
    for _ in range(2):
        done = subprocess.run(sync, cwd=PROJECT, env=clean_environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("MLflow has all of 'away', at sqlite:///")
        assert steps_in_mlflow(run) == checkpoints.steps_on_disk(run)
        assert points_in_mlflow(run, "train/loss") == [line["step"] for line in read(run.journal)] == list(range(1, 13))
    with connected(run.root) as client:
        assert client.get_run(read_json(run.mlflow_file)["run_id"]).info.status == "FINISHED"


@contextmanager
def held_still(run: RunDirectory) -> Iterator[int]:
    """Stop (SIGSTOP) the ranks, so that the training is under way however long something takes; yields its step."""
    stopped = ranks_alive(run)
    for process in stopped:
        os.kill(process, signal.SIGSTOP)
    try:
        yield steps_done(run)
    finally:
        for process in stopped:
            os.kill(process, signal.SIGCONT)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_server_that_goes_and_comes_back_in_mid_training_has_one_value_of_each_step(
    tiny: dict[str, Any], tmp_path: Path, empty_database: Path
):
    served = Root(tmp_path / "server")
    served.path.mkdir()
    shutil.copy(empty_database, served.mlflow_database)
    port = free_port()
    config = make(tiny, name="between", training={"steps": 600, "checkpoint_interval": 100, "validation_interval": 100})
    run = directory_of(config)
    (tmp_path / "config.json").write_text(config.model_dump_json())

    def losses() -> list[int]:
        return [step for key, step, _, _ in points(served) if key == "train/loss"]

    server, log = serve(served.path, port), tmp_path / "train.log"
    with log.open("wb") as output:
        training = subprocess.Popen(
            [sys.executable, "-m", "flows", "train", "--config", str(tmp_path / "config.json")],
            cwd=PROJECT,
            env=clean_environment() | {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_for(lambda: steps_done(run) >= 20, 120)
        with held_still(run):
            wait_for(lambda: bool(losses()), 120)
            end(server)
        before = max(losses())
        wait_for(lambda: steps_done(run) >= before + 200, 120)
        with held_still(run) as reached:
            assert before < reached < 600, "the training went on without a server, and is not done"
            assert max(losses()) == before
            # Shipping tries every few seconds; a fast machine takes its 200 steps between two attempts.
            wait_for(lambda: "MLflow gets what it is missing later" in log.read_text(), 60)
            server = serve(served.path, port)
            wait_for(lambda: max(losses()) >= reached, 120)
        assert training.wait(240) == 0, log.read_text()
    finally:
        if training.poll() is None:
            os.killpg(training.pid, signal.SIGKILL)
            training.wait()
        end(server)
    with sqlite3.connect(served.mlflow_database) as database:
        assert database.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
    rows = points(served)
    assert [point for point, count in Counter((key, step) for key, step, _, _ in rows).items() if count > 1] == []
    journal = [(key, line["step"], line[key]) for line in read(run.journal) for key in line if "/" in key]
    assert {step for key, step, _ in journal if key == "train/loss"} == set(range(1, 601))
    assert {step for key, step, _ in journal if key == "validation/psnr"} == set(range(100, 601, 100))
    assert [(key, step, value) for key, step, value, _ in rows] == sorted(journal)


def test_a_store_that_is_away_keeps_nothing_from_mlflow(
    tiny: dict[str, Any],
    empty_database: Path,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(patience, "USUAL_SECONDS", 0.2)
    run = start_or_continue(make(tiny, name="both"))
    shutil.copy(empty_database, run.root.mlflow_database)
    proxy.faults = [Fault("503", lambda method, path: True)]
    sync = ["sync", "both", "--root", str(run.root.path)]
    assert main(sync) == 1
    said = capsys.readouterr()
    assert re.search(r"codecmill: s3://.* could not be .* Service Unavailable", said.err)
    assert said.out == f"MLflow has all of 'both', at sqlite:///{run.root.mlflow_database}\n"
    assert run.mlflow_file.is_file()

    with serving(Broken) as address, monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", address)
        assert main(sync) == 1
    said = capsys.readouterr()
    assert re.search(r"codecmill: s3://.* could not be .*\n.*MLflow", said.err), "both are named"
    assert said.out == ""
