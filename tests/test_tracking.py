"""MLflow as a view of run directories, against real MLflow: SQLite files, and one server over HTTP."""

import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, ClassVar, cast

import pytest
import requests
import torch
from botocore.exceptions import ClientError, ConnectionClosedError, EndpointConnectionError, ReadTimeoutError
from object_store import Kind, Proxy, proxy_to
from PIL import Image
from processes import PROJECT

from flows.cli.services import free_port
from pipelines import checkpoint_format, checkpoints, registration, tracking
from pipelines.codec import decode, encode
from pipelines.codec.container import parse
from pipelines.codec.opening import codec_that_wrote, open_codec
from pipelines.config import EvaluationConfig, RunConfig
from pipelines.data.shard_set import ShardSet
from pipelines.doctor.servers import examine_mlflow
from pipelines.durable_files import read_json, write_json
from pipelines.errors import CodecmillError, InputError
from pipelines.model.build import build_model
from pipelines.promotion import Decision, Scores
from pipelines.provenance.locating import find
from pipelines.provenance.verifying import verify
from pipelines.run_directory import Root, RunDirectory
from pipelines.tracking.connection import REQUEST_SECONDS, connected, patience_for
from pipelines.tracking.killed import mark_all_killed
from pipelines.tracking.lines import read_lines
from pipelines.tracking.marks import unsent_checkpoints
from pipelines.training.journal import Journal
from pipelines.versions import git_commit

if TYPE_CHECKING:
    from mlflow import MlflowClient

FINGERPRINT = "f" * 64
TEST_SET = "7" * 64


@pytest.fixture
def root(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "my data"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    return Root(folder)


def make_run(root: Root, name: str = "first", **changes: object) -> tuple[RunDirectory, RunConfig]:
    run, config = root.run(name), RunConfig.model_validate({"name": name, "root": root.path, **changes})
    run.write_config(config)
    return run, config


def client_of(root: Root) -> "MlflowClient":
    with connected(root) as client:
        return client


def points(root: Root) -> list[tuple[str, int, float, int]]:
    """Every metric row that the database has, read past MLflow."""
    with sqlite3.connect(root.mlflow_database) as database:
        return sorted(database.execute("SELECT key, step, value, timestamp FROM metrics"))


def count(root: Root, table: str) -> int:
    with sqlite3.connect(root.mlflow_database) as database:
        return database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608


def write_journal(run: RunDirectory, steps: range) -> list[tuple[str, int, float, int]]:
    """Two figures a step, as lines; returns the rows that MLflow is to have of them."""
    rows = []
    with run.journal.open("a") as file:
        for step in steps:
            seconds, loss, psnr = 1_700_000_000.0625 + step, 1 / step, 20 + step / 7
            file.write(json.dumps({"step": step, "time": seconds, "train/loss": loss, "train/psnr": psnr}) + "\n")
            rows += [("train/loss", step, loss, 1_700_000_000_062 + 1000 * step)]
            rows += [("train/psnr", step, psnr, 1_700_000_000_062 + 1000 * step)]
    return rows


def save_checkpoint(
    run: RunDirectory, config: RunConfig, step: int, weights: dict[str, torch.Tensor] | None = None, **more: object
) -> checkpoints.Checkpoint:
    about = {
        "step": step,
        "position": step * 16,
        "model": config.model.model_dump(),
        "normalization": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        "shard_set": FINGERPRINT,
        "parent": None,
        "validation": {},
        "best": None,
        "versions": {},
        **more,
    }
    weights = weights or {"encoder.weight": torch.full((2, 3), float(step))}
    return checkpoints.save(run, about, weights, {"moment": torch.zeros(2)}, {"scheduler": {}})


def register(run: RunDirectory, checkpoint: checkpoints.Checkpoint, psnr: float = 30.0) -> int:
    metrics = {"psnr": psnr, "ms_ssim": 0.95}
    return tracking.register_model(run, checkpoint.path, checkpoint.sha256, FINGERPRINT, metrics, TEST_SET)


def test_the_package_is_imported_without_mlflow() -> None:
    code = "import sys, pipelines.tracking; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_address_is_absolute_unless_the_environment_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.tracking_uri(Root(Path("data"))) == f"sqlite:///{Path.cwd()}/data/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://example.org:5000")
    assert tracking.tracking_uri(Root(Path("data"))) == "http://example.org:5000"


def test_opening_a_run_logs_config_commit_and_versions(root: Root) -> None:
    run, config = make_run(root, data={"images": "photos/" + "x" * 7000}, loss={"distortion": "l1"})
    tracked = tracking.open_run(run, config)
    client = client_of(root)
    known = client.get_run(tracked.run_id)
    assert known.info.run_name == "first"
    assert known.info.status == "RUNNING"
    params = known.data.params
    assert params["loss.distortion"] == "l1"
    assert params["training.batch_size"] == "16"
    assert params["data.masks"] == "null"
    assert params["data.background"] == "[255, 255, 255]"
    assert params["data.images"] == "photos/" + "x" * 5992 + "…"
    assert known.data.tags["version.torch"] == metadata.version("torch")
    assert known.data.tags["codecmill.run_directory"] == str(run.path)
    artifacts = root.mlflow_artifacts / tracked.run_id / "artifacts"
    assert read_json(artifacts / "config.json") == config.model_dump(mode="json")
    assert client.get_experiment(tracked.experiment_id).name == "codecmill"
    assert tracked.url() is None
    page = f"#/experiments/{tracked.experiment_id}/runs/{tracked.run_id}?workflowType=machine_learning"
    assert tracked.page() == page


def test_a_resumed_run_goes_on_and_keeps_changed_choices_as_tags(root: Root) -> None:
    run, config = make_run(root)
    first = tracking.open_run(run, config)
    longer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 4000})})
    tracking.set_status(run, "FAILED")
    assert tracking.open_run(run, longer) == first
    known = client_of(root).get_run(first.run_id)
    assert known.info.status == "RUNNING"
    assert known.data.params["training.steps"] == "2000"
    assert {key: value for key, value in known.data.tags.items() if key.startswith("config.")} == {
        "config.training.steps": "4000"
    }
    tracking.open_run(run, config)
    assert client_of(root).get_run(first.run_id).data.tags["config.training.steps"] == "2000"
    assert count(root, "runs") == 1


def test_which_code_made_a_run_is_not_changed_by_who_sends_it_later(root: Root) -> None:
    run, config = make_run(root)
    tracked = tracking.open_run(run, config)

    def said() -> tuple[str | None, str]:
        tags = client_of(root).get_run(tracked.run_id).data.tags
        return tags.get("mlflow.source.git.commit"), tags["version.torch"]

    for step, commit in ((200, "a" * 40), (400, "b" * 40), (600, "c" * 40)):
        saved = save_checkpoint(run, config, step, git_commit=commit, versions={"torch": f"2.{step}"})
    (saved.path / checkpoint_format.MANIFEST).write_text("damaged")
    tracking.bring_level(run)
    assert said() == ("b" * 40, "2.400")
    tracking.begin(run)  # it goes on, with what is here
    assert said() == (git_commit(), metadata.version("torch"))


