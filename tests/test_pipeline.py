"""The whole DAG: by its command, from Python, twice, with weights of an earlier run, and stopped on the way."""

import importlib
import json
import os
import pkgutil
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import copy_prefect_database, make, picture
from prefect import Task
from processes import PROJECT, clean_environment, wait_for
from trainings import (
    Undisturbed,
    begin,
    beginnings,
    directory_of,
    last_rank,
    ranks_alive,
    result,
    steps_done,
    train,
    train_and_kill,
)

import tasks
from pipelines import checkpoints, tracking
from pipelines.config import RunConfig
from pipelines.durable_files import read_json
from pipelines.run_directory import RunDirectory
from pipelines.tracking.connection import connected
from pipelines.training.attempts import GRACE_SECONDS
from pipelines.training.journal import read
from tasks.shards import encoding_by


def with_config(config: RunConfig, tmp_path: Path, *words: str) -> list[str]:
    """The command line of `codecmill WORDS` with a config file, which is written."""
    file = tmp_path / f"{config.name}.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return [sys.executable, "-m", "flows", *words, "--config", str(file)]


def command(config: RunConfig, tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`codecmill WORDS` with a config file."""
    return subprocess.run(
        with_config(config, tmp_path, *words),
        cwd=PROJECT,
        # What a shell may have for another server of Prefect.
        env=clean_environment() | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////dev/null/none.db"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def resumed(config: RunConfig) -> subprocess.CompletedProcess[str]:
    """`codecmill resume` of a config's run."""
    return subprocess.run(
        [sys.executable, "-m", "flows", "resume", config.name, "--root", str(config.root)],
        cwd=PROJECT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


@contextmanager
def under_way(config: RunConfig, tmp_path: Path, *words: str) -> "Iterator[subprocess.Popen[str]]":
    """`codecmill WORDS` under way; it and all that it started are gone afterwards."""
    with subprocess.Popen(
        with_config(config, tmp_path, *words),
        cwd=PROJECT,
        env=clean_environment(),
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def the_sentence(said: str) -> str:
    """The one sentence with which a command ends that failed."""
    (found,) = [line for line in said.splitlines() if line.startswith("codecmill: ")]
    assert "Traceback" not in said
    return found


@pytest.fixture
def first(tiny: dict[str, Any]) -> RunConfig:
    return make(tiny, name="first")


def test_one_command_leads_from_pictures_to_a_champion_and_the_next_builds_on_it(
    first: RunConfig, tmp_path: Path, empty_prefect_database: Path
):
    done = command(first, tmp_path, "run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 12
    told = ("Starting Prefect's server", "shards ", "training ", "upload ", "evaluation ", "registration ")
    assert [line for line in done.stderr.splitlines() if not line.startswith(told)] == []
    run = directory_of(first)
    registered = read_json(run.promotion_file)
    assert registered["alias"] == "champion"
    evaluation = next(run.path.glob("evaluation/step_*/evaluation.json"))
    assert (evaluation.parent / "report.html").is_file()
    _check_mlflow(run, registered)
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    said = {(each["stage"], each["rank"]) for each in events}
    assert said >= {("shards", None), ("training", None), ("training", 0), ("evaluation", None)}
    assert ("training", None, 12) in {(each["stage"], each["rank"], each["step"]) for each in events}
    with closing(sqlite3.connect(run.root.prefect_home / "prefect.db")) as database:
        heard = {event for (event,) in database.execute("SELECT event FROM events")}
    assert "prefect.flow-run.Running" in heard
    assert "prefect.flow-run.heartbeat" not in heard, "each flow would end up to a second later for it"

    begun = time.monotonic()
    again = command(first, tmp_path, "run")
    assert again.returncode == 0, again.stderr
    assert "done already; nothing was started" in again.stderr
    assert time.monotonic() - begun < 15

    copy_prefect_database(empty_prefect_database, tmp_path / "home")
    _check_from_python(first, tmp_path)


def _check_mlflow(run: RunDirectory, registered: dict[str, Any]) -> None:
    """MLflow has every step once, the config, the data set, pictures, checkpoints, the report, and the version."""
    marks = read_json(run.mlflow_file)
    champion = tracking.champion(run.root)
    assert champion is not None
    assert champion.number == registered["version"]
    assert champion.checkpoint_sha256 == registered["checkpoint_sha256"]
    with connected(run.root) as client:
        known = client.get_run(marks["run_id"])
        assert known.info.status == "FINISHED"
        assert known.data.params["training.batch_size"] == "4"
        assert known.inputs is not None
        (data,) = known.inputs.dataset_inputs
        assert champion.fingerprint.startswith(data.dataset.digest)
        for name in ("train/loss", "train/psnr", "train/learning_rate", "train/data_wait_fraction"):
            assert [point.step for point in client.get_metric_history(marks["run_id"], name)] == list(range(1, 13))
        assert [p.step for p in client.get_metric_history(marks["run_id"], "validation/psnr")] == [5, 10, 12]
        assert len(client.get_metric_history(marks["run_id"], "test/psnr")) == 1
        artifacts = {file.path for file in client.list_artifacts(marks["run_id"])}
        assert {"checkpoints", "evaluation", "images", "config.json"} <= artifacts
        stored = {file.path for file in client.list_artifacts(marks["run_id"], "checkpoints")}
        assert stored >= {f"checkpoints/{path.name}" for path in run.checkpoints.glob("step_*")}


FROM_PYTHON = """
import sys
from flows.pipeline import training_pipeline
from pipelines.config import RunConfig

with open(sys.argv[1]) as file:
    summary = training_pipeline(RunConfig.model_validate_json(file.read()))
print(summary.model_dump_json())
"""


EVALUATION = """
import sys
from flows.evaluation import evaluation
from pipelines.config import RunConfig

with open(sys.argv[1]) as file:
    config = RunConfig.model_validate_json(file.read())
print(evaluation(RunConfig(name=config.name, root=config.root)).model_dump_json())  # as from Prefect's form
"""


def from_python(program: str, config: RunConfig, tmp_path: Path, seconds: float) -> Any:
    """The JSON that a program prints last; it is given a config's file, and may take so many seconds."""
    file = tmp_path / f"{config.name}.json"
    file.write_text(config.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)],
        cwd=PROJECT,
        env=clean_environment() | {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _check_from_python(first: RunConfig, tmp_path: Path) -> None:
    """A deeper model from a Python prompt, beginning with the champion's weights as far as they fit."""
    config = first.model_copy(
        update={
            "name": "deeper",
            "model": first.model.model_copy(update={"residual_blocks": 2}),
            "training": first.training.model_copy(
                update={"start_from": "models:/codecmill@champion", "strict": False, "learning_rate": 1e-4}
            ),
        }
    )
    summary = from_python(FROM_PYTHON, config, tmp_path, seconds=240)
    run = directory_of(config)
    output = (run.logs / "attempt_01" / "output.log").read_text()
    assert "Starting from models:/codecmill@champion" in output
    assert "missing: decoder.stages.0.blocks.1.first.bias" in output
    parent = read_json(directory_of(first).promotion_file)["checkpoint_sha256"]
    with connected(run.root) as client:
        started_from = client.list_artifacts(read_json(run.mlflow_file)["run_id"], "start_from")
    assert [file.path for file in started_from] == ["start_from/load_report.json"]
    last = checkpoints.latest(run)
    assert last is not None
    assert last.manifest.parent == parent
    assert last.manifest.shard_set == read_json(directory_of(first).shard_set_file)["fingerprint"]
    assert len(list((config.root / "shards").glob("*/manifest.json"))) == 1, "the shards are not made again"
    assert summary["registration"]["version"] == "2"
    assert summary["registration"]["alias"] in ("champion", "candidate")
    assert "version 1" in summary["registration"]["reason"]


@pytest.mark.full
@pytest.mark.usefixtures("used_root")
def test_stopped_by_a_signal_the_command_says_what_is_saved_and_resume_ends_the_run(
    tiny: dict[str, Any], tmp_path: Path
):
    config = make(tiny, name="stopped", training={"steps": 400, "checkpoint_interval": 100_000, "processes": 2})
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json())
    run, begun = directory_of(config), [0]
    for number, code, *typed in (
        (signal.SIGINT, 130, "run", "--config", str(file)),
        (signal.SIGTERM, 143, "resume", "stopped", "--root", str(config.root)),
        (signal.SIGHUP, 129, "resume", "stopped", "--root", str(config.root)),
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "flows", *typed],
            cwd=PROJECT,
            env=clean_environment(),
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        wait_for(lambda: steps_done(run) >= begun[-1] + 10, 120)
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, said
        saved = checkpoints.latest(run)
        assert saved is not None
        assert saved.step == steps_done(run)
        assert f"Saved at step {saved.step}. Go on with: codecmill resume stopped" in said
        assert not ranks_alive(run)
        begun.append(saved.step)
    again = resumed(config)
    assert again.returncode == 0, again.stderr
    assert beginnings(run) == begun
    assert steps_done(run) == 400


@pytest.mark.full
@pytest.mark.usefixtures("used_root")
@pytest.mark.parametrize("when", ["while it waits for ranks that do not end", "while they save"])
def test_a_second_ctrl_c_ends_at_once_and_harms_nothing(
    tiny: dict[str, Any], tmp_path: Path, undisturbed: Undisturbed, when: str
):
    training = {"steps": 300, "processes": 2}
    config = make(tiny, name="twice", training=training | {"checkpoint_interval": 20})
    run = directory_of(config)
    with under_way(config, tmp_path, "train") as process:
        wait_for(lambda: steps_done(run) >= 50, 120)
        if when.startswith("while it waits"):
            os.kill(last_rank(run), signal.SIGSTOP)
        os.killpg(process.pid, signal.SIGINT)
        if when.startswith("while it waits"):
            wait_for(run.stop_request.is_file)  # the ranks were asked to end, and one of them cannot
        else:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        # At once: not when the time is over that ranks have to save and end.
        _, said = process.communicate(timeout=GRACE_SECONDS / 2)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    if when.startswith("while it waits"):
        assert "codecmill: Ended at once." in said
    wait_for(lambda: not ranks_alive(run), 30)
    assert [found.step for found in checkpoints.sound_checkpoints(run)] == checkpoints.steps_on_disk(run)[::-1]
    train(run)
    first, second = beginnings(run)
    assert (first, second >= 40) == (0, True)
    assert result(run) == undisturbed(make(tiny, training=training))


@pytest.mark.full
@pytest.mark.usefixtures("used_root")
def test_a_run_that_is_under_way_is_not_begun_a_second_time(tiny: dict[str, Any], tmp_path: Path):
    config = make(tiny, name="both", training={"steps": 100_000, "checkpoint_interval": 1000})
    run = directory_of(config)
    with under_way(config, tmp_path, "train") as process:
        wait_for(lambda: steps_done(run) >= 10, 120)
        second = command(config, tmp_path, "train")
        assert second.returncode == 3, second.stderr
        said = rf"codecmill: Run 'both' is in use by process {process.pid}\. Wait for it to end, or stop it\."
        assert re.fullmatch(said, the_sentence(second.stderr))
        assert process.poll() is None
        before = steps_done(run)
        wait_for(lambda: steps_done(run) > before)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert len(list(run.logs.glob("attempt_*"))) == 1, "the second has started no rank"
    assert [line["step"] for line in read(run.journal)] == list(range(1, steps_done(run) + 1))


@pytest.mark.full
@pytest.mark.usefixtures("used_root")
def test_past_a_damaged_checkpoint_a_run_goes_on_from_the_one_before_to_the_same_bits(
    tiny: dict[str, Any], tmp_path: Path, undisturbed: Undisturbed
):
    config = make(tiny, name="damaged", training={"steps": 40, "checkpoint_interval": 4})
    run = begin(config)
    train_and_kill(run, 14)
    *_, before, newest = checkpoints.steps_on_disk(run)
    file = checkpoints.folder_of(run, newest) / "training_state.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = command(config, tmp_path, "train")
    assert again.returncode == 0, again.stderr
    assert f"Skipping a damaged checkpoint: {file}" in again.stderr
    assert beginnings(run) == [0, before]
    assert result(run) == undisturbed(config)


@pytest.mark.full
@pytest.mark.usefixtures("used_root")
def test_a_shard_that_is_gone_is_made_anew_unless_the_images_have_changed(
    tiny: dict[str, Any], photos: Path, tmp_path: Path, undisturbed: Undisturbed
):
    images = tmp_path / "images"
    shutil.copytree(photos, images)
    training = {"steps": 40, "checkpoint_interval": 4}
    config = make(tiny, name="bereft", data={"images": str(images)}, training=training)
    run = begin(config)
    train_and_kill(run, 14)
    saved = checkpoints.steps_on_disk(run)
    tar = next(run.shard_set().glob("train-*.tar"))
    bytes_before = tar.read_bytes()
    tar.unlink()

    image = next(images.iterdir())
    image_before = image.read_bytes()
    picture(99, 100, 100).save(image)
    began_with = read_json(run.shard_set_file)
    refused = resumed(config)
    assert refused.returncode == 1, refused.stderr
    said = (
        rf"codecmill: Run 'bereft' began with shard set {began_with['fingerprint'][:16]}, which is not whole any more, "
    )
    said += r"and the images now make [0-9a-f]{16}\. Restore the set or the images as they were, "
    said += r"or start a new run with --name\."
    assert re.fullmatch(said, the_sentence(refused.stderr))
    assert read_json(run.shard_set_file) == began_with
    assert (checkpoints.steps_on_disk(run), len(beginnings(run))) == (saved, 1), "no rank was started"

    image.write_bytes(image_before)
    again = resumed(config)
    assert again.returncode == 0, again.stderr
    assert tar.read_bytes() == bytes_before
    assert read_json(run.shard_set_file) == began_with
    assert beginnings(run) == [0, saved[-1]]
    assert result(run) == undisturbed(make(tiny, training=training))


@pytest.mark.full
@pytest.mark.usefixtures("used_root")
def test_settings_that_shaped_the_weights_cannot_change_under_a_name(tiny: dict[str, Any], tmp_path: Path):
    begin(make(tiny, name="fixed"))
    changed = make(tiny, name="fixed", training={"learning_rate": 0.5})
    refused = command(changed, tmp_path, "train")
    assert refused.returncode == 2
    assert "training.learning_rate was 0.001 and cannot become 0.5" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.full
def test_threads_and_processes_make_the_same_shards(tiny: dict[str, Any], tmp_path: Path):
    written = []
    for runner in ("threads", "processes"):
        root = tmp_path / runner
        config = make(tiny, name="cut", root=str(root), data={"task_runner": runner, "workers": 2})
        done = command(config, tmp_path, "shards")
        assert done.returncode == 0, done.stderr
        written.append({tar.name: tar.read_bytes() for tar in root.glob("shards/*/*.tar")})
    assert len(written[0]) >= 3
    assert written[0] == written[1]


@pytest.mark.full
@pytest.mark.usefixtures("used_root")
def test_a_run_keeps_the_shard_set_that_it_began_with(tiny: dict[str, Any], photos: Path, tmp_path: Path):
    """Whether images come or go in between."""
    images = tmp_path / "images"
    shutil.copytree(photos, images)
    config = make(tiny, name="kept", data={"images": str(images)})
    run = begin(config)
    train(run)
    began_with = read_json(run.shard_set_file)
    picture(99, 100, 100).save(images / "new.png")
    longer = make(tiny, name="kept", data={"images": str(images)}, training={"steps": 15})
    assert command(longer, tmp_path, "train").returncode == 0
    assert read_json(run.shard_set_file) == began_with
    shutil.rmtree(images)
    longest = make(tiny, name="kept", data={"images": str(images)}, training={"steps": 18})
    done = command(longest, tmp_path, "train")
    assert done.returncode == 0, done.stderr
    last = checkpoints.latest(run)
    assert last is not None
    assert (last.step, last.manifest.shard_set) == (18, began_with["fingerprint"])
    assert len(list((config.root / "shards").glob("*/manifest.json"))) == 1


@pytest.mark.full
@pytest.mark.usefixtures("used_root")
def test_a_run_is_evaluated_again_and_tried_on_other_images(tiny: dict[str, Any], photos: Path, tmp_path: Path):
    config = make(tiny, name="tried")
    assert command(config, tmp_path, "run").returncode == 0
    run = directory_of(config)
    before = run.config_file.read_bytes()
    evaluate = [sys.executable, "-m", "flows", "evaluate", "tried", "--root", str(config.root)]
    options: dict[str, Any] = {"cwd": PROJECT, "env": clean_environment(), "capture_output": True, "text": True}
    psnr = read_json(next(run.path.glob("evaluation/step_*/evaluation.json")))["psnr"]
    again = subprocess.run(evaluate, **options, timeout=120)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(f"PSNR {psnr:.2f} dB over ")
    tried = subprocess.run([*evaluate, "--evaluation.images", str(photos), "--json"], **options, timeout=120)
    assert tried.returncode == 0, tried.stderr
    found = json.loads(tried.stdout)
    assert found["images"] == 12
    assert Path(found["path"]).parent == (run.path / "evaluation").absolute()
    assert (Path(found["path"]) / "report.html").is_file()
    assert run.config_file.read_bytes() == before, "what a run is tried on is no setting of it"
    assert tracking.champion(run.root) is not None
    with connected(run.root) as client:
        reports = {file.path for file in client.list_artifacts(read_json(run.mlflow_file)["run_id"], "evaluation")}
    assert f"evaluation/{Path(found['path']).name}" in reports

    run.write_config(make(run.read_config().model_dump(), evaluation={"images": str(photos)}))
    found = from_python(EVALUATION, config, tmp_path, seconds=120)
    assert found["images"] == 12, "what is not given is as the run has it"


def test_a_run_without_a_test_split_is_refused_before_it_begins(tiny: dict[str, Any], tmp_path: Path):
    config = make(tiny, name="untested", data={"test_fraction": 0})
    refused = command(config, tmp_path, "run")
    assert refused.returncode == 2
    assert "A whole run evaluates its model on the test split, but data.test_fraction is 0." in refused.stderr
    assert not directory_of(config).path.exists()


def test_no_task_asks_for_a_place_under_a_limit_before_it_begins():
    modules = [importlib.import_module(f"tasks.{each.name}") for each in pkgutil.iter_modules(tasks.__path__)]
    found = {value.name: value.tags for module in modules for value in vars(module).values() if isinstance(value, Task)}
    encode = encoding_by(lambda order: 0)
    found[encode.name] = encode.tags
    assert {"encode", "train", "evaluate"} <= found.keys()
    assert not any(found.values()), "a tag is asked for, and waited for, even if it has no limit"
