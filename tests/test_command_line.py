"""The command line as a program: what it prints, where, and with which exit code."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make
from processes import PROJECT, clean_environment, codecmill, codecmill_here, wait_for
from test_checkpoints import save

from flows.cli.choices import choices
from flows.cli.config_file import as_yaml, checked, effective_config, read_config_file
from flows.cli.demo import demo_values, find_photographs
from flows.cli.endings import Terminated
from flows.cli.flags import SPEAK_JSON
from flows.cli.options import COMMANDS, parse
from flows.cli.services import free_port
from flows.cli.starting import stops_explained
from pipelines.config import ModelConfig, RunConfig
from pipelines.data.shards import create_shards
from pipelines.errors import InputError, Interrupted
from pipelines.model.autoencoder import Autoencoder
from pipelines.run_directory import Root
from pipelines.training import rendezvous
from pipelines.weights import load_weights

PICTURE = Path(__file__).parents[1] / "infra" / "report.jpg"


def refused(*typed: str, cwd: Path) -> str:
    """The message of a command that exits with 2."""
    result = codecmill_here(*typed, cwd=cwd)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("codecmill: ")
    return result.stderr


HEAVY = """
import sys
from flows.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
heavy = {"torch", "prefect", "mlflow", "torchvision", "webdataset", "pydantic_settings", "numpy"} & set(sys.modules)
print("HEAVY", sorted(heavy))
"""


@pytest.mark.parametrize("typed", ["--help", "run --help", "list", "config", "status x", "run", "run --nmae x"])
def test_what_answers_at_once_imports_nothing_heavy(typed: str, tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-c", HEAVY, *typed.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.endswith("HEAVY []\n")


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_help_fits_the_terminal_and_names_all_commands_and_exit_codes(columns: int, tmp_path: Path):
    result = codecmill("--help", cwd=tmp_path, COLUMNS=str(columns))
    assert result.returncode == 0
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", result.stdout, re.MULTILINE)
    for code in ("0 done", "1 failed", "3 run is busy", "129 terminal lost", "130 Ctrl-C", "143 SIGTERM"):
        assert code in result.stdout
    if columns >= 80:
        assert max(map(len, result.stdout.splitlines())) <= columns


@pytest.mark.parametrize("columns", [80, 120])
def test_every_flag_is_explained_with_its_unit_bounds_and_default(columns: int, tmp_path: Path):
    text = codecmill("run", "--help", cwd=tmp_path, COLUMNS=str(columns)).stdout
    assert max(map(len, text.splitlines())) <= columns
    flat = " ".join(text.split())
    for section, model in [("", RunConfig), *((n, f.annotation) for n, f in RunConfig.model_fields.items())]:
        for name, field in getattr(model, "model_fields", {}).items():
            if not (section == "" and hasattr(field.annotation, "model_fields")):
                assert f"--{section}{'.' if section else ''}{field.alias or name} " in flat
                assert field.description is not None
                assert f"{field.description} [" in flat
    assert "--training.steps N Optimiser steps, a count [1 to 1000000000; default 2000]" in flat
    assert "--training.learning_rate X Adam's peak step size [above 0, at most 10; default 0.001]" in flat
    assert "--training.processes N|auto Ranks a host: a count, or auto (one a GPU; 1 without) [1 to 1024, " in flat
    assert "--data.patches grid|random Where patches" in flat


def test_root_is_a_flag_of_every_command(tmp_path: Path):
    for command in COMMANDS:
        assert "--root PATH" in codecmill_here(command, "--help", cwd=tmp_path).stdout


def test_each_field_can_be_given_as_a_flag():
    plain = RunConfig.model_validate({})
    typed = ["config"]
    for name, choice in choices().items():
        default = choice.default
        given = "null" if default is None else json.dumps(default) if isinstance(default, list) else str(default)
        typed += [f"--{name}", given]
    overrides = parse(typed).overrides
    assert {
        f"{s}.{k}" if isinstance(v, dict) else s
        for s, v in overrides.items()
        for k in (v if isinstance(v, dict) else [s])
    } == set(choices())
    assert checked(overrides, None, {}) == plain


@pytest.mark.parametrize(
    ("typed", "field", "value"),
    [
        (["--data.background", "0,10,255"], "data.background", (0, 10, 255)),
        (["--data.background", "[1, 2, 3]"], "data.background", (1, 2, 3)),
        (["--training.strict"], "training.strict", True),
        (["--training.strict", "false"], "training.strict", False),
        (["--no-training.strict"], "training.strict", False),
        (["--training.compile"], "training.compile", True),
        (["--training.compile", "auto"], "training.compile", "auto"),
        (["--training.processes=2"], "training.processes", 2),
        (["--training.processes", "auto"], "training.processes", "auto"),
        (["--data.normalization", "half"], "data.normalization", "half"),
        (["--training.learning_rate", "2e-4"], "training.learning_rate", 2e-4),
        (["--data.masks", "null"], "data.masks", None),
        (["--data.images", "{a,b}/*.png"], "data.images", "{a,b}/*.png"),
        (["--name", "12"], "name", "12"),
        (["--training.steps", "5", "--training.steps", "6"], "training.steps", 6),
    ],
)
def test_flags_become_values(typed: list[str], field: str, value: object):
    config = effective_config(None, parse(["run", *typed]).overrides)
    section, _, key = field.rpartition(".")
    assert getattr(getattr(config, section) if section else config, key) == value


def test_numbers_of_ones_own_for_the_normalisation():
    given = parse(["run", "--data.normalization", '{"mean": [0.1, 0.2, 0.3], "std": [1, 1, 2]}']).overrides
    assert effective_config(None, given).model_dump()["data"]["normalization"] == {
        "mean": (0.1, 0.2, 0.3),
        "std": (1.0, 1.0, 2.0),
    }


def test_only_given_flags_are_overrides():
    arguments = parse(["resume", "r", "--training.processes", "2", "--data.workers", "3", "--root", "/x"])
    assert arguments.overrides == {"training": {"processes": "2"}, "data": {"workers": "3"}, "root": "/x"}
    assert (arguments.run, arguments.root) == ("r", Path("/x"))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"name": "5", "data": {"images": "a: b # c 'é' {x}", "masks": "no", "normalization": "half"}},
        {"name": "2026-11-23", "data": {"normalization": {"mean": [0.1, 1e-7, 0], "std": [1, 2, 1e-9]}}},
        {"training": {"learning_rate": 1e-5, "compile": False, "processes": 2, "start_from": "models:/x@y"}},
    ],
)
def test_printed_config_reads_back_as_itself(config: dict[str, object], tmp_path: Path):
    expected = RunConfig.model_validate(config)
    file = tmp_path / "a.yaml"
    file.write_text(as_yaml(expected))
    assert effective_config(file, {}) == expected
    assert yaml.safe_load(file.read_text()) == expected.model_dump(mode="json")
    again = codecmill("config", "--config", str(file), cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, file.read_text())


def test_printed_config_says_what_each_value_may_be(tmp_path: Path):
    text = codecmill("config", "--training.steps", "7", cwd=tmp_path).stdout
    assert "\n  # Optimiser steps, a count [1 to 1000000000]\n  steps: 7\n" in text
    assert (
        "[round, clamped_round, sign, soft_to_hard, noise, universal, binarizer, fsq, vq, lfq or gumbel]\n"
        "  quantizer: round\n" in text
    )
    assert text.count("#") >= len(choices())


@pytest.mark.parametrize("file", sorted((PROJECT / "infra/configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_configs_that_come_along_are_whole_runs(file: Path):
    config = effective_config(file, {"data": {"images": "photos"}})
    config.must_have_a_test_split()
    assert config.model.entropy != "none"


def test_flags_go_over_the_file(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("name: from-file\ntraining:\n  steps: 10\n  batch_size: 3\n")
    result = codecmill("config", "--config", "c.yaml", "--training.steps", "11", cwd=tmp_path)
    values = yaml.safe_load(result.stdout)
    assert (values["name"], values["training"]["steps"], values["training"]["batch_size"]) == ("from-file", 11, 3)


def test_the_environment_is_no_config(tmp_path: Path):
    plain = codecmill("config", cwd=tmp_path).stdout
    odd = {"ROOT": "/x", "NAME": "y", "SEED": "9", "TRAINING__STEPS": "3", "DATA": "{}", "CODECMILL_NAME": "z"}
    assert codecmill("config", cwd=tmp_path, **odd).stdout == plain
    assert effective_config(None, {}) == RunConfig()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("rnu", "There is no command 'rnu'. Did you mean run? There are: run, shards, train"),
        ("--root=x list", "Flags follow the command, as in: codecmill list --root=x. See codecmill --help."),
        ("run --training.stps 3", "codecmill run has no flag --training.stps. Did you mean --training.steps"),
        ("run --steps 3", "codecmill run has no flag --steps. Did you mean --training.steps?"),
        ("run --training.batch-size=3", "has no flag --training.batch-size. Did you mean --training.batch_size"),
        ("evaluate r --training.steps 3", "evaluate has no flag --training.steps. See codecmill evaluate --help."),
        ("evaluate r --data.images x", "evaluate has no flag --data.images. Did you mean --evaluation.images? See"),
        ("resume r --seeed 3", "codecmill resume has no flag --seeed. See codecmill resume --help."),
        ("status r --confg 3", "codecmill status has no flag --confg. See codecmill status --help."),
        ("export r --jsn", "codecmill export has no flag --jsn. See codecmill export --help."),
        ("run --training.steps", "Argument --training.steps: expected one argument. See codecmill run --help."),
        ("run --training.steps 0", "--training.steps is 0, but must be 1 to 1000000000. (Optimiser steps, a count)"),
        ("run --training.steps many", "--training.steps is many, but must be a whole number, 1 to 1000000000."),
        ("run --training.steps 1e3", "--training.steps is 1e3, but must be a whole number, 1 to 1000000000."),
        ("run --training.learning_rate nan", "--training.learning_rate is nan, but must be above 0, at most 10."),
        ("run --training.processes x", "--training.processes is x, but must be a whole number, 1 to 1024, or auto."),
        ("run --training.precision f16", "f16, but must be auto, float32, bf16, fp16 or float64."),
        ("run --training.strict maybe", "--training.strict is maybe, but must be true or false."),
        ("run --data.background 0,0", "--data.background is 0,0, but must be 3 numbers 0 to 255."),
        ("run --data.normalization {", "--data.normalization is {, which is no JSON"),
        (
            "run --data.normalization {}",
            "--data.normalization is {}, but must be imagenet, half or dataset, or {mean: ",
        ),
        ("run --name a/b", "--name is a/b, but a run's name has 1 to 100 letters"),
        ("run --training.crop_size 100", "training.crop_size 100 is no multiple of 8"),
        ("run", "data.images is empty: name your images with --data.images"),
        ("resume nothing", "There is no run 'nothing' in "),
        ("status ../up", "There is no run '../up' in "),
        ("explain", "The following arguments are required: CHECKPOINT. See codecmill explain --help."),
        ("explain no/where", "There is no run 'no/where' in "),
        ("verify tests", "There is no run 'tests' in "),
        ("verify r --surces", "codecmill verify has no flag --surces. Did you mean --sources? See"),
        ("resume", "The following arguments are required: RUN. See codecmill resume --help."),
        ("resume a b", "codecmill resume does not know what to do with 'b'."),
        ("export a", "There is no run 'a' in "),
        (
            "run --data.images tests/*.py --evaluation.images nope/*.png",
            "data.images 'tests/*.py' matches no image",
        ),
        (f"run --data.images {PICTURE} --evaluation.images no/*.png", "evaluation.images 'no/*.png' matches no image"),
        (
            f"run --data.images {PICTURE} --training.start_from no.pt",
            "training.start_from 'no.pt' is no file",
        ),
        ("config --config missing.yaml", "The config missing.yaml cannot be read: No such file or directory."),
        ("ui --root nowhere", "/nowhere yet. Start with `codecmill demo`, or name another with --root."),
        ("clean --older-than abc", "Argument --older-than: abc is no number of days. See codecmill clean --help."),
        ("clean --older-than nan", "Argument --older-than: nan is no number of days."),
        ("compress a -o b --quality abc", "Argument --quality: abc is no quality, 1 to 100. See codecmill compress"),
        ("compress a -o b --quality 0.5", "Argument --quality: 0.5 is no quality, 1 to 100."),
        (
            "compress a -o b --target-bpp abc",
            "Argument --target-bpp: abc is no positive number. See codecmill compress",
        ),
        ("", "The following arguments are required: COMMAND. See codecmill --help."),
    ],
)
def test_what_cannot_be_used_is_one_clear_message(typed: str, message: str, tmp_path: Path):
    text = refused(*typed.split(), cwd=tmp_path)
    assert message in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        ("x" * 300, "File name too long"),
        (os.fsdecode(b"\xff"), "its name is no UTF-8 text"),
        ("a?b", "MLflow takes no database below a folder with a question mark in its name"),
    ],
)
@pytest.mark.parametrize("command", ["status r", "list", "shards --data.images x"])
def test_a_root_that_no_file_system_takes_is_one_clear_message(command: str, root: str, reason: str, tmp_path: Path):
    said = refused(*command.split(), "--root", root, cwd=tmp_path)
    assert f"cannot be used: {reason}. Name another with --root." in said
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_root_with_a_null_character_is_one_clear_message(tmp_path: Path):
    (tmp_path / "c.yaml").write_text('root: "\\0"\n')
    assert "its name has a null character" in refused("run", "--config", "c.yaml", cwd=tmp_path)


@pytest.mark.parametrize("typed", ["clean --runs --dry-run", "explain runs:/abc", "explain models:/codecmill/1"])
def test_who_only_looks_leaves_nothing_behind(typed: str, tmp_path: Path):
    codecmill_here(*typed.split(), "--root", "mistyped", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_config_may_come_from_a_pipe(tmp_path: Path):
    command = [sys.executable, "-m", "flows", "config", "--config", "/dev/stdin", "--training.steps", "77"]
    said = "name: mine\nseed: 7\nroot: elsewhere\ntraining: {steps: 5, batch_size: 3}\n"
    done = subprocess.run(command, cwd=PROJECT, input=said, capture_output=True, text=True, check=True)
    found = RunConfig.model_validate(yaml.safe_load(done.stdout))
    assert (found.name, found.seed, str(found.root)) == ("mine", 7, "elsewhere")
    assert (found.training.steps, found.training.batch_size) == (77, 3)


@pytest.mark.parametrize("command", ["config", "list", "status first"])
def test_where_nobody_reads_on_a_command_has_done_its_work(command: str, tmp_path: Path):
    Root(tmp_path).run("first").write_config(RunConfig(name="first", root=tmp_path))
    reading, writing = os.pipe()
    os.close(reading)
    typed = [sys.executable, "-m", "flows", *command.split(), "--root", str(tmp_path)]
    done = subprocess.run(typed, cwd=PROJECT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_needs_no_standard_output(tmp_path: Path):
    Root(tmp_path).run("first").write_config(RunConfig(name="first", root=tmp_path))
    script = f"exec {sys.executable} -m flows status first --root {tmp_path} >&-"
    done = subprocess.run(["bash", "-c", script], cwd=PROJECT, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_while_the_command_is_loaded_is_one_sentence():
    slow = """