def test_a_run_whose_mlflow_has_moved_is_known_by_the_new_address(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = make_run(root)
    tracked = tracking.open_run(run, config)
    write_journal(run, range(1, 4))
    tracking.ship_journal(run)
    marks = read_json(run.mlflow_file)
    shutil.copy(root.mlflow_database, tmp_path / "moved.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/moved.db")
    assert tracking.open_run(run, config).run_id == tracked.run_id
    assert read_json(run.mlflow_file) == marks | {"tracking_uri": f"sqlite:///{tmp_path}/moved.db"}


@pytest.mark.parametrize("loss", ["missing", "damaged"])
def test_a_run_whose_marks_are_lost_is_found_again(root: Root, loss: str) -> None:
    run, config = make_run(root)
    first = tracking.open_run(run, config)
    rows = write_journal(run, range(1, 6))
    tracking.ship_journal(run)
    if loss == "missing":
        run.mlflow_file.unlink()
    else:
        run.mlflow_file.write_text('{"run_id": ')
    assert tracking.open_run(run, config).run_id == first.run_id
    assert tracking.ship_journal(run) == 0, "MLflow says what it has"
    assert points(root) == sorted(rows)
    assert count(root, "runs") == 1


def test_a_new_run_in_a_deleted_folder_of_the_same_name_is_another_run(root: Root) -> None:
    run, config = make_run(root)
    former = tracking.open_run(run, config)
    write_journal(run, range(1, 4))
    tracking.ship_journal(run)
    shutil.rmtree(run.path)
    make_run(root)
    assert tracking.open_run(run, config).run_id != former.run_id


def test_a_copied_run_folder_does_not_write_into_the_original(root: Root) -> None:
    run, config = make_run(root)
    original = tracking.open_run(run, config)
    copy = root.run("second")
    shutil.copytree(run.path, copy.path)
    assert tracking.open_run(copy, config.model_copy(update={"name": "second"})).run_id != original.run_id
    assert tracking.open_run(run, config).run_id == original.run_id


def test_what_was_deleted_in_mlflow_comes_back(root: Root) -> None:
    run, config = make_run(root)
    first = tracking.open_run(run, config)
    rows = write_journal(run, range(1, 4))
    tracking.ship_journal(run)
    client_of(root).delete_run(first.run_id)
    assert tracking.open_run(run, config).run_id == first.run_id
    client_of(root).delete_experiment(first.experiment_id)
    assert tracking.open_run(run, config).run_id == first.run_id
    with sqlite3.connect(root.mlflow_database) as database:  # as `mlflow gc` would
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            database.execute(f"DELETE FROM {table}")  # noqa: S608
    assert tracking.open_run(run, config).run_id != first.run_id
    assert tracking.ship_journal(run) == 3
    assert points(root) == sorted(rows)


def test_every_point_arrives_once_whatever_the_marks_say(root: Root) -> None:
    run, config = make_run(root)
    tracking.open_run(run, config)
    rows = write_journal(run, range(1, 1101))
    assert tracking.ship_journal(run) == 1100
    assert tracking.ship_journal(run) == 0
    assert points(root) == sorted(rows)
    marks = read_json(run.mlflow_file)
    assert (marks["journal_step"], marks["journal_offset"]) == (1100, run.journal.stat().st_size)
    # As after a kill between the sending and the marking, early and late in the journal.
    lines = run.journal.read_bytes().splitlines(keepends=True)
    for step in (0, 750, 1099):
        offset = sum(map(len, lines[:step]))
        write_json(run.mlflow_file, marks | {"journal_step": step, "journal_offset": offset})
        assert tracking.ship_journal(run) == 1100 - step
        assert points(root) == sorted(rows)
    history = client_of(root).get_metric_history(marks["run_id"], "train/psnr")
    assert sorted((point.step, point.value) for point in history) == [
        (step, value) for key, step, value, _ in sorted(rows) if key == "train/psnr"
    ]


def test_steps_that_another_machine_has_sent_get_no_second_rows(root: Root) -> None:
    """As where a run is taken over, or its folder is from a backup: the steps are trained again, at other times."""
    run, config = make_run(root)
    tracking.open_run(run, config)
    rows = write_journal(run, range(1, 11))
    tracking.ship_journal(run)
    marks, journal = run.mlflow_file.read_bytes(), run.journal.read_bytes()
    rows += write_journal(run, range(11, 21))
    tracking.ship_journal(run)
    run.mlflow_file.write_bytes(marks)
    again = "".join(
        json.dumps({"step": step, "time": 1_800_000_000.0 + step, "train/loss": 1 / step, "train/psnr": 20 + step / 7})
        + "\n"
        for step in range(11, 21)
    )
    run.journal.write_bytes(journal + again.encode())
    tracking.open_run(run, config)
    rows += write_journal(run, range(21, 26))
    assert tracking.ship_journal(run) == 5
    assert points(root) == sorted(rows)


def test_a_journal_that_was_cut_and_written_on_is_read_from_where_it_was_sent(root: Root) -> None:
    """Where it was cut, lines of other lengths follow: the offset may by chance be the end of a later one."""
    run, _ = make_run(root)
    write_journal(run, range(1, 11))
    ends = [line.end for line in read_lines(run.journal)]
    assert [line.step for line in read_lines(run.journal, ends[4], 5)] == [6, 7, 8, 9, 10]
    assert [line.step for line in read_lines(run.journal, ends[6], 5)] == [6, 7, 8, 9, 10]


@pytest.mark.parametrize(("before", "after"), [(5, 905), (5, 1), (105, 5), (1, 901)])
@pytest.mark.parametrize("sent", [0, 3])
def test_a_step_that_a_changed_byte_has_renumbered_takes_no_others_along(
    root: Root, before: int, after: int, sent: int
) -> None:
    run, _ = make_run(root)
    write_journal(run, range(1, 111))
    ends = [0, *(line.end for line in read_lines(run.journal))]
    content = run.journal.read_bytes().replace(b'"step": %d,' % before, b'"step": %d,' % after)
    run.journal.write_bytes(content)
    offset = ends[sent] + len(content) - ends[-1] if before <= sent else ends[sent]
    there = [line.step for line in read_lines(run.journal, offset, sent)]
    assert there == [step for step in range(sent + 1, 111) if step != before]


@pytest.mark.parametrize("torn_off", [1, 20])
def test_a_torn_last_line_waits_for_its_end(root: Root, torn_off: int) -> None:
    run, config = make_run(root)
    tracking.open_run(run, config)
    rows = write_journal(run, range(1, 4))
    whole = run.journal.read_bytes()
    run.journal.write_bytes(whole[:-torn_off])
    assert tracking.ship_journal(run) == 2
    run.journal.write_bytes(whole)
    assert tracking.ship_journal(run) == 1
    assert points(root) == sorted(rows)


def test_the_real_journal_is_read_step_by_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Journal(path) as journal:
        journal.append(1, {"train/loss": 0.5})
        journal.append(2, {"train/loss": 0.25, "validation/psnr": 31.5})
    path.write_bytes(path.read_bytes() + b'nonsense\n[1]\n{"step": 2, "time": 9, "train/loss": 7}\n{"step": 3}\n')
    lines = list(read_lines(path))
    assert [(line.step, line.figures) for line in lines] == [
        (1, {"train/loss": 0.5}),
        (2, {"train/loss": 0.25, "validation/psnr": 31.5}),
    ]
    assert abs(lines[0].milliseconds / 1000 - time.time()) < 60
    assert list(read_lines(path, lines[0].end, 1)) == lines[1:]
    assert list(read_lines(path, lines[0].end + 1, 1)) == lines[1:]
    assert list(read_lines(path, 10**6, 1)) == lines[1:]


def test_figures_beside_the_journal_are_the_same_row_on_a_repeat(root: Root) -> None:
    run, config = make_run(root)
    tracking.open_run(run, config)
    for _ in range(2):
        tracking.log_metrics(run, 2000, {"test/psnr": 31.25}, 1_700_000_000.5)
    assert points(root) == [("test/psnr", 2000, 31.25, 1_700_000_000_500)]


def test_the_shard_set_is_the_runs_dataset_once(root: Root) -> None:
    run, config = make_run(root)
    tracked = tracking.open_run(run, config)
    folder = root.shards / FINGERPRINT
    for _ in range(2):
        tracking.log_shard_set(run, FINGERPRINT, folder, {"train": 40, "test": 3})
    known = client_of(root).get_run(tracked.run_id)
    assert known.inputs is not None
    (entry,) = known.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("shard_set", "f" * 36)
    assert json.loads(entry.dataset.source) == {"uri": str(folder), "fingerprint": FINGERPRINT}
    assert json.loads(entry.dataset.profile or "") == {"train": 40, "test": 3}
    assert known.data.tags["codecmill.shard_set"] == FINGERPRINT


def test_pictures_grow_by_step_and_each_is_sent_once(root: Root) -> None:
    run, config = make_run(root)
    tracked = tracking.open_run(run, config)
    assert tracking.log_pictures(run) == 0
    run.pictures.mkdir()
    for step in (200, 400):
        Image.new("RGB", (64, 32), (step % 256, 10, 20)).save(run.pictures / f"step_{step:08d}_validation.png")
    whole = (run.pictures / "step_00000200_validation.png").read_bytes()
    (run.pictures / "step_00000600_validation.png").write_bytes(whole[:60])
    assert tracking.log_pictures(run) == 2
    (run.pictures / "step_00000600_validation.png").write_bytes(whole)
    assert tracking.log_pictures(run) == 1
    run.mlflow_file.unlink()
    tracking.open_run(run, config)
    assert tracking.log_pictures(run) == 0
    folder = root.mlflow_artifacts / tracked.run_id / "artifacts" / "images"
    # What the image grid of MLflow's page looks for: a key, a step, a time and a unique end, each as PNG and WebP.
    names = sorted(path.name for path in folder.glob("*.png"))
    assert [name.split("+")[:4] for name in names] == [
        ["validation", "step", str(step), "timestamp"] for step in (200, 400, 600)
    ]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        name for png in names for name in (png, png.replace(".png", "+compressed.webp"))
    )
    with Image.open(folder / names[0]) as picture:
        assert picture.getpixel((0, 0)) == (200, 10, 20)
    assert client_of(root).get_run(tracked.run_id).data.tags["mlflow.loggedImages"] == "True"


