"""What became of a run goes to the store and comes from there whole: evaluations, and the registered version."""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import make, picture, tiny_config
from object_store import Proxy, the_store
from processes import PROJECT, clean_environment
from test_checkpoints import save
from test_pipeline import command
from trainings import begin, directory_of, train

from pipelines import checkpoints
from pipelines.config import EvaluationConfig, ModelConfig, RunConfig
from pipelines.data.images import Normalization
from pipelines.durable_files import json_bytes, read_json, write_json
from pipelines.evaluation.contents import made_at
from pipelines.evaluation.evaluate import Evaluation, evaluate, read_evaluation
from pipelines.model.autoencoder import Autoencoder
from pipelines.run_directory import Root, RunDirectory
from pipelines.status import run_status
from pipelines.storage import StoreUnavailable, bringing_results, patience
from pipelines.storage.bringing import bring, catch_up
from pipelines.storage.keys import complete_evaluations
from pipelines.storage.lease import Lease
from pipelines.storage.sending import Sending, bring_level
from pipelines.tracking.marks import Marks, write_marks
from pipelines.training.journal import Journal

NORMALIZATION = Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


@pytest.fixture(autouse=True)
def impatient(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "USUAL_SECONDS", 0.2)
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.02)


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    return Autoencoder(ModelConfig(channels=4, latent_channels=2, downsamplings=1), seed=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, photos: Path, model: Autoencoder) -> RunDirectory:
    """A run with its best checkpoint and its newest, of which the best was evaluated, and an evaluation of one that is
    gone; none of which any step was trained for."""
    run = begin(RunConfig.model_validate(tiny_config(tmp_path_factory.mktemp("made"), photos)))
    for step in (5, 12):
        save(run, step, best={"step": 5, "psnr": 30.0})
    with Journal(run.journal) as journal:
        for step in range(1, 13):
            journal.append(step, {"train/loss": 1 / step})
    evaluated(run, model, "step_00000002")
    evaluated(run, model, "step_00000005")
    return run


@pytest.fixture
def run(made: RunDirectory, tmp_path: Path) -> RunDirectory:
    """The run that was made, for a test to change; its shard set is the one that all have."""
    return RunDirectory(shutil.copytree(made.path, tmp_path / "root" / "runs" / "tiny"))


def evaluated(run: RunDirectory, model: Autoencoder, folder: str, images: int = 1) -> Evaluation:
    """Make an evaluation of a run, or make it again."""
    pictures = [(f"{number}.png", picture(number, 24, 20)) for number in range(images)]
    about = {"run": "tiny", "step": int(folder[5:13])}
    return evaluate(model, NORMALIZATION, pictures, run.evaluations / folder, EvaluationConfig(), about)


def elsewhere(tmp_path: Path, name: str = "elsewhere") -> RunDirectory:
    return Root(tmp_path / name).run("tiny")


def below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def in_the_store(folder: str) -> set[str]:
    """The files of an evaluation that the store has."""
    prefix = f"runs/tiny/evaluation/{folder}/"
    return {each.key.removeprefix(prefix) for each in the_store().list(prefix)}


def test_evaluations_are_sent_once_and_brought_as_they_were(run: RunDirectory, tmp_path: Path, proxy: Proxy):
    Sending(run, the_store()).send()
    puts = [path.partition("?")[0] for method, path in proxy.requests if method == "PUT"]
    of_best = [path for path in puts if "/evaluation/step_00000005/" in path]
    assert len(of_best) == 4 + 3
    assert of_best[-1].endswith("evaluation.json")
    assert max(i for i, path in enumerate(puts) if "/shards/" in path) < puts.index(of_best[0])
    proxy.requests.clear()
    (sending := Sending(run, the_store())).send()
    assert proxy.count("PUT", "") == 0
    asked = proxy.count("HEAD", "evaluation.json")
    sending.send()
    assert proxy.count("HEAD", "evaluation.json") == asked == 2, "as often as the training sends, it is not asked again"

    there = elsewhere(tmp_path)
    with there.locked():
        bring(there, the_store())
    assert [folder.name for folder in there.evaluations.iterdir()] == ["step_00000005"], (
        "the checkpoints' that are here"
    )
    assert below(there.evaluation(5)) == below(run.evaluation(5))
    found = run_status(there)
    assert found.psnr_of == "test"
    assert found.stages[2].state == "done"
    assert found.report == there.evaluation(5).absolute() / "report.html"


def test_half_an_evaluation_in_the_store_is_none(run: RunDirectory, tmp_path: Path, proxy: Proxy):
    proxy.break_("503", "PUT", "step_00000005/pictures")
    with pytest.raises(StoreUnavailable, match=r"00001-0/error\.png could not be sent"):
        Sending(run, the_store()).send()
    assert in_the_store("step_00000005")
    assert list(complete_evaluations(the_store(), "tiny")) == ["step_00000002"]
    there = elsewhere(tmp_path)
    with there.locked():
        bring(there, the_store())
    assert not there.evaluations.exists()
    assert run_status(there).stages[2].state == "missing"
    proxy.faults.clear()
    Sending(run, the_store()).send()
    with there.locked():
        bring(there, the_store())
    assert below(there.evaluation(5)) == below(run.evaluation(5))


