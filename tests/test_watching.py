"""New images are added to the shard set, and learnt from, on from the champion, once there are enough of them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import make, picture
from test_pipeline import from_python

from pipelines import tracking
from pipelines.config import RunConfig
from pipelines.durable_files import read_json
from pipelines.run_directory import Root

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