def test_a_picture_with_a_changed_byte_keeps_no_later_one_from_mlflow(root: Root) -> None:
    run, config = make_run(root)
    tracking.open_run(run, config)
    run.pictures.mkdir()
    whole = run.pictures / "step_00000600_validation.png"
    Image.frombytes("RGB", (256, 128), random.Random(0).randbytes(256 * 128 * 3)).save(whole)
    content = whole.read_bytes()
    # A length of the first chunk, and the name of one in the middle: two of the things of which Pillow says no OSError.
    for step, place in ((200, 11), (400, content.rindex(b"IDAT"))):
        flipped = content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :]
        (run.pictures / f"step_{step:08d}_validation.png").write_bytes(flipped)
    assert tracking.log_pictures(run) == 1
    assert read_json(run.mlflow_file)["pictures"] == [whole.name]


def test_a_checkpoint_goes_in_whole_and_comes_back(root: Root, tmp_path: Path) -> None:
    run, config = make_run(root)
    tracked = tracking.open_run(run, config)
    saved = [save_checkpoint(run, config, step) for step in (200, 1000)]
    addresses = [tracking.log_checkpoint(run, checkpoint.path) for checkpoint in saved]
    assert addresses[0] == f"runs:/{tracked.run_id}/checkpoints/step_00000200"
    for source, expected in [
        (addresses[0], saved[0]),
        (f"runs:/{tracked.run_id}", saved[1]),
        (f"runs:/{tracked.run_id}/", saved[1]),
    ]:
        folder = tracking.fetch_checkpoint(source, root, tmp_path / "into")
        assert checkpoints.open_checkpoint(folder).sha256 == expected.sha256


GO_ON_ELSEWHERE = """
import sys
from pathlib import Path
from pipelines import checkpoints, tracking
from pipelines.run_directory import RunDirectory
run, into = RunDirectory(Path(sys.argv[1])), Path(sys.argv[2])
tracking.sync(run)
for number, address in enumerate(sys.argv[3:]):
    (into / str(number)).mkdir()
    print(checkpoints.open_checkpoint(tracking.fetch_checkpoint(address, run.root, into / str(number))).sha256)
"""


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_the_artifacts_of_a_root_elsewhere_are_those_that_lie_there(root: Root, tmp_path: Path, how: str) -> None:
    run, config = make_run(root)
    known = tracking.open_run(run, config)
    first = save_checkpoint(run, config, 1)
    version = register(run, first)
    other = Root(tmp_path / "elsewhere" / "their data")
    with sqlite3.connect(root.mlflow_database) as database:
        before = list(database.iterdump())
    if how == "moved":
        other.path.parent.mkdir()
        root.path.rename(other.path)
    else:
        shutil.copytree(root.path, other.path)
    there = other.run("first")
    second = save_checkpoint(there, config, 2)
    addresses = [f"models:/codecmill/{version}", f"runs:/{known.run_id}"]
    # In a process of its own: this one's MLflow remembers where a run's artifacts were.
    command = [sys.executable, "-c", GO_ON_ELSEWHERE, str(there.path), str(tmp_path), *addresses]
    said = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert said.split() == [first.sha256, second.sha256]
    assert (other.mlflow_artifacts / known.run_id / "artifacts" / "checkpoints" / second.path.name).is_dir()
    with sqlite3.connect(other.mlflow_database) as database:
        assert not any(str(root.path.as_uri()) in line and "mlartifacts" in line for line in database.iterdump())
    if how == "moved":
        assert not root.path.exists()
    else:
        with sqlite3.connect(root.mlflow_database) as database:
            assert list(database.iterdump()) == before
        assert not list(root.path.rglob(second.path.name))


def test_a_checkpoint_that_was_cut_off_on_its_way_is_not_taken_for_one(root: Root, tmp_path: Path) -> None:
    run, config = make_run(root)
    tracked = tracking.open_run(run, config)
    with pytest.raises(InputError, match=rf"Run {tracked.run_id} in MLflow at sqlite.* has no checkpoint yet\."):
        tracking.fetch_checkpoint(f"runs:/{tracked.run_id}", root, tmp_path / "into")
    whole = save_checkpoint(run, config, 200)
    tracking.log_checkpoint(run, whole.path)
    cut = save_checkpoint(run, config, 400)
    artifacts = root.mlflow_artifacts / tracked.run_id / "artifacts" / "checkpoints"
    state = cut.path / checkpoint_format.STATE_TENSORS
    # As when a newer checkpoint makes the training delete this one in the middle of its sending.
    content = state.read_bytes()
    state.unlink()
    with pytest.raises(CodecmillError, match=r"MLflow at sqlite:///.* did not take it: .*No such file.*step_00000400/"):
        tracking.log_checkpoint(run, cut.path)
    assert (artifacts / "step_00000400").is_dir()
    folder = tracking.fetch_checkpoint(f"runs:/{tracked.run_id}", root, tmp_path / "into")
    assert folder.name == "step_00000200"
    with pytest.raises(InputError, match=r"step_00000400 in .* is no checkpoint\. The newest of that run: .*_00000200"):
        tracking.fetch_checkpoint(f"runs:/{tracked.run_id}/checkpoints/step_00000400", root, tmp_path / "into")
    state.write_bytes(content)
    tracking.log_checkpoint(run, cut.path)
    assert tracking.fetch_checkpoint(f"runs:/{tracked.run_id}", root, tmp_path / "into").name == "step_00000400"