import builtins, os, signal, sys
load = builtins.__import__
def interrupted(name, *rest):
    if name == "flows.cli.endings":
        os.kill(os.getpid(), signal.SIGINT)
    return load(name, *rest)
builtins.__import__ = interrupted
from flows.__main__ import main
sys.exit(main(["list"]))
"""
    done = subprocess.run([sys.executable, "-c", slow], cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "codecmill: Interrupted.\n")


@pytest.mark.parametrize("command", ["status", "explain", "verify", "audit", "export", "resume"])
def test_a_name_that_no_file_system_takes_is_one_clear_message(command: str, tmp_path: Path):
    name, root = "x" * 300, tmp_path / "root"
    Root(root).runs.mkdir(parents=True)  # else the name is not looked at
    said = refused(command, name, "--root", str(root), cwd=tmp_path)
    assert f"There is no run '{name}' in " in said
    assert len(said.splitlines()) == 1


def test_all_problems_are_told_at_once_with_their_file(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("training: {steps: 0, batchsize: 4}\nmodell: {}\ndata: 3\n")
    lines = refused("config", "--config", "c.yaml", "--seed=-1", cwd=tmp_path).splitlines()
    assert {line.removeprefix("codecmill: ") for line in lines} == {
        "--seed is -1, but must be 0 to 9223372036854775807. (Seed of every random choice)",
        "training.steps in c.yaml is 0, but must be 1 to 1000000000. (Optimiser steps, a count)",
        "training.batchsize in c.yaml is not known. Did you mean training.batch_size?",
        "data in c.yaml is 3, but must be a section of 'key: value' lines.",
        "modell in c.yaml is not known. Did you mean model?",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 1\nseed: 2\n", "line 2: 'seed' is given twice"),
        (b"training:\n  steps: 1\n  steps: 2\n", "line 3: 'steps' is given twice"),
        (b"a: [1\n", "no valid YAML: line 2"),
        (b"- 1\n- 2\n", "has no 'key: value' lines"),
        (b"\xff\xfe\x00", "cannot be read: it is no UTF-8 text"),
        (b"name: 2026-13-45\n", "no valid YAML: line 1: '2026-13-45' is no timestamp"),
        (b"seed: !!bool maybe\n", "no valid YAML: line 1: 'maybe' is no bool"),
        (b"seed: 0x" + b"f" * 5000, "no valid YAML: line 1: a number has too many digits"),
        (b"data: {<<: {images: a}}\n", "no valid YAML: line 1: '<<' is not understood here"),
        (
            b"name: !!python/object/apply:os.system ['true']\n",
            "no valid YAML: line 1: could not determine a constructor",
        ),
        (b"? [a, b]\n: 1\n", "no valid YAML: line 1"),
        (b"[" * 5000, "no valid YAML: line 1: there are too many brackets in brackets"),
        (b"#" * 50_001, "has more than 50,000 bytes: too large to be one"),
    ],
)
def test_a_file_that_is_no_config_is_explained(content: bytes, message: str, tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_config_file(file)
    assert str(file) in str(caught.value)


def test_endless_aliases_are_refused_in_a_short_message(tmp_path: Path):
    lines = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40))]
    (tmp_path / "c.yaml").write_text("\n".join(lines) + "\nseed: *a39\n")
    with pytest.raises(InputError, match=r"seed in .* must be a whole number, 0 to") as caught:
        effective_config(tmp_path / "c.yaml", {})
    assert len(str(caught.value)) < 20_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "training.steps: 5",
            "training.steps in c.yaml is not known as one key. Write two lines, the second indented: 'training:', "
            "'steps: 5'.",
        ),
        ("seed: yes", "seed in c.yaml is True, but must be a whole number, 0 to"),
        (
            "training: {learning_rate: yes}",
            "training.learning_rate in c.yaml is True, but must be above 0, at most 10.",
        ),
        ("training: {processes: true}", "training.processes in c.yaml is True, but must be a whole number, 1 to 1024"),
        ("training: {batch_size: 10.5}", "training.batch_size in c.yaml is 10.5, but must be a whole number, 1 to"),
    ],
)
def test_what_yaml_reads_otherwise_than_was_meant_is_explained(content: str, message: str, tmp_path: Path):
    (tmp_path / "c.yaml").write_text(content)
    assert message in refused("config", "--config", "c.yaml", cwd=tmp_path)


def test_an_empty_file_is_the_default_config(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert effective_config(tmp_path / "c.yaml", {}) == RunConfig()


def test_a_reader_that_stops_early_is_no_failure(tmp_path: Path):
    script = f"{sys.executable} -m flows config | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")


WORK = """
import sys
from pathlib import Path
from flows.cli import commands, endings
from flows.cli.display import shown_progress
from pipelines.progress import Progress, report
def work(arguments):
    with shown_progress():
        for done in range(100_000):
            report(Progress(f"stage {done}", done, 100_000, "steps"))
    Path("done").touch()
