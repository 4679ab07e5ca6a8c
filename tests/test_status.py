"""What is told of a run from its files: each state, running by a real lock, and any damage without an error."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trainings
from conftest import make
from processes import codecmill

from pipelines import checkpoints
from pipelines.config import RunConfig
from pipelines.durable_files import read_json, write_json
from pipelines.run_directory import Root, RunDirectory
from pipelines.run_files import lock_owner
from pipelines.sealed_json import read_sealed, write_sealed
from pipelines.status import all_runs, run_status


def begin(root: Path, name: str = "r", steps: int = 20) -> RunDirectory:
    run = Root(root).run(name)
    run.write_config(RunConfig.model_validate({"name": name, "root": str(root), "training": {"steps": steps}}))
    return run


def add_shards(run: RunDirectory) -> Path:
    shards = run.root.shards / "abc123"
    write_json(shards / "manifest.json", {})
    write_json(run.shard_set_file, {"fingerprint": "abc123", "path": str(shards)})
    return shards


def add_checkpoint(run: RunDirectory, step: int) -> Path:
    folder = run.checkpoints / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345")
    files = {"model.safetensors": {"bytes": 5, "sha256": f"{step:064}"}}
    write_json(folder / "checkpoint.json", {"step": step, "files": files})
    return folder


def add_journal(run: RunDirectory, steps: int) -> None:
    lines = [{"step": s, "time": 1000.5 + s, "train/loss": 1 / s, "train/psnr": 20.0 + s} for s in range(1, steps + 1)]
    lines[steps // 2]["validation/psnr"] = 24.25
    run.journal.write_text("".join(json.dumps(line) + "\n" for line in lines))


def finish(run: RunDirectory) -> None:
    add_shards(run)
    add_journal(run, 20)
    add_checkpoint(run, 20)
    write_json(run.evaluation(20) / "evaluation.json", {"psnr": 31.5})
    (run.evaluation(20) / "report.html").write_text("<html>")
    promotion = {"version": 3, "alias": "champion", "reason": "the first", "checkpoint_sha256": f"{20:064}"}
    write_json(run.promotion_file, promotion)
    write_json(run.mlflow_file, {"run_id": "f00"})


def states(run: RunDirectory) -> dict[str, str]:
    return {stage.name: stage.state for stage in run_status(run).stages}


def test_a_new_run_has_everything_missing(tmp_path: Path):
    run = begin(tmp_path)
    found = run_status(run)
    assert found.state == "interrupted"
    assert set(states(run).values()) == {"missing"}
    assert (found.step, found.steps, found.psnr, found.checkpoint) == (0, 20, None, None)
    assert found.next_command == "codecmill resume r"
    assert found.problems == ()


def test_a_finished_run_names_everything_that_it_made(tmp_path: Path):
    run = begin(tmp_path)
    finish(run)
    found = run_status(run)
    assert found.state == "done"
    assert set(states(run).values()) == {"done"}
    assert (found.psnr, found.psnr_of) == (31.5, "test")
    assert (found.registered_version, found.alias, found.mlflow_run) == ("3", "champion", "f00")
    assert found.report == run.evaluation(20).absolute() / "report.html"
    assert found.fingerprint == "abc123"
    assert found.started.timestamp() == 1001.5
    assert found.size == sum(f.stat().st_size for f in run.path.rglob("*") if f.is_file())


def test_an_interrupted_training_is_known_by_its_newest_checkpoint(tmp_path: Path):
    run = begin(tmp_path)
    add_shards(run)
    add_checkpoint(run, 5)
    newest = add_checkpoint(run, 10)
    add_journal(run, 13)
    found = run_status(run)
    assert found.checkpoint == newest.absolute()
    assert states(run) == {
        "shards": "done",
        "training": "interrupted",
        "evaluation": "missing",
        "registration": "missing",
    }
    assert found.stages[1].detail == "10 of 20 steps"
    assert (found.psnr, found.psnr_of) == (24.25, "validation")


def test_more_steps_than_were_evaluated_ask_for_another_evaluation(tmp_path: Path):
    run = begin(tmp_path)
    finish(run)
    run.write_config(RunConfig.model_validate({"name": "r", "training": {"steps": 40}}))
    assert states(run)["training"] == "interrupted"
    add_checkpoint(run, 40)
    assert states(run)["training"] == "done"
    assert states(run)["evaluation"] == "missing"
    registration = run_status(run).stages[3]
    assert (registration.state, registration.detail) == (
        "missing",
        "version 3 has the weights of an earlier checkpoint",
    )


def test_a_run_is_done_when_its_best_checkpoint_is_evaluated_and_registered(tmp_path: Path):
    """Also where a later step was worse in validation."""
    run = begin(tmp_path)
    finish(run)
    best = {"best": {"step": 10, "psnr": 30.0}}
    add_checkpoint(run, 10)
    manifest = run.checkpoints / "step_00000020" / "checkpoint.json"
    write_json(manifest, read_json(manifest) | best)
    run.evaluation(20).rename(run.evaluation(5))
    assert states(run)["evaluation"] == "missing"
    run.evaluation(5).rename(run.evaluation(10))
    write_json(run.promotion_file, read_json(run.promotion_file) | {"checkpoint_sha256": f"{10:064}"})
    found = run_status(run)
    assert found.state == "done"
    assert found.report == (run.evaluation(10) / "report.html").absolute()
    assert found.step == 20


def test_a_run_whose_best_checkpoint_is_damaged_is_done_with_the_newest_in_its_place(tiny: dict[str, Any]):
    run = trainings.begin(make(tiny, training={"steps": 4, "checkpoint_interval": 2}))
    last = trainings.train(run)
    first = checkpoints.folder_of(run, 2)
    manifest, _ = read_sealed(last.path / "checkpoint.json")
    write_sealed(last.path / "checkpoint.json", manifest | {"best": {"step": 2, "psnr": 30.0, "loss": 0.1}})
    weights = first / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    standing = checkpoints.best(run)
    assert standing is not None
    write_json(run.evaluation(standing.step) / "evaluation.json", {"psnr": 31.5})
    write_json(run.promotion_file, {"version": 3, "alias": "champion", "checkpoint_sha256": standing.sha256})
    found = run_status(run)
    assert (standing.step, found.best_step, found.state) == (4, 4, "done")
    assert any("The best checkpoint cannot be used, the newest stands in: " in each for each in found.problems)
    weights.write_bytes(content)
    found = run_status(run)
    assert (found.best_step, found.state) == (2, "interrupted"), "the best is there again, and was never evaluated"


@pytest.mark.parametrize("step", ["1e999", "NaN", "-3", "9" * 400, "true", '"10"', "[]"])
def test_a_best_step_that_is_none_leaves_the_newest(step: str, tmp_path: Path):
    run = begin(tmp_path)
    finish(run)
    manifest = run.checkpoints / "step_00000020" / "checkpoint.json"
    manifest.write_text(manifest.read_text().rstrip().removesuffix("}") + f', "best": {{"step": {step}}}}}')
    assert run_status(run).state == "done"


def test_shards_that_were_deleted_are_missing(tmp_path: Path):
    run = begin(tmp_path)
    (add_shards(run) / "manifest.json").unlink()
    stage = run_status(run).stages[0]
    assert (stage.state, stage.detail) == ("missing", f"{tmp_path / 'shards' / 'abc123'} is gone")


def test_shards_are_found_under_a_root_that_was_moved(tmp_path: Path):
    """So that its finished runs are done, and the others go on where the images are not."""
    finish(begin(tmp_path / "old", "first"))
    (tmp_path / "old").rename(tmp_path / "new")
    found = run_status(Root(tmp_path / "new").run("first"))
    assert found.state == "done"
    assert found.shard_set == tmp_path / "new" / "shards" / "abc123"
    assert found.stages[0].detail == str(found.shard_set)


def test_a_checkpoint_that_is_cut_is_passed_over(tmp_path: Path):
    run = begin(tmp_path)
    good = add_checkpoint(run, 5)
    (add_checkpoint(run, 10) / "model.safetensors").write_bytes(b"123")
    (add_checkpoint(run, 15) / "checkpoint.json").unlink()
    found = run_status(run)
    assert found.checkpoint == good.absolute()
    assert len(found.problems) == 2
    assert "step_00000010 is no complete checkpoint" in found.problems[1]


def test_checkpoints_that_are_all_cut_are_damage(tmp_path: Path):
    run = begin(tmp_path)
    (add_checkpoint(run, 10) / "model.safetensors").unlink()
    assert states(run)["training"] == "damaged"


HOLD = """
import sys, time
from pathlib import Path
from pipelines.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).locked(0):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_is_running_while_its_lock_is_held(tmp_path: Path):
    run = begin(tmp_path)
    add_shards(run)
    assert lock_owner(run) is None
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"held\n"
        found = run_status(run)
        assert (found.state, found.owner) == ("running", process.pid)
        assert states(run)["training"] == "running"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert run_status(run).state == "interrupted"