def test_an_evaluation_that_is_made_again_takes_the_place_of_the_former_whole(
    run: RunDirectory, model: Autoencoder, proxy: Proxy
):
    folder = "step_00000005_0123abcd"
    evaluated(run, model, folder, images=2)
    Sending(run, the_store()).send()
    evaluated(run, model, folder, images=1)
    fault = proxy.break_("503", "PUT", f"{folder}/report.html")
    with pytest.raises(StoreUnavailable):
        Sending(run, the_store()).send()
    assert fault.met
    assert folder not in complete_evaluations(the_store(), "tiny"), "it has some files of each"
    proxy.faults.clear()
    Sending(run, the_store()).send()
    assert folder in complete_evaluations(the_store(), "tiny")
    assert in_the_store(folder) == set(below(run.evaluations / folder))


def test_what_is_not_whole_here_is_not_sent_and_what_is_not_whole_there_is_not_brought(
    run: RunDirectory, model: Autoencoder, tmp_path: Path, proxy: Proxy, caplog: pytest.LogCaptureFixture
):
    evaluated(run, model, "step_00000012")
    (run.evaluation(2) / "metrics.csv").write_text("")
    (sending := Sending(run, the_store())).send()
    sending.send()
    assert sorted(complete_evaluations(the_store(), "tiny")) == ["step_00000005", "step_00000012"]
    (said,) = [line for line in caplog.messages if line.startswith("An evaluation is not sent to the store: ")]
    assert said.endswith("step_00000002/metrics.csv has 0 bytes instead of 73.")

    (altered := tmp_path / "altered").write_bytes((run.evaluation(5) / "report.html").read_bytes() + b" ")
    the_store().send(altered, "runs/tiny/evaluation/step_00000005/report.html")
    (reaching := tmp_path / "reaching").write_bytes(_with_a_file(run.evaluation(12), "../../../evil.png"))
    the_store().send(reaching, "runs/tiny/evaluation/step_00000012/evaluation.json")
    there = elsewhere(tmp_path)
    with there.locked():
        assert bring(there, the_store()) is not None
    assert list(there.evaluations.glob("*")) == []
    skipped = [line for line in caplog.messages if line.startswith("Skipping an evaluation in the store: ")]
    assert re.search(r"report\.html was fetched \d times in \d s, .* bytes instead of", skipped[0])
    assert "step_00000012/evaluation.json does not say what its folder holds: files" in skipped[1]


def _with_a_file(folder: Path, name: str) -> bytes:
    about = read_json(folder / "evaluation.json")
    about["files"][name] = about["files"]["report.html"]
    return json_bytes(about)


@pytest.mark.parametrize(
    "part",
    [
        pytest.param("metrics.jsonl", marks=pytest.mark.full),
        pytest.param("step_00000012/model.safetensors", marks=pytest.mark.full),
        "step_00000005/metrics.csv",
    ],
)
def test_where_the_store_fails_while_a_run_is_brought_none_is_there_and_then_all_of_it(
    run: RunDirectory, tmp_path: Path, proxy: Proxy, part: str
):
    Sending(run, the_store()).send()
    there = elsewhere(tmp_path)
    proxy.break_("503", "GET", part)
    with there.locked():
        with pytest.raises(StoreUnavailable, match=f"{part} could not be fetched|{part} could not be read"):
            catch_up(there)
        assert there.root.all_runs() == []
        proxy.faults.clear()
        catch_up(there)
    assert there.journal.read_bytes() == run.journal.read_bytes()
    assert checkpoints.steps_on_disk(there) == [5, 12]
    assert run_status(there).stages[2].state == "done"


@pytest.mark.full
def test_the_later_of_two_evaluations_stands(run: RunDirectory, model: Autoencoder, tmp_path: Path, proxy: Proxy):
    Sending(run, the_store()).send()
    there = elsewhere(tmp_path)
    with there.locked():
        bring(there, the_store())
        own = evaluated(there, model, "step_00000005")
        bring(there, the_store())
        assert read_evaluation(own.folder) == own
        evaluated(run, model, "step_00000005")
        Sending(run, the_store()).send()
        Sending(there, the_store()).send()  # what it has is the earlier one
        bring(there, the_store())
        assert below(there.evaluation(5)) == below(run.evaluation(5))
        assert made_at(there.evaluation(5)) == pytest.approx(time.time(), abs=60)
        (own.folder / "evaluation.json").write_bytes(b"{}")
        bring(there, the_store())
    assert below(there.evaluation(5)) == below(run.evaluation(5))