def fail(arguments):
    raise BrokenPipeError(32, "Broken pipe")
commands.perform = work if sys.argv[1] == "work" else fail
sys.exit(endings.carry_out(["config", "--debug"]))
"""


@pytest.mark.parametrize(
    ("what", "said"), [("work", r"stage 0 .*\n"), ("fail", r"(?s)codecmill: Unexpected BrokenPipe.*")]
)
def test_work_goes_on_where_nobody_looks_on_and_no_other_closed_pipe_is_its_success(
    what: str, said: str, tmp_path: Path
):
    lines = 1 if what == "work" else 100
    result = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {what} 2>&1 | head -{lines}; exit ${{PIPESTATUS[0]}}', sys.executable, WORK],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == (0 if what == "work" else 1)
    assert (tmp_path / "done").exists() == (what == "work")
    assert re.fullmatch(said, result.stdout), result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("typed", ["list", "status r", "config", "demo", "clean", f"run --data.images {PICTURE}"])
def test_a_root_that_lets_nobody_in_is_one_sentence(typed: str, tmp_path: Path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    # Root may look into every folder, but for the capabilities that let it.
    powerless = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*powerless, sys.executable, "-m", "flows", *typed.split(), "--root", closed / "root"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    closed.chmod(0o700)
    sentence = r"codecmill: (.*) cannot be used: Permission denied\. Choose another --root, or have whoever owns .*\.\n"
    found = re.fullmatch(sentence, done.stderr)
    assert found and found[1].startswith(f"{closed}/root"), done.stderr
    assert (done.returncode, done.stdout) == (2, "")


def test_the_readme_names_all_commands_that_speak_json():
    said = re.search(
        r"143\s+SIGTERM\.\s+([^.]*) and the stages speak\s+`--json`\.", (PROJECT / "README.md").read_text()
    )
    assert said
    assert set(re.findall(r"`(\w+)`", said[1])) == SPEAK_JSON - {"shards", "train", "evaluate"}


def test_a_root_below_a_file_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").touch()
    said = refused("demo", "--root", str(tmp_path / "file" / "root"), cwd=tmp_path)
    assert re.fullmatch(r".*/file/root/.* cannot be used: Not a directory\. Choose another --root, or move .*\n", said)


def test_the_unexpected_leaves_its_traceback_in_a_file(tmp_path: Path):
    def full(*flags: str) -> str:
        with Path("/dev/full").open("w") as output:
            result = subprocess.run(
                [sys.executable, "-m", "flows", "config", *flags],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
                stdout=output,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert result.returncode == 1
        return result.stderr

    message = full("--root", "here")
    found = re.fullmatch(
        r"codecmill: Unexpected OSError: \[Errno 28\] No space left on device\. "
        r"The traceback is in (\S+here/logs/error-\S+\.log); --debug shows it\.\n",
        message,
    )
    assert found
    assert "Traceback (most recent call last)" in Path(found[1]).read_text()
    assert "Traceback (most recent call last)" in full("--root", "here", "--debug")


def test_the_demos_photographs_are_there_and_differ():
    photographs = find_photographs()
    assert len(photographs) == 16
    assert len({path.read_bytes() for path in photographs}) == 16


def test_the_demos_config_is_one_and_lists_them(tmp_path: Path):
    config = RunConfig.model_validate(demo_values(tmp_path))
    assert config.data.images is not None
    assert list(map(Path, Path(config.data.images).read_text().splitlines())) == find_photographs()


def test_an_exported_run_is_read_back_strict(tmp_path: Path):
    run = Root(tmp_path).run("small")
    run.write_config(RunConfig.model_validate({"name": "small", "root": str(tmp_path)}))
    model = Autoencoder(ModelConfig(channels=8, latent_channels=4), seed=5)
    save(run, 7, weights=model.state_dict())
    done = codecmill_here("export", "small", "--format", "torch", "--root", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Wrote step 7 of 'small', its newest, as no validated one can be used, to small-step_7.pt\n"
    other = Autoencoder(ModelConfig(channels=8, latent_channels=4), seed=6)
    load_weights(other, tmp_path / "small-step_7.pt", strict=True)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_export_takes_the_best_checkpoint_and_says_so(tmp_path: Path):
    run = Root(tmp_path).run("small")
    run.write_config(RunConfig.model_validate({"name": "small", "root": str(tmp_path)}))
    for step, value in ((7, 1.0), (9, 2.0)):
        save(run, step, value=value, best={"step": 7.0, "psnr": 30.0})
    done = codecmill_here("export", "small", "-o", "out.pt", "--root", str(tmp_path), cwd=tmp_path)
    assert done.stdout == "Wrote step 7 of 'small', its best in validation, to out.pt\n", done.stderr
    weights = torch.load(tmp_path / "out.pt", weights_only=True)["encoder_state_dict"]["w"]
    assert torch.equal(weights, torch.full((3, 4), 1.0))


@pytest.mark.parametrize("command", ["list", "clean"])
def test_a_root_that_looks_like_markup_is_shown_as_it_is(command: str, tmp_path: Path):
    root = tmp_path / "a[" / "b]"
    done = codecmill_here(command, "--root", str(root), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    if command == "list":
        assert done.stdout == f"No runs in {root} yet. Start with: codecmill demo\n"


def test_export_takes_the_place_of_no_pipe_and_no_device(tmp_path: Path):
    run = Root(tmp_path).run("small")
    run.write_config(RunConfig.model_validate({"name": "small", "root": str(tmp_path)}))
    save(run, 7)
    os.mkfifo(tmp_path / "pipe")
    said = refused("export", "small", "-o", "pipe", "--root", str(tmp_path), cwd=tmp_path)
    assert said == "codecmill: pipe cannot be written: it is no regular file. Name another place with -o.\n"
    for folder in (".", "/"):
        said = refused("export", "small", "-o", folder, "--root", str(tmp_path), cwd=tmp_path)
        assert said == f"codecmill: {folder} is a folder. Name a file with -o.\n"
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("stop", "code"), [(KeyboardInterrupt(), 130), (Terminated(signal.SIGTERM), 143), (Terminated(signal.SIGHUP), 129)]
)
def test_who_stops_a_stage_without_a_run_reads_that_the_work_is_kept(tmp_path: Path, stop: BaseException, code: int):
    with (
        pytest.raises(Interrupted, match="the same command goes on from there") as found,
        stops_explained(Root(tmp_path).run("none")),
    ):
        raise stop
    assert found.value.exit_code == code


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_command_ends_with_its_terminal_unless_its_caller_ignores_that(is_kept: bool, tmp_path: Path):
    ours, theirs = os.openpty()
    meeting = f"127.0.0.1:{free_port()}"

    def begin() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        if is_kept:  # as by nohup, and by & in a script
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    with subprocess.Popen(
        [sys.executable, "-m", "flows", "rendezvous", meeting, "--root", str(tmp_path)],
        cwd=PROJECT,
        env=clean_environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=begin,
    ) as process:
        os.close(theirs)
        wait_for(rendezvous.parse(meeting).answers)
        os.close(ours)
        if is_kept:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
        # A signal that comes when all is done already ends it itself: 129 to a shell, too.
        assert process.wait(60) in ((143,) if is_kept else (129, -signal.SIGHUP))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("evaluate tiny --root root", "Stopped. What is done is kept, and the same command goes on from there."),
        (
            "train --config tiny.yaml",
            "Stopped. What is done is kept, and the same command with --name tiny goes on from there.",
        ),
        ("run --config tiny.yaml", "Saved at step 7. Go on with: codecmill resume tiny --root root"),
        (
            "resume tiny --root root --allow-inexact --training.threads 2",
            "Saved at step 7. Go on with: codecmill resume tiny --root root",
        ),
    ],
)
def test_who_is_stopped_reads_which_command_goes_on(typed: str, said: str, tiny: dict[str, Any], tmp_path: Path):
    """`codecmill resume` would do more than `train`, and nothing of an evaluation."""
    run = Root(tmp_path / "root").run("tiny")
    config = RunConfig.model_validate(tiny)
    run.write_config(config)
    save(run, 7)
    (tmp_path / "tiny.yaml").write_text(as_yaml(config))
    with subprocess.Popen(
        [sys.executable, "-m", "flows", *typed.split()],
        cwd=tmp_path,
        env={**clean_environment(), "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        started = next((line for line in lines if line.startswith("Starting Prefect's server")), None)
        process.send_signal(signal.SIGINT)
        last = [line for line in lines if line.startswith("codecmill: ")]
    assert started is not None
    assert (process.returncode, last) == (130, [f"codecmill: {said}\n"])
    if "inexact" in typed:
        assert run.read_config().training.threads == 2


def test_what_is_trained_to_its_end_is_not_said_to_have_been_trained_otherwise(tiny: dict[str, Any], tmp_path: Path):
    run = Root(Path(tiny["root"])).run("tiny")
    run.write_config(config := make(tiny, training={"precision": "float32"}))
    save(run, config.training.steps)
    given = ("resume", "tiny", "--root", str(run.root.path), "--allow-inexact", "--training.precision", "bf16")
    refused = codecmill(*given, cwd=tmp_path)
    assert refused.returncode == 2
    assert "nothing left to be done with another training.precision. Leave that as it was, or" in refused.stderr
    assert run.read_config() == config


def test_a_shard_set_that_is_made_is_found_without_a_server(tiny: dict[str, Any], tmp_path: Path):
    made = create_shards(RunConfig.model_validate(tiny))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny))
    closed = {"PREFECT_API_URL": "http://127.0.0.1:9/api"}  # the discard port: who would talk to a server fails
    found = codecmill("shards", "--config", "config.yaml", "--json", cwd=tmp_path, **closed)
    assert (found.returncode, json.loads(found.stdout)["fingerprint"]) == (0, made.fingerprint)
    next(made.path.glob("train-*.tar")).unlink()
    assert codecmill("shards", "--config", "config.yaml", cwd=tmp_path, **closed).returncode == 1, "there is work now"