def test_asking_for_the_state_leaves_the_lock_free(tmp_path: Path):
    run = begin(tmp_path)
    with run.locked(0):
        assert lock_owner(run) == os.getpid()
    assert lock_owner(run) is None
    with run.locked(0):
        pass


DAMAGE = {
    "empty": b"",
    "cut": b'{"step": 20, "fi',
    "binary": bytes(range(256)),
    "a list": b"[1, 2]",
    "null": b"null",
    "other types": b'{"step": "x", "files": [1], "path": 3, "fingerprint": [], "psnr": "high", "version": {}}',
    "huge numbers": b'{"step": 1e999, "psnr": NaN, "version": ' + b"9" * 5000 + b', "time": 1e300}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "shard_set.json",
        "metrics.jsonl",
        "mlflow_run.json",
        "promotion.json",
        "evaluation/step_00000020/evaluation.json",
        "checkpoints/step_00000020/checkpoint.json",
        ".lock",
    ],
)
def test_any_damaged_file_is_survived(file: str, damage: str, tmp_path: Path):
    run = begin(tmp_path)
    finish(run)
    (run.path / file).write_bytes(DAMAGE[damage])
    found = run_status(run)
    assert json.loads(found.model_dump_json())
    if file == "config.json":
        assert found.state == "damaged"
        assert found.next_command == "codecmill run --name ANOTHER"
    if file not in (".lock", "metrics.jsonl") and damage in ("empty", "cut", "binary", "a list", "null", "deep"):
        assert any(str(run.path / file) in problem for problem in found.problems)


