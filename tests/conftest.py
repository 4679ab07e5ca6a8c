"""What most tests need: a few generated pictures, and a config small enough to train in seconds."""

import errno
import fcntl
import os
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from object_store import AWS, BUCKET, Proxy, proxy_to, s3_server
from PIL import Image
from trainings import Undisturbed

from flows.cli.prefect_server import EmbeddedServer
from pipelines import storage, tracking
from pipelines.config import RunConfig
from pipelines.run_directory import Root
from pipelines.storage import patience
from pipelines.training import rendezvous

# On tensors this small a second thread helps nobody, and where others are at work it costs five times the CPU: OpenMP's
# threads spin while they wait for each other. What is about threads sets their number itself.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Started by & in a script, or by nohup, they would ignore these, and so would all that they start and stop by them.
# A handler, be it one that does nothing, is not handed on.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

# Those of whoever starts the tests: a test that is about them names its own.
for variable in (storage.STORE, rendezvous.VARIABLE):
    os.environ.pop(variable, None)


LONGEST = (
    *("test_training", "test_chaos", "test_pipeline", "test_storage", "test_several_hosts", "test_virtual_ranks"),
    *("test_dead_runs", "test_own_servers", "test_watching", "test_deployment", "test_restarts", "test_sharded"),
    *("test_outages", "test_reproducing", "test_results_in_store", "test_full_disk"),
)
"""Files of tests that take minutes. Each process takes the next file when it has done one: these first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def picture(number: int, width: int, height: int) -> Image.Image:
    """A smooth coloured pattern with some grain, another for each number."""
    random = np.random.Generator(np.random.Philox(number))
    y, x = np.mgrid[0:height, 0:width] / 40
    channels = [
        128 + 100 * np.sin(x * random.uniform(0.5, 3) + y * random.uniform(0.5, 3) + random.uniform(0, 6))
        for _ in range(3)
    ]
    grain = random.normal(0, 4, (height, width, 3))
    return Image.fromarray(np.clip(np.stack(channels, axis=-1) + grain, 0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve pictures of several sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(12):
        picture(number, 96 + 8 * number, 112 - 4 * number).save(folder / f"photo {number:02d}.png")
    return folder


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables and nothing in it: making one takes 4 seconds."""
    root = Root(tmp_path_factory.mktemp("mlflow"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert tracking.champion(root) is None
    return root.mlflow_database


@pytest.fixture(scope="session")
def empty_prefect_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with Prefect's tables and nothing in it: making one takes 3 seconds of a server's first start."""
    root = Root(tmp_path_factory.mktemp("prefect"))
    server = EmbeddedServer(root)
    try:
        server.wait_ready()
    finally:
        server.close()
    return root.prefect_home / "prefect.db"


@pytest.fixture
def used_root(tiny: dict[str, Any], empty_database: Path, empty_prefect_database: Path) -> Root:
    """The root of `tiny` with the databases that a first command has made, for tests of something else."""
    return with_databases(Root(Path(tiny["root"])), empty_database, empty_prefect_database)


def with_databases(root: Root, empty_database: Path, empty_prefect_database: Path) -> Root:
    """A root with copies of both databases."""
    copy_prefect_database(empty_prefect_database, root.prefect_home)
    shutil.copy(empty_database, root.mlflow_database)
    return root


def copy_prefect_database(made: Path, home: Path) -> None:
    """Into a PREFECT_HOME, also what the server that made it has left beside it, in its write-ahead log."""
    home.mkdir(parents=True)
    with closing(sqlite3.connect(made)) as source, closing(sqlite3.connect(home / "prefect.db")) as copy:
        source.backup(copy)


@pytest.fixture
def tiny(tmp_path: Path, photos: Path) -> dict[str, Any]:
    return tiny_config(tmp_path / "root", photos)


def tiny_config(root: Path, photos: Path) -> dict[str, Any]:
    """A config as nested dictionaries, to be varied: twelve steps of a small model on the generated pictures."""
    return {
        "name": "tiny",
        "root": str(root),
        "data": {"images": str(photos), "patch_size": 32, "workers": 1, "validation_fraction": 0.2},
        "model": {"channels": 8, "latent_channels": 4, "downsamplings": 2},
        "training": {
            "steps": 12,
            "batch_size": 4,
            "crop_size": 16,
            "device": "cpu",  # else a machine with one GPU refuses the tests two ranks
            "processes": 1,
            "threads": 1,
            "precision": "float32",
            "compile": False,
            "warmup_steps": 2,
            "checkpoint_interval": 5,
            "validation_interval": 5,
            "replica_check_interval": 3,
        },
    }


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def way_to_s3() -> Iterator[Proxy]:
    """An S3 server for all tests, behind a proxy."""
    with s3_server() as address, proxy_to(address) as proxy:
        yield proxy


@pytest.fixture
def proxy(way_to_s3: Proxy, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Proxy]:
    """A way to an S3 server that can be broken; the environment names a store behind it, of this test alone."""
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", way_to_s3.address)
    monkeypatch.setenv(storage.STORE, f"s3://{BUCKET}/{sha256(request.node.nodeid.encode()).hexdigest()[:12]}")
    monkeypatch.setattr(patience, "USUAL_SECONDS", 2.0)
    way_to_s3.requests.clear()
    yield way_to_s3
    way_to_s3.faults.clear()
    way_to_s3.takes_conditions = True


@pytest.fixture
def nfs_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks as on NFS: an exclusive one is only for descriptors that may be written to."""
    flock = fcntl.flock

    def nfs_flock(descriptor: int, how: int) -> None:
        if how & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", nfs_flock)


def make(config: dict[str, Any], **sections: Any) -> RunConfig:
    """A RunConfig from nested dictionaries, with sections or fields replaced."""
    merged = {
        key: value | sections.pop(key) if isinstance(value, dict) and key in sections else value
        for key, value in config.items()
    }
    return RunConfig.model_validate(merged | sections)
