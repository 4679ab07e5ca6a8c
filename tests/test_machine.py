"""What `auto` is on this machine, found without torch, is what torch finds; what need not be loaded is not."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make
from processes import PROJECT

from flows.cli.config_file import effective_config
from flows.cli.options import parse
from infra.bench.programs import small_run
from infra.chaos.small_runs import SmallRun
from pipelines import processor_cores
from pipelines.config import RunConfig
from pipelines.data import batch_making
from pipelines.doctor import machine as doctor_machine
from pipelines.doctor.machine import examine_machine
from pipelines.errors import InputError
from pipelines.training import machine


def test_found_without_torch_is_what_torch_finds(monkeypatch: pytest.MonkeyPatch):
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    assert machine.usable_gpus() == seen
    for has_driver in (True, False):
        monkeypatch.setattr(machine, "_has_gpu_driver", lambda has=has_driver: has)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
        assert machine.usable_gpus() == (3 if has_driver else 0)


@pytest.mark.parametrize(
    ("vendor", "flags", "precision"),
    [
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", "bf16"),
        ("GenuineIntel", "avx512f avx512_bf16 avx512_fp16", "float32"),
        ("AuthenticAMD", "avx512f avx512_bf16", "bf16"),
        ("AuthenticAMD", "avx2 fma", "float32"),
    ],
)
def test_bf16_is_chosen_where_it_is_the_faster_one(
    vendor: str, flags: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "cpuinfo").write_text(2 * f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu sse2 {flags}\n\n")
    monkeypatch.setattr(machine, "PROCESSORS", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "usable_gpus", lambda: 0)
    assert machine.resolve(RunConfig()).training.precision == precision
    (told,) = [each for each in examine_machine() if each.about == "processor"]
    assert ("bf16 in hardware" in told.text) == (precision == "bf16")


def test_a_processor_that_is_said_to_have_bf16_has_it_for_torch():
    said, capable = machine.PROCESSORS.read_text().split(), torch.cpu.get_capabilities()
    for flag in ("amx_bf16", "avx512_bf16"):
        assert flag not in said or capable[flag]


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 64),
        ("0::/", {"cpu.max": "400000 100000"}, 4),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "10000 100000"}, 1),
        ("0::/", {"cpu.max": "12800000 100000"}, 64),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/on/the host/docker-1f", {"cpu.max": "200000 50000"}, 4),
        ("0::/../../x", {"cpu.max": "300000 100000"}, 3),
        ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("9:cpuset:/\n4:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"}, 3),
        ("9:cpuset:/\n0::/", {"cpuset/cpu.max": "100000 100000"}, 64),
        (None, {}, 64),
    ],
)
def test_cores_are_those_of_the_containers_quota(
    own: str | None, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As the kernel shows them inside, with and without a namespace for control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    shown = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    for name, content in (shown | ({"proc/self/cgroup": own} if own else {})).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert processor_cores.usable_cores(tmp_path) == cores


def test_threads_loading_and_doctor_go_by_the_usable_cores(monkeypatch: pytest.MonkeyPatch):
    for module in (machine, batch_making, doctor_machine):
        monkeypatch.setattr(module, "usable_cores", lambda: 3)
    monkeypatch.setattr(machine, "usable_gpus", lambda: 0)
    training = machine.resolve(RunConfig()).training
    assert training.threads == batch_making.threads_between_steps(training) == 3
    (told,) = [each for each in examine_machine() if each.about == "processor"]
    assert told.text.startswith("3 cores, ")


def test_nothing_is_compiled_where_pythons_headers_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As on a Debian without python3-dev: what is built to launch a kernel includes them."""
    monkeypatch.setattr(machine, "usable_gpus", lambda: 1)
    monkeypatch.setattr(machine, "bf16_pays", lambda device: False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    config = RunConfig.model_validate({"training": {"steps": 2000}})
    asked = config.training.model_copy(update={"compile": True})
    assert machine.resolve(config).training.compile is False
    with pytest.raises(InputError, match=f"no {tmp_path}/Python.h, which Python's headers bring .*training.compile"):
        machine.check(asked)
    (told,) = [each for each in examine_machine() if each.about == "compiler"]
    assert (told.state, f"no {tmp_path}/Python.h" in told.text) == ("note", True)
    (tmp_path / "Python.h").touch()
    assert machine.resolve(config).training.compile is True
    machine.check(asked)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="but there is no C\\+\\+ compiler"):
        machine.check(asked)


def test_tests_campaigns_and_the_benchmark_have_two_ranks_where_there_is_one_gpu(
    tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """`auto` would take the GPU, and refuse the second rank."""
    monkeypatch.setattr(machine, "usable_gpus", lambda: 1)
    disturbed = parse(SmallRun(tmp_path, "small", steps=32).command()[3:]).overrides
    measured = small_run.values(tmp_path, "pictures", 0)
    for values in (tiny, measured, small_run.on_cpu({}), effective_config(None, disturbed).model_dump()):
        machine.resolve(make(values, training={"processes": 2}))
    with pytest.raises(InputError, match="there are 1 GPUs"):
        machine.resolve(RunConfig.model_validate({"training": {"processes": 2}}))
    checked = SmallRun(tmp_path, "checked", 32, {"training.device": "cuda"}).command()
    assert [word for word in checked if "device" in word] == ["--training.device=cuda"], "gpu-check is about the GPU"


LOADED = """
import sys
BODY
print("LOADED", sorted({"torch", "torch._dynamo", "torchvision"} & set(sys.modules)))
"""

BEGIN = """
from pathlib import Path
from pipelines import processor_cores
from pipelines.config import RunConfig
from pipelines.runs import start_or_continue
start_or_continue(RunConfig.model_validate_json(Path("config.json").read_text()))
"""

RECONSTRUCT = """
from PIL import Image
from pipelines.config import ModelConfig
from pipelines.data.images import Normalization, to_image, to_tensor, to_unit
from pipelines.evaluation import stage
from pipelines.evaluation.evaluate import reconstruct
from pipelines.model.build import build_model
half = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
reconstruct(build_model(ModelConfig(channels=8), 0).eval(), half, Image.new("RGB", (40, 24)), 512)
"""


def test_a_run_is_begun_without_torch_but_where_it_is_asked_for_gpus(tmp_path: Path):
    assert loaded(BEGIN, tmp_path) == ("['torch']" if machine._has_gpu_driver() else "[]")


def test_an_image_is_reconstructed_without_torchvision_and_the_compiler(tmp_path: Path):
    """Each of the two takes as long to load as torch itself, in `evaluate`, `compress` and `decompress`."""
    assert loaded(RECONSTRUCT, tmp_path) == "['torch']"


def loaded(body: str, tmp_path: Path) -> str:
    """Which of the heavy packages a program has loaded in the end."""
    config = RunConfig.model_validate({"name": "begun", "root": str(tmp_path)})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", LOADED.replace("BODY", body)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1].removeprefix("LOADED ")