@pytest.mark.parametrize("file", ["config.json", "shard_set.json", "metrics.jsonl", "promotion.json", ".lock"])
def test_a_folder_in_a_files_place_is_survived(file: str, tmp_path: Path):
    run = begin(tmp_path)
    finish(run)
    (run.path / file).unlink(missing_ok=True)
    (run.path / file).mkdir()
    found = run_status(run)
    assert json.loads(found.model_dump_json())
    if file not in (".lock", "metrics.jsonl"):
        assert any(str(run.path / file) in problem for problem in found.problems)


def test_the_newest_figures_are_found_at_the_end_of_a_long_journal(tmp_path: Path):
    run = begin(tmp_path, steps=5000)
    add_journal(run, 5000)
    with run.journal.open("ab") as journal:
        journal.write(b'{"step": 5001, "train/ps')
    assert run.journal.stat().st_size > 300_000
    found = run_status(run)
    assert (found.psnr, found.psnr_of) == (5020.0, "training")


def test_all_runs_are_listed_newest_last(tmp_path: Path):
    for name, second in [("b", 300), ("c", 100), ("a", 200)]:
        os.utime(begin(tmp_path, name).config_file, (second, second))
    assert [run.name for run in all_runs(Root(tmp_path))] == ["c", "a", "b"]
    assert all_runs(Root(tmp_path / "nothing")) == []