def test_a_step_that_is_trained_again_to_other_bits_goes_beside_the_former(root: Root, tmp_path: Path) -> None:
    """As where the newest checkpoint was damaged, and the run goes on with more steps. What is registered stays."""
    run, config = make_run(root)
    former = save_checkpoint(run, config, 200)
    assert register(run, former) == 1
    assert unsent_checkpoints(run) == set()
    shutil.rmtree(former.path)
    again = save_checkpoint(run, config, 200, {"encoder.weight": torch.zeros(2, 3)})
    assert unsent_checkpoints(run) == {200}
    tracking.sync(run)
    assert unsent_checkpoints(run) == set()
    assert register(run, again) == 2
    run_id = read_json(run.mlflow_file)["run_id"]
    beside = f"runs:/{run_id}/checkpoints/step_00000200.{again.sha256[:8]}"
    assert tracking.log_checkpoint(run, again.path) == beside
    for place, (address, meant) in enumerate(
        [
            ("models:/codecmill/1", former),
            ("models:/codecmill/2", again),
            (f"runs:/{run_id}/checkpoints/step_00000200", former),
            (beside, again),
            (f"runs:/{run_id}", again),
        ]
    ):
        fetched = tracking.fetch_checkpoint(address, root, tmp_path / str(place))
        assert checkpoints.open_checkpoint(fetched).sha256 == meant.sha256
        found = find(address, root, tmp_path / f"found {place}")
        assert checkpoints.open_checkpoint(found.folders[0]).sha256 == meant.sha256, address
        assert (found.run == run) == (meant is again)
        assert "in a folder of another name" not in str(verify(found).problems)
    (again.path / checkpoint_format.STATE_SCALARS).write_text("damaged")
    assert f"(MLflow has {beside})" in str(verify(find("first", root, tmp_path)).problems)
    shutil.rmtree(again.path)
    unsent = save_checkpoint(run, config, 200, {"encoder.weight": torch.ones(2, 3)})
    (unsent.path / checkpoint_format.STATE_SCALARS).write_text("damaged")
    assert "MLflow has" not in str(verify(find("first", root, tmp_path)).problems)


def test_other_weights_in_a_versions_place_are_refused(root: Root, tmp_path: Path) -> None:
    run, config = make_run(root)
    register(run, save_checkpoint(run, config, 200))
    other = save_checkpoint(run, config, 400)
    (there,) = root.mlflow_artifacts.rglob("step_00000200")
    shutil.copytree(other.path, there, dirs_exist_ok=True)  # as an older codecmill does with a step trained again
    with pytest.raises(
        InputError, match=rf"models:/codecmill/1 in MLflow .* is not what .* {other.sha256[:16]}\.\.\. "
    ):
        tracking.fetch_checkpoint("models:/codecmill/1", root, tmp_path / "into")


def test_a_checkpoint_has_one_version(root: Root) -> None:
    run, config = make_run(root)
    tracked = tracking.open_run(run, config)
    checkpoint = save_checkpoint(run, config, 200)
    assert register(run, checkpoint) == 1
    assert register(run, checkpoint, psnr=30.5) == 1
    assert register(run, save_checkpoint(run, config, 400)) == 2
    other, other_config = make_run(root, "second")
    tracking.open_run(other, other_config)
    assert register(other, save_checkpoint(other, other_config, 200)) == 3
    known = client_of(root).get_model_version("codecmill", "1")
    assert known.source == f"runs:/{tracked.run_id}/checkpoints/step_00000200"
    assert known.run_id == tracked.run_id
    assert known.tags == {
        "run": "first",
        "step": "200",
        "fingerprint": FINGERPRINT,
        "checkpoint_sha256": checkpoint.sha256,
        "curve_images": "0",
        "test/psnr": "30.5",
        "test/ms_ssim": "0.95",
        "test_set_sha256": TEST_SET,
    }


def test_the_pages_say_how_good_a_run_became_unless_somebody_says_otherwise(root: Root) -> None:
    run, config = make_run(root)
    version = register(run, save_checkpoint(run, config, 200))
    report = "evaluation/step_00000200/report.html"
    for found in ("29.00 dB PSNR", "30.00 dB PSNR"):
        tracking.describe(run, version, found, report, b"a picture", "http://prefect.here/runs/flow-run/1f")
    known = tracking.tracked(run)
    assert known is not None
    with connected(root) as client:
        of_run = client.get_run(known.run_id).data.tags["mlflow.note.content"]
        of_version = client.get_model_version(tracking.MODEL, str(version)).description
        assert of_run.startswith("codecmill: 30.00 dB PSNR\n\n")
        assert f"[Report with pictures]({known.page(report)})" in of_run
        assert "[Version 1](#/models/codecmill/versions/1)" in of_run
        assert "[Flow run in Prefect](http://prefect.here/runs/flow-run/1f)" in of_run
        source = "get-artifact?path=evaluation%2Fstep_00000200%2Fworst.webp&run_uuid="
        assert f"![]({source}{known.run_id})" in of_run
        fetched = client.download_artifacts(known.run_id, "evaluation/step_00000200/worst.webp")
        assert Path(fetched).read_bytes() == b"a picture"
        assert of_version is not None and "models:/codecmill/1" in of_version
        client.set_tag(known.run_id, "mlflow.note.content", "My best.")
        client.update_model_version(tracking.MODEL, str(version), "Mine.")
        tracking.describe(run, version, "31.00 dB PSNR", report, None, None)
        assert client.get_run(known.run_id).data.tags["mlflow.note.content"] == "My best."
        assert client.get_model_version(tracking.MODEL, str(version)).description == "Mine."


def test_an_evaluation_that_was_made_while_mlflow_was_away_is_sent_by_the_next_sync(root: Root) -> None:
    run, config = make_run(root)
    tracked = tracking.open_run(run, config)
    save_checkpoint(run, config, 200)
    folder = run.evaluation(200, "photos of my own")

    def sent() -> list[str]:
        tracking.bring_level(run)
        return [file.path for file in client_of(root).list_artifacts(tracked.run_id, f"evaluation/{folder.name}")]

    folder.mkdir(parents=True)
    (folder / "report.html").write_text("half-written")
    assert sent() == []
    for content in ("first", "evaluated again"):
        (folder / "report.html").write_text(content)
        write_json(folder / "evaluation.json", {"content": content})
        assert sent() == [f"evaluation/{folder.name}/{name}" for name in ("evaluation.json", "report.html")]
        (there,) = root.mlflow_artifacts.rglob("report.html")
        assert there.read_text() == content
        there.unlink()
        assert sent() == [f"evaluation/{folder.name}/evaluation.json"], "what MLflow has is not sent again"


def test_a_sync_that_fails_half_way_leaves_no_run_that_is_said_to_be_running(root: Root) -> None:
    run, config = make_run(root)
    tracked = tracking.open_run(run, config)
    tracking.set_status(run, "FINISHED")
    run.evaluation(200).mkdir(parents=True)
    write_json(run.evaluation(200) / "evaluation.json", {})
    (root.mlflow_artifacts / tracked.run_id / "artifacts" / "evaluation").write_text("no folder")
    with pytest.raises(CodecmillError, match=r"did not take it: .*evaluation"):
        tracking.bring_level(run)
    assert client_of(root).get_run(tracked.run_id).info.status == "FINISHED"
    new = tracking.open_run(*make_run(root, "unknown-there"), is_running=False)
    assert client_of(root).get_run(new.run_id).info.status == "KILLED"


