"""New images are added to the shard set, and learnt from, on from the champion, once there are enough of them."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make, picture
from object_store import Proxy, the_store
from processes import PROJECT, clean_environment
from test_pipeline import from_python

from pipelines import checkpoints, storage, tracking
from pipelines.config import RunConfig
from pipelines.durable_files import read_json
from pipelines.run_directory import Root, RunDirectory

WATCH = """
import sys
from flows.watching import watch
from pipelines.config import RunConfig

if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        summary = watch(RunConfig.model_validate_json(file.read()), enough=3)
    print(summary.model_dump_json() if summary else "null")
"""


def look(config: RunConfig, tmp_path: Path) -> dict[str, Any] | None:
    """As the hourly flow run does: the run that was trained, if one was."""
    return from_python(WATCH, config, tmp_path, seconds=280)


LOOKS = """
import sys
from pathlib import Path
from flows.watching import watch
from pipelines.config import RunConfig

if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        config = RunConfig.model_validate_json(file.read())
    for line in sys.stdin:
        root, enough = line.split()
        found = watch(config.model_copy(update={"root": Path(root)}), enough=int(enough))
        print("LOOKED", found.run if found else "", flush=True)
"""


class Watcher:
    """Looks again and again, in one process: most of what a look takes is the start of Prefect's server."""

    def __init__(self, config: RunConfig, tmp_path: Path):
        (file := tmp_path / "watched.json").write_text(config.model_dump_json())
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOKS, str(file)],
            cwd=PROJECT,
            env=clean_environment()
            | {"PREFECT_HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_URI": tracking.tracking_uri(Root(config.root))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def look(self, root: Path, enough: int) -> RunDirectory | None:
        """The run that was trained, if one was, under a root."""
        assert self.process.stdin and self.process.stdout
        print(root, enough, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("LOOKED"):
                run = line.removeprefix("LOOKED").strip()
                return RunDirectory(Path(run)) if run else None
        raise AssertionError("the look failed")

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=120)  # whose end of input ends it, and Prefect's server with it


def tars(root: Root) -> dict[str, int]:
    """The shards of the newest set, with their inodes."""
    newest = max(root.shards.glob("[0-9a-f]*/manifest.json"), key=lambda file: file.stat().st_mtime_ns)
    return {tar.name: tar.stat().st_ino for tar in newest.parent.glob("*.tar")}


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("used_root")
def test_one_object_more_at_a_prefix_is_one_that_is_fetched_and_one_shard_that_is_written(
    tiny: dict[str, Any], proxy: Proxy, tmp_path: Path
):
    def add(number: int) -> None:
        picture(number, 256, 192).save(tmp_path / "new.png")
        the_store().send(tmp_path / "new.png", f"growing/{number:02d}.png")

    for number in range(32):
        add(number)
    data = {"images": f"{storage.store_url()}/growing", "max_shard_mib": 1, "patch_size": 64}
    config = make(tiny, name="tuned-{id}", data=data)
    root = Root(Path(tiny["root"]))
    with Watcher(config, tmp_path) as watcher:
        first = watcher.look(root.path, 32)
        assert first is not None, "without a champion all images are new"
        before = tars(root)
        assert len(before) >= 6

        add(32)
        proxy.requests.clear()
        assert watcher.look(root.path, 2) is None, "one is too few"
        assert proxy.count("GET", "/growing/") == proxy.count("GET", "/growing/32.png") == 1
        after = tars(root)
        assert sum(inode not in before.values() for inode in after.values()) == 1
        assert len(after) == len(before)

        elsewhere = Root(tmp_path / "elsewhere")
        assert watcher.look(elsewhere.path, 2) is None, "what the champion knows, the store knows"

        add(33)
        tuned = watcher.look(root.path, 2)
    assert tuned is not None
    assert tuned.read_config().training.start_from == "models:/codecmill@champion"
    last = checkpoints.latest(tuned)
    assert last is not None
    assert last.manifest.parent == read_json(first.promotion_file)["checkpoint_sha256"]
    assert the_store().find(f"runs/{tuned.path.name}/promotion.json") is not None


@pytest.mark.full
@pytest.mark.timeout(900)
def test_new_images_start_a_fine_tuning_from_the_champion_once_there_are_enough(
    tiny: dict[str, Any], photos: Path, tmp_path: Path
):
    images = tmp_path / "growing"
    shutil.copytree(photos, images)
    config = make(tiny, name="tuned-{id}", data={"images": str(images)})
    root = Root(Path(tiny["root"]))
    first = look(config, tmp_path)
    assert first is not None, "without a champion all images are new"
    before = tracking.champion(root)
    assert before is not None
    assert before.run == Path(first["run"]).name

    for number in range(2):
        picture(50 + number, 96, 96).save(images / f"new {number}.png")
    assert look(config, tmp_path) is None, "two are too few"
    assert len(list(root.shards.glob("[0-9a-f]*/manifest.json"))) == 2, "but they are in the shard set"

    picture(52, 96, 96).save(images / "new 2.png")
    tuned = look(config, tmp_path)
    assert tuned is not None
    assert read_json(Path(tuned["run"]) / "config.json")["training"]["start_from"] == "models:/codecmill@champion"
    report = read_json(Path(tuned["run"]) / "start_from" / "load_report.json")
    assert report["loaded"]
    assert not report["missing"]