def shown(*typed: str, cwd: Path) -> str:
    return subprocess.run(
        [sys.executable, "-m", "flows", *typed],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_list_and_status_as_people_and_as_programs_read_them(tmp_path: Path):
    finish(begin(tmp_path, "first"))
    write_json(begin(tmp_path, "second").config_file, {"name": "second", "colour": "red"})
    lines = shown("list", "--root", ".", cwd=tmp_path).splitlines()
    assert len(lines) == 3
    assert lines[0].split() == ["run", "state", "steps", "PSNR", "dB", "shards", "started", "size"]
    assert lines[1].split()[:6] == ["first", "done", "20/20", "31.50", "test", "abc123"]
    assert lines[2].split()[:3] == ["second", "damaged", "0/?"]
    listed = json.loads(shown("list", "--root", ".", "--json", cwd=tmp_path))
    assert [(run["name"], run["state"], run["psnr"]) for run in listed] == [
        ("first", "done", 31.5),
        ("second", "damaged", None),
    ]

    text = shown("status", "first", "--root", ".", cwd=tmp_path)
    assert "Run first is done" in text
    assert "✓ training     done         20 of 20 steps" in text
    assert "Next: codecmill ui --root ." in text
    status = json.loads(shown("status", "first", "--root", ".", "--json", cwd=tmp_path))
    assert {stage["state"] for stage in status["stages"]} == {"done"}
    assert "colour: Extra inputs" in shown("status", "second", "--root", ".", cwd=tmp_path)


@pytest.mark.parametrize(
    ("columns", "titles"),
    [
        (100, ["run", "state", "steps", "PSNR", "dB", "shards", "started", "size"]),
        (72, ["run", "state", "steps", "PSNR", "dB", "shards", "started"]),
        (50, ["run", "state", "steps", "PSNR", "dB"]),
        (30, ["run", "state"]),
    ],
)
def test_in_a_narrow_terminal_the_list_has_names_and_states(tmp_path: Path, columns: int, titles: list[str]):
    name = "run-20261127-1530"
    finish(begin(tmp_path, name))
    lines = on_terminal("list", "--root", ".", cwd=tmp_path, columns=columns).split("\n")
    assert lines[0].split() == titles
    assert lines[1].split()[0] == name


def on_terminal(*typed: str, cwd: Path, columns: int) -> str:
    """What a command prints on a terminal of so many columns, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "TERM": "xterm", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "flows", *typed]
    with subprocess.Popen(command, cwd=cwd, env=environment, stdin=theirs, stdout=theirs) as process:
        os.close(theirs)
        said = b""
        with suppress(OSError), os.fdopen(ours, "rb", buffering=0) as terminal:  # it is gone with the command
            while content := terminal.read(4096):
                said += content
    assert process.returncode == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", said.decode().replace("\r\n", "\n"))


def test_a_run_without_a_test_split_is_done_when_it_is_trained(tmp_path: Path):
    """`codecmill train` makes such runs."""
    run = begin(tmp_path / "data", "only-trained")
    run.write_config(RunConfig.model_validate({**run.read_config().model_dump(), "data": {"test_fraction": 0}}))
    add_shards(run)
    add_checkpoint(run, 10)
    assert run_status(run).next_command == "codecmill resume only-trained"
    typed = ["resume", "only-trained", "--root", str(tmp_path / "data")]
    nowhere = {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    going_on = codecmill(*typed, cwd=tmp_path, **nowhere)
    assert "Prefect's server at http://127.0.0.1:9/api" in going_on.stderr, "no test split is asked for"
    add_checkpoint(run, 20)
    found = run_status(run)
    assert (found.state, {stage.state for stage in found.stages}) == ("done", {"done"})
    done = codecmill(*typed, cwd=tmp_path, **nowhere)
    assert (done.returncode, done.stderr) == (
        0,
        "Everything of 'only-trained' is done already; nothing was started.\n",
    )


def test_a_finished_run_is_said_to_be_done_without_starting_anything(tmp_path: Path):
    finish(begin(tmp_path / "data", "first"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for command in (["resume", "first"], ["run", "--name", "first", "--training.steps", "20"]):
        result = subprocess.run(
            [sys.executable, "-m", "flows", *command, "--root", str(tmp_path / "data")],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "Everything of 'first' is done already; nothing was started." in result.stderr
        assert "Report      " in result.stdout
        assert "Registered  codecmill version 3, champion" in result.stdout
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["runs", "shards"]


def test_a_run_that_is_to_be_tried_on_other_images_is_done_once_it_was(tmp_path: Path):
    run = begin(tmp_path, "first")
    finish(run)
    run.write_config(RunConfig.model_validate(run.read_config().model_dump() | {"evaluation": {"images": "others"}}))

    def ended(command: str) -> tuple[int, str]:
        result = codecmill(command, "first", "--root", str(tmp_path), cwd=tmp_path)
        return result.returncode, result.stderr

    found = run_status(run)
    assert (found.state, found.next_command) == ("interrupted", "codecmill resume first")
    assert "not evaluated on others yet" in [stage.detail for stage in found.stages]
    code, said = ended("resume")
    assert code == 2, "it sets about the evaluation that is missing"
    assert "evaluation.images 'others' matches no image" in said
    write_json(run.evaluation(20, "others") / "evaluation.json", {"psnr": 30.5})
    assert run_status(run).state == "done"
    assert ended("resume") == (0, "Everything of 'first' is done already; nothing was started.\n")


def test_what_cannot_change_is_refused_before_anything_starts(tmp_path: Path):
    begin(tmp_path / "data", "first")
    result = subprocess.run(
        [sys.executable, "-m", "flows", "resume", "first", "--model.channels", "8", "--root", str(tmp_path / "data")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "model.channels was 64 and cannot become 8" in result.stderr
