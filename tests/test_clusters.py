"""Shards cut on Dask and on Ray, for real: the same bytes, also where a worker is killed in the midst of it."""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import make, picture
from processes import PROJECT, clean_environment, wait_for
from test_several_hosts import NAMESPACES

from pipelines.config import RunConfig
from pipelines.data.shards import create_shards
from pipelines.errors import InputError
from tasks import clusters

HAVE_RAY = importlib.util.find_spec("prefect_ray") is not None
without_ray = pytest.mark.skipif(not HAVE_RAY, reason="the extra 'ray' is not installed")


def words(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


@contextmanager
def dask_cluster(folder: Path) -> Iterator[tuple[dict[str, str], Callable[[], list[int]]]]:
    """A scheduler and two workers; yields how they are found, and the workers' processes."""
    program = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    file = folder / "scheduler.json"
    with ended([*program, "--no-dashboard", "--scheduler-file", str(file)], folder):
        wait_for(file.is_file)
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file), "--no-dashboard"]
        worker += ["--nthreads", "1", "--no-nanny", "--host", "127.0.0.1", "--local-directory", str(folder)]
        with ended(worker, folder) as one, ended(worker, folder) as other:
            address = json.loads(file.read_text())["address"]
            yield {"DASK_SCHEDULER_ADDRESS": address}, lambda: [one.pid, other.pid]


@contextmanager
def ray_cluster(folder: Path) -> Iterator[tuple[dict[str, str], Callable[[], list[int]]]]:
    """A head with two workers; without a token of the test's own, Ray would write one into the home folder."""
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of-this-test-alone-" * 3, "RAY_ADDRESS": "127.0.0.1:6379"}
    program = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus", "2"]
    program += ["--include-dashboard", "false"]
    # Its sockets' paths have 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="ray") as short, ended([*program, "--temp-dir", short], folder, access):
        wait_for(lambda: b"Ray runtime started" in (folder / "cluster.log").read_bytes())
        yield access, lambda: [each for each in processes() if words(each).startswith(b"ray::encode")]


def processes() -> list[int]:
    return [int(each.name) for each in Path("/proc").glob("[0-9]*")]


@contextmanager
def ended(program: list[str], folder: Path, more: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    environment = clean_environment() | {"PYTHONPATH": str(PROJECT)} | (more or {})
    with (folder / "cluster.log").open("ab") as log:
        process = subprocess.Popen(program, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def inside(name: str, config: Path) -> dict[str, Any]:
    """Cut shards on a cluster whose worker is killed, in network and process namespaces of its own."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    shards = RunConfig.model_validate_json(config.read_text()).root / "shards"
    parts = lambda: len(list(shards.glob("**/[!.]*.part")))  # noqa: E731
    cluster = {"dask": dask_cluster, "ray": ray_cluster}[name]
    command = [sys.executable, "-m", "flows", "shards", "--config", str(config)]
    with cluster(config.parent) as (addresses, workers):
        options: dict[str, Any] = {"cwd": PROJECT, "env": clean_environment() | addresses, "text": True}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as process:
            wait_for(lambda: (parts() >= 2 and bool(workers())) or process.poll() is not None)
            done = parts()
            for worker in workers()[-1:]:
                os.kill(worker, signal.SIGKILL)
            said, _ = process.communicate(timeout=120)
    return {"code": process.returncode, "said": said, "parts": done}


INSIDE = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tests")
import test_clusters
print(json.dumps(test_clusters.inside(sys.argv[1], Path(sys.argv[2]))))
"""


@pytest.mark.full
@pytest.mark.parametrize("name", ["dask", pytest.param("ray", marks=without_ray)])
def test_a_worker_that_is_killed_has_its_part_done_again_to_the_same_bytes(
    tiny: dict[str, Any], tmp_path: Path, name: str
):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(24):
        picture(number, 400 + number, 400).save(images / f"{number}.png")
    data = {"images": str(images), "patch_size": 64, "workers": 2, "compression": "small"}
    here = create_shards(make(tiny, root=str(tmp_path / "here"), data=data))
    config = make(tiny, root=str(tmp_path / "there"), data=data | {"task_runner": name})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    program = [sys.executable, "-c", INSIDE, name, str(tmp_path / "config.json")]
    done = subprocess.run([*NAMESPACES, *program], cwd=PROJECT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "cluster.log").read_text()
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["code"] == 0, seen["said"]
    assert 2 <= seen["parts"] < 24, "there was work left"
    there = tmp_path / "there" / "shards" / here.path.name
    assert digest(there / "manifest.json") == digest(here.path / "manifest.json"), "it names the digests of all files"
    assert [file.name for file in sorted(there.iterdir())] == [file.name for file in sorted(here.path.iterdir())]


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    with pytest.raises(InputError, match=r"data.task_runner is dask, which is not .* pip install .* '\.\[dask\]'"):
        clusters.dask(2)
    with pytest.raises(InputError, match=r"data.task_runner is ray, which is not .* pip install .* '\.\[ray\]'"):
        clusters.ray()


@without_ray
def test_ray_needs_a_cluster(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match=r"RAY_ADDRESS names no cluster\. Start one \(ray start --head\)"):
        clusters.ray()