@pytest.mark.full
def test_very_large_pictures_stay_in_the_store(
    run: RunDirectory, tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    Sending(run, the_store()).send()
    size = sum(file.stat().st_size for file in run.evaluation(5).glob("pictures/*/*"))
    monkeypatch.setattr(bringing_results, "MOST_PICTURE_BYTES", size - 1)
    there = elsewhere(tmp_path)
    with there.locked():
        bring(there, the_store())
        assert sorted(below(there.evaluation(5))) == ["evaluation.json", "metrics.csv", "report.html"]
        Sending(there, the_store()).send()
    assert in_the_store("step_00000005") == set(below(run.evaluation(5))), "and are not taken from it"


@pytest.mark.full
def test_the_registered_version_is_that_of_the_same_mlflow_alone(
    run: RunDirectory, tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    marks = Marks(run_id="1f", experiment_id="1", tracking_uri="http://mlflow.here:5000", journal_step=12)
    write_marks(run, marks)
    write_json(run.promotion_file, {"version": 3, "alias": "champion", "reason": "", "checkpoint_sha256": "0"})
    Sending(run, the_store()).send()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.there:5000")
    bring(elsewhere(tmp_path, "another"), the_store())
    assert not elsewhere(tmp_path, "another").promotion_file.exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.here:5000")
    there = elsewhere(tmp_path)
    bring(there, the_store())
    assert there.promotion_file.read_bytes() == run.promotion_file.read_bytes()
    for version, stands in ((4, True), (2, False)):
        write_json(there.promotion_file, {"version": version})
        bring(there, the_store())
        assert (read_json(there.promotion_file)["version"] == version) is stands


def test_an_evaluation_does_not_fail_with_the_store(
    run: RunDirectory, proxy: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    proxy.break_("503", "PUT", "evaluation/")
    with run.locked():
        bring_level(run)
        (said,) = [line for line in caplog.messages if "codecmill sync tiny" in line]
        assert said.startswith(f"The store gets what it is missing later, or by {run.command('sync')}: s3://")
        assert "could not be sent" in said
        proxy.faults.clear()
        bring_level(run)
    assert len(complete_evaluations(the_store(), "tiny")) == 2


def test_what_another_machine_works_on_is_not_sent(
    run: RunDirectory, proxy: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipelines.storage.lease.RENEW_SECONDS", 0.4)
    (there := elsewhere(tmp_path)).path.mkdir(parents=True)
    other = Lease(there, the_store())
    other.confirm()
    keeper = threading.Thread(target=other.keep)
    keeper.start()
    with run.locked():
        bring_level(run)
    other.release()
    keeper.join()
    assert f"by {run.command('sync')}: Run 'tiny' is in use by process" in caplog.text
    assert list(the_store().list("runs/tiny/evaluation/")) == []


def resumed_in(root: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`codecmill resume tiny` on a machine, which is a root here."""
    return subprocess.run(
        [sys.executable, "-m", "flows", "resume", "tiny", "--root", str(root), "--json"],
        cwd=PROJECT,
        env=clean_environment() | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.full
@pytest.mark.usefixtures("used_root")
def test_a_finished_run_is_finished_elsewhere_and_registered_in_another_mlflow_without_evaluation(
    tiny: dict[str, Any], tmp_path: Path, proxy: Proxy
):
    config = make(tiny)
    done = command(config, tmp_path, "run")
    assert done.returncode == 0, done.stderr
    run = directory_of(config)
    (folder,) = run.evaluations.iterdir()
    assert list(complete_evaluations(the_store(), "tiny")) == [folder.name]

    same = resumed_in(tmp_path / "same", MLFLOW_TRACKING_URI=f"sqlite:///{run.root.mlflow_database}")
    assert same.returncode == 0, same.stderr
    assert json.loads(same.stdout)["state"] == "done"
    assert "Starting Prefect's server" not in same.stderr
    assert below(tmp_path / "same" / "runs" / "tiny" / "evaluation") == below(run.evaluations)

    own = resumed_in(tmp_path / "own")
    assert own.returncode == 0, own.stderr
    there = Root(tmp_path / "own").run("tiny")
    assert run_status(there).state == "done"
    assert "registration " in own.stderr
    assert "evaluation " not in own.stderr
    assert below(there.evaluations) == below(run.evaluations)
    assert read_json(there.promotion_file)["checkpoint_sha256"] == read_json(run.promotion_file)["checkpoint_sha256"]


EVALUATE = """
import sys
from pathlib import Path
from flows.cli.starting import evaluation, run_flow
from pipelines.config import RunConfig
print(run_flow(evaluation, RunConfig(name="tiny", root=Path(sys.argv[1]))).path)
"""


@pytest.mark.full
def test_the_flow_evaluates_a_run_that_only_the_store_has(tiny: dict[str, Any], tmp_path: Path, proxy: Proxy):
    """As the deployment does on a worker, without the command that looks into the store first."""
    config = make(tiny)
    run = begin(config)
    best = train(run)
    Sending(run, the_store()).send()

    there = elsewhere(tmp_path)
    command_line = [sys.executable, "-c", EVALUATE, str(there.root.path)]
    done = subprocess.run(command_line, cwd=PROJECT, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = there.evaluations.iterdir()
    assert done.stdout.split()[-1] == str(folder)
    assert [each.sha256 for each in checkpoints.sound_checkpoints(there)][:1] == [best.sha256]
    assert list(complete_evaluations(the_store(), "tiny")) == [folder.name], "and what was made is in the store"
    assert proxy.count("PUT", "lease.json") > 0
