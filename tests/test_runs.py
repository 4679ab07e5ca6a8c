"""Starting and continuing runs: what is resolved, what may change, and the lock."""

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from conftest import make
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from processes import wait_for
from pydantic import ValidationError

from flows.upkeep import cleaning, verification
from pipelines.config import EvaluationConfig, RunConfig
from pipelines.durable_files import write_json
from pipelines.errors import BusyError, CodecmillError, InputError
from pipelines.locks import lock
from pipelines.processor_cores import usable_cores
from pipelines.run_directory import Root, RunDirectory
from pipelines.runs import check_inputs, evaluation_of, merge, start_or_continue
from pipelines.training.machine import usable_gpus
from tasks.turns import turn


def config(root: Path, **training: object) -> RunConfig:
    return RunConfig.model_validate({"name": "r", "root": str(root), "training": {"device": "cpu"} | training})


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"evaluation": {"images": "no-such-folder"}}, "evaluation.images 'no-such-folder'"),
        ({"training": {"start_from": "no.safetensors"}}, "training.start_from 'no.safetensors' is no file or folder"),
        ({"training": {"start_from": "."}}, "training.start_from '.' is no checkpoint: name a run's"),
        ({"training": {"nodes": 2}}, "CODECMILL_RENDEZVOUS does not say where the hosts meet"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_started(
    changed: dict[str, Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CODECMILL_RENDEZVOUS", raising=False)
    with pytest.raises(InputError, match=text):
        check_inputs(make({"name": "r", "root": str(tmp_path)}, **changed))


def test_a_home_is_found_for_root_and_first_weights_and_empty_ones_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = config(Path("~/data"), start_from="~/first.safetensors")
    assert found.root == tmp_path / "data"
    assert found.training.start_from == str(tmp_path / "first.safetensors")
    assert config(tmp_path, start_from="models:/x@y").training.start_from == "models:/x@y"
    for root, must in (
        ("", "a folder: the working directory is '.'"),
        ("~nobody-at-all/x", "in the home of a user known"),
    ):
        with pytest.raises(ValidationError, match=must):
            RunConfig.model_validate({"root": root})
    former = config(tmp_path, start_from="")
    with pytest.raises(InputError, match=r"training.start_from is empty: name weights, or leave it out to start from"):
        start_or_continue(former)
    (run := Root(tmp_path).run(former.name)).write_config(former)
    assert start_or_continue(former) == run, "one that was begun so"


def test_a_config_is_read_where_the_working_directory_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a training does that goes on while its folder is checked out anew."""
    (run := Root(tmp_path).run("r")).write_config(config(tmp_path))
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert run.read_config() == config(tmp_path)


@pytest.mark.parametrize("flow", [verification, cleaning])
def test_a_root_that_is_not_there_is_not_found_in_order(flow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert flow.validate_parameters({"root": "~/data"})["root"] == tmp_path / "data", "its form leaves a '~' alone"
    with pytest.raises(InputError, match=r"There is no root .*/nowhere: name the folder"):
        flow.fn(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_auto_is_resolved_once_and_kept(tmp_path: Path):
    run = start_or_continue(config(tmp_path, device="auto"))
    resolved = run.read_config().training
    gpus = usable_gpus()
    assert resolved.device == ("cuda" if gpus else "cpu")
    assert resolved.processes == max(1, gpus)
    assert resolved.threads == (1 if gpus > 1 else usable_cores())
    assert resolved.precision in ("float32", "bf16")
    assert resolved.compile in (True, False)
    before = run.config_file.read_bytes()
    start_or_continue(config(tmp_path, device="auto"))
    assert run.config_file.read_bytes() == before


def test_several_ranks_have_one_thread_each(tmp_path: Path):
    assert start_or_continue(config(tmp_path, processes=2)).read_config().training.threads == 1


def test_processes_intervals_and_more_steps_may_change(tmp_path: Path):
    start_or_continue(config(tmp_path, steps=100))
    run = start_or_continue(config(tmp_path, steps=200, processes=2, checkpoint_interval=10))
    training = run.read_config().training
    assert (training.steps, training.processes, training.checkpoint_interval) == (200, 2, 10)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"training": {"learning_rate": 0.5}}, r"training.learning_rate was 0.001 and cannot become 0.5"),
        ({"training": {"steps": 5}}, r"training.steps was 2000 and cannot go down to 5"),
        ({"seed": 3}, r"seed was 0 and cannot become 3"),
        ({"data": {"images": "other"}}, r"data.images was '' and cannot become 'other'"),
        ({"data": {"normalization": "half"}}, r"data.normalization was 'dataset' and cannot become 'half'"),
    ],
)
def test_what_shapes_the_weights_cannot_change(changed: dict[str, object], text: str):
    old = RunConfig(name="r")
    with pytest.raises(InputError, match=text):
        merge(old, make({"name": "r"}, **changed))


def test_a_codec_of_one_lambda_is_gone_on_with_by_the_words_that_began_it(tmp_path: Path):
    """What a retry of Prefect's does, too. Its step follows from its lambda: 22 / lambda is the step's square."""
    codec = make({"name": "r", "root": str(tmp_path)}, model={"entropy": "factorized"}, loss={"lambda": 0.0055})
    begun = start_or_continue(codec).read_config()
    assert begun.model.step_range == pytest.approx((4000**0.5, 4000**0.5))
    assert start_or_continue(codec).read_config() == begun
    with pytest.raises(InputError, match=r"loss.lambda was 0.0055 and cannot become 0.01"):
        start_or_continue(make(codec.model_dump(), loss={"lambda": 0.01}))


def test_choices_that_do_not_go_together_with_what_a_run_began_with_are_one_sentence():
    old = make({"name": "r", "training": {"processes": 8, "batch_size": 8}})
    said = (
        "Run 'r' cannot go on with these settings beside those that it was started with: training.processes 8 on "
        "training.nodes 2 is more than training.batch_size 8: each rank needs at least one image of the global batch."
    )
    with pytest.raises(InputError) as refused:
        merge(old, make({"name": "r", "training": {"nodes": 2, "batch_size": 8}}))
    assert str(refused.value) == said


def test_a_run_is_evaluated_by_its_own_choices_where_none_are_given(tmp_path: Path):
    own = {"promotion_metric": "bd_rate", "promotion_margin": 2.0, "curve_images": 4}
    codec = {"model": {"entropy": "factorized"}, "training": {"device": "cpu"}}
    run = start_or_continue(make({"name": "r", "root": str(tmp_path)}, evaluation=own, **codec))
    assert evaluation_of(run, RunConfig(name="r").evaluation) == run.read_config().evaluation
    assert evaluation_of(run, EvaluationConfig(promotion_metric="psnr")).model_dump(exclude_defaults=True) == {
        "promotion_margin": 2.0,
        "curve_images": 4,
    }
    with pytest.raises(InputError, match=r"Run 'r' cannot go on with these .*bd_rate needs evaluation.curve_images ab"):
        evaluation_of(run, EvaluationConfig(curve_images=0))


@pytest.mark.parametrize(
    ("choices", "cause"),
    [
        ({"loss": {"lambda": 0.01}}, "loss.lambda 0.01"),
        ({"model": {"finest_step": 30, "coarsest_step": 30}}, "one model.finest_step and coarsest_step 30"),
    ],
)
@pytest.mark.parametrize("metric", ["bd_rate", "bd_rate_ms_ssim"])
def test_a_codec_of_one_quality_is_not_to_be_champion_by_curves(
    choices: dict[str, Any], cause: str, metric: str, tmp_path: Path
):
    """Said where such a run begins; one that was begun before goes on."""
    codec = {"entropy": "factorized"} | choices.get("model", {})
    values = {"name": "r", "root": str(tmp_path), "training": {"device": "cpu"}, **choices, "model": codec}
    refused = make(values, evaluation={"promotion_metric": metric})
    said = (
        f"evaluation.promotion_metric {metric} compares curves, but {cause} makes a codec of one quality, whose curve"
    )
    with pytest.raises(InputError, match=re.escape(said)):
        start_or_continue(refused)
    assert not (tmp_path / "runs").exists()
    if "loss" in choices:  # a range of steps beside the lambda has its curve
        make(
            values | {"model": codec | {"finest_step": 20}}, evaluation={"promotion_metric": metric}
        ).must_suit_a_new_run()
    run = start_or_continue(make(values))
    run.write_config(run.read_config().model_copy(update={"evaluation": refused.evaluation}))
    assert start_or_continue(refused) == run
    assert run.read_config().evaluation.promotion_metric == metric


def test_what_another_machine_may_not_have_changes_only_where_somebody_says_so():
    old, new = (make({"name": "r", "training": {"precision": each}}) for each in ("bf16", "float32"))
    with pytest.raises(InputError, match=r"precision was 'bf16' and cannot become 'float32' without resume --allow-in"):
        merge(old, new)
    assert merge(old, new, allow_inexact=True).training.precision == "float32"
    with pytest.raises(InputError, match=r"seed was 0 and cannot become 3"):
        merge(old, make({"name": "r"}, seed=3), allow_inexact=True)


TOO_LONG = ["x" * 101, "x" * 90 + "-{date}", "x" * 83 + "-{date}-{time}", "x" * 92 + "-{id}"]


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "-flag", "a b", "{color}", *TOO_LONG])
def test_a_name_that_is_no_plain_folder_name_is_refused(name: str):
    with pytest.raises(ValidationError):
        RunConfig(name=name)


def test_placeholders_are_filled_from_the_start():
    start = datetime(2026, 11, 23, 5, 6, 7, tzinfo=UTC)
    assert RunConfig(name="nightly-{date}").named(start).name == "nightly-2026-11-23"
    assert RunConfig(name="r-{date}-{time}").named(start).name == "r-2026-11-23-050607"
    assert RunConfig(name="{id}").named().name != RunConfig(name="{id}").named().name


def test_the_longest_name_that_is_taken_is_read_again_once_it_is_filled_in(tmp_path: Path):
    for rest in ("-{date}", "-{time}", "-{id}", ""):
        filled = 1 + {"-{date}": 10, "-{time}": 6, "-{id}": 8}[rest] if rest else 0
        named = RunConfig(name="x" * (100 - filled) + rest, root=tmp_path).named()
        assert len(named.name) == 100
        assert start_or_continue(named).read_config().name == named.name


HOLD = """
import sys, time
from pathlib import Path
from pipelines.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).locked(0):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_holder_is_refused_until_the_first_is_dead(tmp_path: Path):
    run = RunDirectory(tmp_path / "runs" / "r")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match=f"Run 'r' is in use by process {process.pid}"), run.locked(wait=0.2):
            raise AssertionError("held twice")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with run.locked(wait=0):
        assert run.lock_file.read_text() == f"{os.getpid()} {socket.gethostname()}\n"


def test_an_unknown_run_is_named_with_those_that_are_known(tmp_path: Path):
    start_or_continue(config(tmp_path))
    with pytest.raises(InputError, match=r"There is no run 'q' in .*runs\. The newest there: r\."):
        Root(tmp_path).existing_run("q")
    with pytest.raises(InputError, match=r"There is no run '\.\./runs/r'"):
        Root(tmp_path).existing_run("../runs/r")


def test_a_config_of_another_make_is_one_clear_error(tmp_path: Path):
    run = Root(tmp_path).run("r")
    write_json(run.config_file, {"name": "r", "colour": "red"})
    with pytest.raises(
        CodecmillError, match=r"config.json is no config of this version: colour: Extra inputs"
    ) as found:
        run.read_config()
    assert str(found.value).endswith(f"if it has a checkpoint, says: codecmill verify r{run.root.flag()}")
    run.config_file.unlink()
    with pytest.raises(CodecmillError, match=r"config.json cannot be read: No such file or directory. How to restore"):
        run.read_config()


def test_a_lock_is_of_the_file_that_is_there_and_for_whom_the_umask_lets_in(tmp_path: Path):
    file = tmp_path / "folder" / "lock"
    file.parent.mkdir()
    former = os.umask(0o002)
    try:
        with ThreadPoolExecutor() as threads, ExitStack() as second:
            with lock(file, "It", wait=0):
                assert stat.S_IMODE(file.stat().st_mode) == 0o664
                waiting = threads.submit(second.enter_context, lock(file, "It", wait=30))
                wait_for(lambda: len(opened(file)) == 2)
                shutil.rmtree(file.parent)
            waiting.result()
            with pytest.raises(BusyError, match="It is in use"), lock(file, "It", wait=0):
                pass
    finally:
        os.umask(former)


def opened(file: Path) -> list[Path]:
    """The descriptors of this process that are of a file."""
    return [each for each in Path("/proc/self/fd").iterdir() if each.resolve() == file]


def test_a_file_with_a_long_name_is_written(tmp_path: Path):
    write_json(tmp_path / ("\N{HIRAGANA LETTER A}" * 84), {})
    assert len(list(tmp_path.iterdir())) == 1


@contextmanager
def its_turn(root: Root, deployment: UUID, scheduled: bool) -> Iterator[Any]:
    flow_run = FlowRun(flow_id=uuid4(), deployment_id=deployment, auto_scheduled=scheduled)
    with FlowRunContext.model_construct(flow_run=flow_run), turn(root) as ended:
        yield ended


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_flow_run_of_a_deployment_holds_its_turn_and_only_those_that_are_scheduled_take_turns(
    scheduled: bool, tmp_path: Path
):
    root, deployment = Root(tmp_path), uuid4()
    with its_turn(root, deployment, scheduled) as free, its_turn(root, deployment, True) as cancelled:
        assert free is None
        assert cancelled.name == "Cancelled"
        assert cancelled.message.startswith(f"The turn of this schedule is in use by process {os.getpid()}.")
        with its_turn(root, deployment, False) as wanted, its_turn(root, uuid4(), True) as another:
            assert wanted is None and another is None
    with its_turn(root, deployment, True) as free:
        assert free is None