def test_what_the_client_of_a_bucket_raises_is_a_sentence(root: Root) -> None:
    """Some servers have artifacts written to the bucket by who has them."""
    refused = ClientError({"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}, "PutObject")
    busy = ClientError({"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPStatusCode": 503}}, "PutObject")
    away = EndpointConnectionError(endpoint_url="http://127.0.0.1:9/b")
    for error, message in (
        (away, r"cannot be reached: Could not connect to the endpoint URL.*\. Look for the bucket in which"),
        (busy, r"cannot be reached: An error occurred \(SlowDown\)"),
        (ReadTimeoutError(endpoint_url="http://127.0.0.1:9/b"), r"cannot be reached: Read timeout on endpoint URL"),
        (ConnectionClosedError(endpoint_url="http://127.0.0.1:9/b"), r"cannot be reached: Connection was closed"),
    ):
        with pytest.raises(tracking.TrackingUnavailable, match=message), connected(root):
            raise error
    message = r"did not take it: An error occurred \(AccessDenied\)"
    with pytest.raises(CodecmillError, match=message) as caught, connected(root):
        raise refused
    assert not isinstance(caught.value, tracking.TrackingUnavailable)
    with pytest.raises(ZeroDivisionError), connected(root):
        _ = 1 / 0


def test_a_client_that_is_not_installed_is_named(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = make_run(root)
    client_of(root).create_experiment("codecmill", artifact_location="s3://mill/below")
    monkeypatch.setitem(sys.modules, "boto3", None)  # as if it were not there
    with pytest.raises(InputError, match=r"MLflow at sqlite:.* needs the package boto3 here, .*: pip install "):
        tracking.open_run(run, config)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mysql+pymysql://someone:secret@127.0.0.1/mlflow")
    with pytest.raises(InputError, match=r"MLflow at mysql\+pymysql://someone:\*\*\*@.* package pymysql here"):
        tracking.open_run(run, config)


class Slow(BaseHTTPRequestHandler):
    """An MLflow that has everything, and takes longer than its clients wait to make a run."""

    posted: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self._answer({"experiment": {"experiment_id": "1", "name": "codecmill", "lifecycle_stage": "active"}})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.posted.append(self.path.rpartition("/")[2])
        if self.path.endswith("/create"):
            time.sleep(3)
        self._answer({})

    def _answer(self, value: dict[str, object]) -> None:
        content = json.dumps(value).encode()
        with suppress(BrokenPipeError):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing, where the base class writes to stderr."""


def test_what_is_marked_as_sent_was_sent_whatever_mlflows_variables_say(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = make_run(root)
    tracked = tracking.open_run(run, config)
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    run.pictures.mkdir()
    Image.new("RGB", (64, 32)).save(run.pictures / "step_00000200_validation.png")
    assert tracking.log_pictures(run) == 1
    images = root.mlflow_artifacts / tracked.run_id / "artifacts" / "images"
    assert sorted(path.suffix for path in images.iterdir()) == [".png", ".webp"]
    write_journal(run, range(1, 4))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(tracking.TrackingUnavailable):
        tracking.ship_journal(run)
    with pytest.raises(tracking.TrackingUnavailable):
        tracking.log_metrics(run, 2000, {"test/psnr": 31.25}, 1_700_000_000.5)
    assert read_json(run.mlflow_file)["journal_step"] == 0


@pytest.mark.parametrize(("fault", "is_told"), [("deleted", False), ("unknown", True)])
def test_one_run_that_cannot_be_marked_keeps_no_other_from_it(root: Root, fault: str, is_told: bool) -> None:
    runs = [make_run(root, name) for name in ("first", "second")]
    tracked = [tracking.open_run(run, config) for run, config in runs]
    if fault == "deleted":
        client_of(root).delete_run(tracked[0].run_id)
    else:
        write_json(runs[0][0].mlflow_file, read_json(runs[0][0].mlflow_file) | {"run_id": "what;ever"})
    with pytest.raises(CodecmillError, match="what;ever") if is_told else nullcontext():
        mark_all_killed(root, ["first", "second"])
    assert client_of(root).get_run(tracked[1].run_id).info.status == "KILLED"


class Refusing(BaseHTTPRequestHandler):
    """Takes nothing so large."""

    def do_PUT(self) -> None:
        self.send_error(413)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing, where the base class writes to stderr."""


class Busy(Refusing):
    def do_GET(self) -> None:
        self.send_response(503)
        self.send_header("Retry-After", "3600")
        self.end_headers()


def test_a_slow_server_is_asked_once_for_a_run(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes what it is asked for, too late: a second request would make a second run."""
    run, config = make_run(root)
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        with pytest.raises(tracking.TrackingUnavailable):
            tracking.open_run(run, config)
        server.shutdown()
    assert Slow.posted == ["search", "create"]


def test_the_champion_changes_hands_and_is_fetched_by_its_alias(root: Root, tmp_path: Path) -> None:
    run, config = make_run(root)
    tracking.open_run(run, config)
    assert tracking.champion(root) is None
    saved = [save_checkpoint(run, config, step) for step in (200, 400)]
    versions = [register(run, checkpoint, psnr) for checkpoint, psnr in zip(saved, (30.0, 31.0), strict=True)]
    assert tracking.champion(root) is None
    for _ in range(2):
        tracking.promote(run, versions[0], Decision("champion", "The first."))
        tracking.promote(run, versions[1], Decision("candidate", "Not yet."))
    tracking.promote(run, versions[0], Decision("champion", "It is the champion already."))
    first = tracking.champion(root)
    assert first is not None
    assert first.tags["promotion_reason"] == "The first."
    assert (first.number, first.run, first.step, first.checkpoint_sha256) == (1, "first", 200, saved[0].sha256)
    assert first.scores.metrics == {"psnr": 30.0, "ms_ssim": 0.95}
    assert first.scores.test_set_sha256 == TEST_SET
    candidate = tracking.fetch_checkpoint("models:/codecmill@candidate", root, tmp_path / "a")
    assert checkpoints.open_checkpoint(candidate).step == 400
    for _ in range(2):
        tracking.promote(run, versions[1], Decision("champion", "Better by 1 dB."))
    second = tracking.champion(root)
    assert second is not None
    assert (second.number, second.tags["promotion"], second.tags["promotion_reason"]) == (
        2,
        "champion",
        "Better by 1 dB.",
    )
    assert client_of(root).get_registered_model("codecmill").aliases == {"champion": 2}
    champion = tracking.fetch_checkpoint("models:/codecmill@champion", root, tmp_path / "b")
    assert checkpoints.open_checkpoint(champion).sha256 == saved[1].sha256
    former = tracking.fetch_checkpoint("models:/codecmill/1", root, tmp_path / "c")
    assert checkpoints.open_checkpoint(former).sha256 == saved[0].sha256


def test_the_champion_is_scored_anew_on_another_test_set(root: Root) -> None:
    run, config = make_run(root)
    tracking.open_run(run, config)
    version = register(run, save_checkpoint(run, config, 200))
    tracking.promote(run, version, Decision("champion", "The first."))
    tracking.record_evaluation(root, version, {"psnr": 28.5, "ms_ssim": 0.9}, "8" * 64)
    champion = tracking.champion(root)
    assert champion is not None
    assert champion.scores.metrics == {"psnr": 28.5, "ms_ssim": 0.9}
    assert champion.scores.test_set_sha256 == "8" * 64


def test_metrics_of_a_former_evaluation_do_not_stay(root: Root) -> None:
    run, config = make_run(root)
    tracking.open_run(run, config)
    version = register(run, save_checkpoint(run, config, 200))
    tracking.promote(run, version, Decision("champion", "The first."))
    tracking.record_evaluation(root, version, {"psnr": 28.5, "bd_rate": -30.0}, TEST_SET, 24)
    tracking.record_evaluation(root, version, {"psnr": 28.0}, "8" * 64)
    champion = tracking.champion(root)
    assert champion is not None
    assert champion.scores == Scores(version, {"psnr": 28.0}, "8" * 64, 0)
    assert (champion.tags["run"], champion.tags["promotion"]) == ("first", "champion")


@pytest.mark.parametrize(("measured_on", "is_scored"), [(24, False), (2, True), (0, True), (None, True)])
def test_bd_rates_are_compared_of_the_same_images(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured_on: int | None, is_scored: bool
) -> None:
    """What was measured on fewer images, or on none, or in former times, is measured again."""
    run, config = make_run(root)
    tracking.open_run(run, config)
    version = register(run, save_checkpoint(run, config, 200))
    tracking.promote(run, version, Decision("champion", "The first."))
    tracking.record_evaluation(root, version, {"psnr": 30.0, "bd_rate": -20.0}, TEST_SET, measured_on or 0)
    if measured_on is None:
        client_of(root).delete_model_version_tag("codecmill", str(version), "curve_images")
    scored: list[EvaluationConfig] = []

    def score(_run: RunDirectory, _checkpoint: object, _set: object, choice: EvaluationConfig) -> dict[str, float]:
        scored.append(choice)
        return {"psnr": 30.0, "bd_rate": -40.0}

    monkeypatch.setattr("pipelines.evaluation.stage.score_on_test_split", score)
    shard_set = cast(
        "ShardSet", SimpleNamespace(fingerprint=FINGERPRINT, test_set_sha256=TEST_SET, sources=lambda _: ())
    )
    choice = EvaluationConfig(promotion_metric="bd_rate", curve_images=24)
    found = {"psnr": 29.0, "bd_rate": -30.0}
    (tmp_path / "step_00000400").mkdir()
    (tmp_path / "step_00000400" / "evaluation.json").write_text("{}")
    next_best, report = save_checkpoint(run, config, 400), tmp_path / "step_00000400"
    decided = [registration.register(run, next_best, shard_set, found, report, choice).alias for _ in range(2)]
    assert decided == ["candidate" if is_scored else "champion"] * 2
    assert scored == ([choice] if is_scored else [])


def test_a_champion_is_scored_as_long_as_it_lies_anywhere(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's copy may have been deleted for room, or that under the root."""
    run, config = make_run(root)
    tracking.open_run(run, config)
    best, candidate = (save_checkpoint(run, config, step) for step in (200, 400))
    tracking.promote(run, register(run, best), Decision("champion", "The first."))
    scored: list[str] = []

    def score(_run: RunDirectory, checkpoint: checkpoints.Checkpoint, *_: object) -> dict[str, float]:
        scored.append(checkpoint.sha256)
        return {"psnr": 30.0}

    monkeypatch.setattr("pipelines.evaluation.stage.score_on_test_split", score)
    report = tmp_path / "step_00000400"
    report.mkdir()
    (report / "evaluation.json").write_text("{}")

    def registered(test_set: str) -> registration.Registered:
        shard_set = SimpleNamespace(fingerprint=FINGERPRINT, test_set_sha256=test_set, sources=lambda _: ())
        choice = EvaluationConfig()
        return registration.register(run, candidate, cast("ShardSet", shard_set), {"psnr": 29.0}, report, choice)

    registered("1" * 64)
    (kept,) = root.mlflow_artifacts.rglob("step_00000200")
    kept.rename(tmp_path / "kept")
    registered("2" * 64)
    weights = best.path / checkpoint_format.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "kept").rename(kept)
    registered("3" * 64)
    assert scored == [best.sha256] * 3
    shutil.rmtree(kept)
    with pytest.raises(InputError, match=r"Champion version 1 is to be .* is no checkpoint\..* Give the alias 'champ"):
        registered("4" * 64)


def test_a_champion_that_another_machine_names_meanwhile_is_the_one_to_beat(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the champion must be evaluated on a new test set first, which takes long."""
    run, config = make_run(root)
    tracking.open_run(run, config)
    saved = [save_checkpoint(run, config, step) for step in (200, 400, 600)]
    first = register(run, saved[0], 28.0)
    tracking.promote(run, first, Decision("champion", "The first."))
    scored: list[int] = []

    def score(_run: RunDirectory, checkpoint: checkpoints.Checkpoint, *_: object) -> dict[str, float]:
        scored.append(checkpoint.step)
        if checkpoint.step == 200:
            other = register(run, saved[1], 20.0)
            tracking.promote(run, other, Decision("champion", "On another machine."))
        return {"psnr": {200: 29.0, 400: 31.0}[checkpoint.step]}

    monkeypatch.setattr("pipelines.evaluation.stage.score_on_test_split", score)
    shard_set = cast(
        "ShardSet", SimpleNamespace(fingerprint=FINGERPRINT, test_set_sha256="8" * 64, sources=lambda _: ())
    )
    report = tmp_path / "step_00000600"
    report.mkdir()
    (report / "evaluation.json").write_text("{}")
    for psnr, alias in ((30.5, "candidate"), (31.5, "champion")):
        done = registration.register(run, saved[2], shard_set, {"psnr": psnr}, report, EvaluationConfig())
        assert done.alias == alias
    assert scored == [200, 400]
    assert done.reason.startswith("Version 2 with psnr 31.5000 dB beats champion version 3 with 31.0000 dB")


def test_a_candidate_that_is_judged_again_says_the_new_reason(root: Root) -> None:
    run, config = make_run(root)
    tracking.open_run(run, config)
    version = register(run, save_checkpoint(run, config, 200))
    for reason in ("By one metric.", "By another."):
        tracking.promote(run, version, Decision("candidate", reason))
    tags = client_of(root).get_model_version("codecmill", str(version)).tags
    assert (tags["promotion"], tags["promotion_reason"]) == ("candidate", "By another.")


def test_an_unknown_source_is_refused_with_what_there_is(root: Root, tmp_path: Path) -> None:
    def refused(source: str, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            tracking.fetch_checkpoint(source, root, tmp_path / "into")
        assert caught.value.exit_code == 2

    refused("models:/codecmill@champion", r"no registered model 'codecmill' in MLflow .* Registered there: none yet\.")
    run, config = make_run(root)
    tracking.open_run(run, config)
    tracking.promote(run, register(run, save_checkpoint(run, config, 200)), Decision("candidate", "Only one."))
    refused("models:/other/1", r"no registered model 'other' in .* Registered there: codecmill\.")
    refused(
        "models:/codecmill@champion",
        r"no models:/codecmill@champion in .* aliases: candidate \(version 1\)\. Its newest versions: 1\.",
    )
    refused("models:/codecmill/7", r"There is no models:/codecmill/7 in .* Its newest versions: 1\.")
    refused("models:/codecmill", r"'models:/codecmill' names no registered version\. Write runs:/.*<version>\.")
    refused("runs:/", r"'runs:/' is no address in MLflow\. Write runs:/")
    refused("runs:/" + "0" * 32, r"There is no run '0{32}' in MLflow at sqlite.* its mlflow_run\.json\.")
    refused("runs:/what;ever", r"There is no run 'what;ever' in MLflow")
    run_id = read_json(run.mlflow_file)["run_id"]
    for path in ("../elsewhere", "/elsewhere"):
        refused(f"runs:/{run_id}/{path}", rf"runs:/{run_id}/{path} in .* is no checkpoint\. The newest .*step_00000200")
    client_of(root).create_registered_model("foreign")
    client_of(root).create_model_version("foreign", str(tmp_path))
    refused("models:/foreign/1", r"models:/foreign/1 was not registered by codecmill: its source is /")


def test_a_champion_that_is_not_ours_is_named(root: Root, tmp_path: Path) -> None:
    client_of(root).create_registered_model("codecmill")
    client_of(root).create_model_version("codecmill", str(tmp_path))
    client_of(root).set_registered_model_alias("codecmill", "champion", "1")
    with pytest.raises(CodecmillError, match="Version 1 of the registered model 'codecmill' was not made by codecmill"):
        tracking.champion(root)


@pytest.mark.full
def test_runs_that_start_at_once_share_a_new_database_and_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = Root(tmp_path / "data")
    code = (
        "import sys; from pathlib import Path;"
        "from pipelines import tracking; from pipelines.run_directory import Root;"
        "root = Root(Path(sys.argv[1])); run = root.run(sys.argv[2]); config = run.read_config();"
        "print('made', tracking.champion(root), flush=True); sys.stdin.readline(); tracking.open_run(run, config)"
    )
    names = [make_run(root, f"run-{number}")[0].path.name for number in range(3)]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(root.path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        for name in names
    ]
    first_words = [child.stdout.readline() for child in children if child.stdout]
    for child in children:
        if child.stdin and child.poll() is None:
            child.stdin.write("\n")
            child.stdin.flush()
    outputs = [child.communicate(timeout=100) for child in children]
    assert [(child.returncode, output) for child, output in zip(children, outputs, strict=True)] == [(0, ("", ""))] * 3
    assert first_words == ["made None\n"] * 3
    assert len({read_json(root.run(name).mlflow_file)["experiment_id"] for name in names}) == 1
    assert count(root, "runs") == 3


def test_a_kill_while_the_database_is_made_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = Root(tmp_path)
    code = (
        "import sys; from pathlib import Path;"
        "from pipelines import tracking; from pipelines.run_directory import Root;"
        "tracking.ensure_database(Root(Path(sys.argv[1])))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    # SQLite has this file in the middle of each of the many transactions.
    while child.poll() is None and not any(tmp_path.glob("*mlflow.db*-journal")):
        time.sleep(0.001)
    child.kill()
    assert child.wait(30) == -signal.SIGKILL
    assert not root.mlflow_database.exists()
    assert tracking.champion(root) is None


def test_a_dead_server_is_a_quick_clear_error(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = make_run(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:secret@127.0.0.1:{free_port()}")
    start = time.monotonic()
    with pytest.raises(tracking.TrackingUnavailable) as caught:
        tracking.open_run(run, config)
    assert time.monotonic() - start < 10
    assert "MLflow at http://someone:***@127.0.0.1" in str(caught.value)
    assert "Connection refused" in str(caught.value)
    assert "correct MLFLOW_TRACKING_URI" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not run.mlflow_file.exists()


@pytest.mark.parametrize("password", ["secret", "s/ecret", "s#ecret", "5/secret", "s?e@cret", "s@/ecret"])
def test_no_password_is_shown(root: Root, monkeypatch: pytest.MonkeyPatch, password: str) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        quoted = f"http://someone:{urllib.parse.quote(password, safe='')}@127.0.0.1:{server.server_port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:{password}@127.0.0.1:{server.server_port}")
        with pytest.raises(CodecmillError, match="413") as caught, connected(root):
            requests.put(quoted, timeout=10).raise_for_status()  # as MLflow's client does with an artifact
        server.shutdown()
    assert not re.search(r"s.{0,3}e.{0,3}cret", str(caught.value)), caught.value
    assert str(caught.value).count(f"@127.0.0.1:{server.server_port}") == 2


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://example.org:5000", "http://example.org:5000"),
        ("http://someone@example.org:5000", "http://someone@example.org:5000"),
        ("http://[::1]:5000/below", "http://[::1]:5000/below"),
        ("sqlite:////data/a@b:c/mlflow.db", "sqlite:////data/a@b:c/mlflow.db"),
        ("postgresql://someone:secret@host/a", "postgresql://someone:***@host/a"),
        ("postgresql://someone:sec#ret@host/a", "postgresql://***@host/a"),
    ],
)
def test_an_address_is_shown_without_its_password(uri: str, shown: str) -> None:
    assert tracking.without_password(uri) == shown


def test_a_server_that_never_answers_is_given_up(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = make_run(root)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        start = time.monotonic()
        with pytest.raises(tracking.TrackingUnavailable, match="timed out"):
            tracking.open_run(run, config)
        assert time.monotonic() - start < 10


@pytest.mark.parametrize("what", ["server", "database"])
def test_mlflow_is_waited_for_no_longer_than_it_is_worth(
    root: Root, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    """Whatever a server says of when to come again, and however often its client would open a database."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = {"server": f"http://127.0.0.1:{server.server_port}", "database": f"sqlite:///{tmp_path}"}
        monkeypatch.setenv("MLFLOW_TRACKING_URI", here[what])
        with pytest.raises(tracking.TrackingUnavailable):
            tracking.champion(root)
        server.shutdown()
    assert sum(waited) < REQUEST_SECONDS


def test_a_large_file_is_given_the_time_it_needs(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    client_of(root)
    with patience_for(60_000_000):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "65"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "5"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    with patience_for(60_000_000):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "20"


def serve(folder: Path, port: int) -> "subprocess.Popen[bytes]":
    """A real MLflow server with the database and the artifacts in a folder; returns when it answers."""
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    place = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command = [sys.executable, "-m", "mlflow", "server", *store, *place]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    deadline = time.monotonic() + 90
    while not answers(f"http://127.0.0.1:{port}"):
        if process.poll() is not None or time.monotonic() > deadline:
            end(process)
            pytest.fail((folder / "log").read_text())
        time.sleep(0.2)
    return process


@pytest.fixture
def server(tmp_path: Path, empty_database: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A real MLflow server with a database and an artifact folder of its own."""
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    port = free_port()
    process = serve(folder, port)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        end(process)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as response:  # noqa: S310
            return response.status == 200
    except (urllib.error.URLError, TimeoutError):
        return False


def end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def assert_failed_downloads_are_explained(root: Root, address: str, proxy: Proxy) -> None:
    """What may pass as that, and what will not; and no other checkpoint is looked at."""
    into = root.path / "into"
    tracking.fetch_checkpoint(address, root, into)
    assert proxy.count("GET", "checkpoints%2F") == proxy.count("GET", "artifacts?path") == 1
    kinds: tuple[Kind, ...] = ("503", "close", "half")
    for kind in kinds:
        fault = proxy.break_(kind, "GET", "model.safetensors")
        with pytest.raises(tracking.TrackingUnavailable, match="cannot be reached: "):
            tracking.fetch_checkpoint(address, root, into)
        proxy.faults.remove(fault)
    proxy.break_("403", "GET", "model.safetensors")
    with pytest.raises(CodecmillError, match="did not take it: 403 Client Error: Forbidden") as caught:
        tracking.fetch_checkpoint(address, root, into)
    assert not caught.value.may_pass


def test_everything_works_over_http_until_the_server_dies(
    root: Root, server: tuple[str, "subprocess.Popen[bytes]"], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address, process = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    run, config = make_run(root)
    tracked = tracking.open_run(run, config)
    assert tracked.url() == f"{address}/{tracked.page()}"
    tracking.log_shard_set(run, FINGERPRINT, root.shards / FINGERPRINT, {"train": 40})
    rows = write_journal(run, range(1, 701))
    assert tracking.ship_journal(run) == 700
    marks = read_json(run.mlflow_file)
    write_json(run.mlflow_file, marks | {"journal_step": 0, "journal_offset": 0})
    assert tracking.ship_journal(run) == 700
    run.pictures.mkdir()
    Image.new("RGB", (64, 32)).save(run.pictures / "step_00000200_validation.png")
    assert tracking.log_pictures(run) == 1
    checkpoint = save_checkpoint(run, config, 700)
    version = register(run, checkpoint)
    tracking.promote(run, version, Decision("champion", "The first."))
    champion = tracking.champion(root)
    assert champion is not None
    assert champion.checkpoint_sha256 == checkpoint.sha256
    fetched = tracking.fetch_checkpoint("models:/codecmill@champion", root, tmp_path / "into")
    assert checkpoints.open_checkpoint(fetched).sha256 == checkpoint.sha256
    run.evaluation(700).mkdir(parents=True)
    (run.evaluation(700) / "report.html").write_text("<p>fine</p>")
    (run.evaluation(700) / "evaluation.json").write_text("{}")
    tracking.log_evaluation(run, run.evaluation(700))
    tracking.set_status(run, "FINISHED")
    client = client_of(root)
    assert client.get_run(tracked.run_id).info.status == "FINISHED"
    assert {finding.state for finding in examine_mlflow(root)} == {"good"}
    assert [file.path for file in client.list_artifacts(tracked.run_id, "evaluation/step_00000700")] == [
        "evaluation/step_00000700/evaluation.json",
        "evaluation/step_00000700/report.html",
    ]
    assert not root.mlflow_artifacts.exists()
    served = Root(tmp_path / "server")
    assert points(served) == sorted(rows)
    with pytest.raises(InputError, match=r"There is no run '0{32}' in MLflow at http"):
        tracking.fetch_checkpoint("runs:/" + "0" * 32, root, tmp_path / "into")
    with proxy_to(address) as proxy, monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", proxy.address)
        assert_failed_downloads_are_explained(root, f"runs:/{tracked.run_id}/checkpoints/step_00000700", proxy)

    write_journal(run, range(701, 711))
    end(process)
    start = time.monotonic()
    absent = rf"MLflow at {address} cannot be reached: .*(refused|reset by peer)"
    with pytest.raises(tracking.TrackingUnavailable, match=absent):
        tracking.ship_journal(run)
    assert time.monotonic() - start < 10
    assert read_json(run.mlflow_file)["journal_step"] == 700


def test_a_version_is_found_in_the_roots_own_database_without_mlflow(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = make_run(root)
    saved = [save_checkpoint(run, config, step) for step in (5, 10)]
    versions = [register(run, checkpoint) for checkpoint in saved]
    tracking.promote(run, versions[1], Decision("champion", "The first."))
    run_id = read_json(run.mlflow_file)["run_id"]
    expected = (2, f"runs:/{run_id}/checkpoints/step_00000010", saved[1].sha256)
    assert tracking.registered_offline("models:/codecmill@champion", root) == expected
    assert tracking.registered_offline("models:/codecmill/2", root) == expected
    client_of(root).set_registered_model_alias("codecmill", "champion", "1")  # by hand, on MLflow's page
    found = tracking.registered_offline("models:/codecmill@champion", root)
    assert found is not None
    assert (found.number, found.checkpoint_sha256) == (1, saved[0].sha256)
    client_of(root).delete_model_version("codecmill", "2")
    for address in ("models:/codecmill/2", "models:/codecmill@candidate", "models:/other/1"):
        with pytest.raises(InputError, match=rf"There is no {address} in .*mlflow\.db\. Its aliases: "):
            tracking.registered_offline(address, root)
    assert tracking.registered_offline("models:/codecmill", root) is None
    with pytest.raises(tracking.NoVersionError, match=r"There is no models:/codecmill/1: nothing has been registered"):
        tracking.registered("models:/codecmill/1", Root(root.path / "new"))
    assert not (root.path / "new").exists(), "to look makes no database"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert tracking.registered_offline("models:/codecmill/1", root) is None, "a server knows, and not this file"


def test_whose_alias_moved_on_a_shared_registry_is_asked_there(
    root: Root, tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry that is not the root's own, as a server's: another root, or MLflow's page, may move its aliases."""
    shutil.copy(empty_database, tmp_path / "shared.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'shared.db'}")
    run, config = make_run(root)
    saved = [save_checkpoint(run, config, step) for step in (5, 10)]
    versions = [register(run, checkpoint) for checkpoint in saved]
    tracking.promote(run, versions[0], Decision("champion", "The first."))
    said = {"version": versions[0], "alias": "champion", "checkpoint_sha256": saved[0].sha256}
    write_json(run.promotion_file, said)
    client_of(root).set_registered_model_alias("codecmill", "champion", str(versions[1]))
    meant = find("models:/codecmill@champion", root, tmp_path)
    assert (meant.folders, meant.how) == ((saved[1].path,), f"version 2 in MLflow at {tracking.tracking_uri(root)}")
    assert find("models:/codecmill/1", root, tmp_path).folders == (saved[0].path,)
    with pytest.raises(InputError, match=f"{saved[1].path} holds an autoencoder"):
        open_codec(None, root)  # by default the champion's
    client_of(root).delete_registered_model_alias("codecmill", "champion")
    with pytest.raises(InputError, match="no finished run"):
        open_codec(None, root)


def test_a_file_is_read_by_the_model_that_wrote_it_where_only_mlflow_has_it(
    root: Root, tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One machine trains and registers; another, with a root of its own, compresses by the champion, and reads."""
    shutil.copy(empty_database, tmp_path / "shared.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'shared.db'}")
    sizes = {"channels": 8, "latent_channels": 12, "downsamplings": 2}
    run, config = make_run(root, model={"entropy": "factorized", **sizes})
    trained = save_checkpoint(run, config, 5, build_model(config.model, 0).state_dict())
    tracking.promote(run, register(run, trained), Decision("champion", "The first."))
    elsewhere = Root(tmp_path / "elsewhere")
    image = Image.new("RGB", (20, 24), (200, 90, 40))
    content = encode(image, root=elsewhere.path)
    assert parse(content, "x").model == trained.sha256
    decoded = decode(content, root=elsewhere.path)
    assert decoded.tobytes() == decode(content, model="first", root=root.path).tobytes()
    with pytest.raises(InputError, match=r"sha256 cdcdcdcdcdcdcdcd, and neither a checkpoint .* nor a version in MLfl"):
        codec_that_wrote("cd" * 32, "x", elsewhere)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(InputError, match=r"nor a version in MLflow is that\. Name it with --model"):
        decode(content, root=elsewhere.path)
    assert "What is registered could not be looked at: MLflow at http://127.0.0.1" in caplog.text
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(InputError, match="nor a version in MLflow is that"):
        decode(content, root=elsewhere.path)
    assert not elsewhere.path.exists(), "to look makes no database"


def test_a_damaged_copy_of_the_model_that_wrote_a_file_does_not_hide_the_sound_ones(
    root: Root, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"channels": 8, "latent_channels": 12, "downsamplings": 2}
    run, config = make_run(root, model={"entropy": "factorized", **sizes})
    weights = build_model(config.model, 0).state_dict()
    saved = [save_checkpoint(run, config, step, weights) for step in (5, 10)]
    assert saved[0].sha256 == saved[1].sha256
    register(run, saved[0])
    content = encode(Image.new("RGB", (20, 24), (200, 90, 40)), model=str(saved[0].path), root=root.path)
    decoded = decode(content, root=root.path).tobytes()
    for checkpoint in reversed(saved):
        with (checkpoint.path / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\xff")
        assert decode(content, root=root.path).tobytes() == decoded
        problem = f"Another copy of the model that wrote The content is looked for: {checkpoint.path}/model.safetensors"
        assert problem in caplog.text
    for what_mlflow_has in (root.mlflow_artifacts, root.mlflow_database):
        what_mlflow_has.rename(root.path / f"lost-{what_mlflow_has.name}")
        with pytest.raises(CodecmillError, match=rf"{saved[0].path}/model\.safetensors "):
            decode(content, root=root.path)


def test_the_registry_stands_before_what_runs_wrote_down_unless_it_is_lost(
    root: Root, tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make_run(root, name) for name in ("first", "second")]
    saved = [save_checkpoint(run, config, step) for (run, config), step in zip(runs, (5, 10), strict=True)]
    for (run, _), checkpoint in zip(runs, saved, strict=True):
        shutil.copy(empty_database, root.mlflow_database)  # begun anew: both are version 1
        assert register(run, checkpoint) == 1
        write_json(run.promotion_file, {"version": 1, "alias": "champion", "checkpoint_sha256": checkpoint.sha256})
    assert find("models:/codecmill/1", root, tmp_path).folders == (saved[1].path,)
    with pytest.raises(tracking.NoVersionError, match="There is no models:/codecmill@champion in "):
        find("models:/codecmill@champion", root, tmp_path)
    shutil.move(root.mlflow_database, tmp_path / "server.db")
    assert find("models:/codecmill@champion", root, tmp_path).folders == (saved[1].path,), "the newest"
    with pytest.raises(tracking.NoVersionError, match="There is no models:/codecmill/1"):
        find("models:/codecmill/1", root, tmp_path)
    with monkeypatch.context() as patch:
        address = f"sqlite:///{tmp_path}/server.db"
        patch.setenv("MLFLOW_TRACKING_URI", address)
        for run, _ in runs:
            write_json(run.mlflow_file, read_json(run.mlflow_file) | {"tracking_uri": address})
        assert find("models:/codecmill/1", root, tmp_path).folders == (saved[1].path,), "a server is asked"
    for run, _ in runs:
        write_json(run.mlflow_file, read_json(run.mlflow_file) | {"tracking_uri": tracking.tracking_uri(root)})
    runs[1][0].promotion_file.unlink()
    for name in ("models:/codecmill@champion", "models:/codecmill/1"):
        assert find(name, root, tmp_path).folders == (saved[0].path,)


def test_a_database_that_cannot_be_read_leaves_the_question_to_mlflow(root: Root) -> None:
    for content in (b"", b"no database at all, but a long text of more than a hundred bytes" * 9):
        root.mlflow_database.write_bytes(content)
        assert tracking.registered_offline("models:/codecmill/1", root) is None
