"""Images that may only be read, for real (a read-only bind mount in a mount namespace)."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make
from processes import PROJECT, clean_environment

# Mounts a folder onto itself, only to be read, proves it, and runs the rest of its arguments.
READ_ONLY = """
mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || exit 90
if touch "$1/written" 2>/dev/null; then exit 91; fi
shift && exec "$@"
"""


def state_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.full
@pytest.mark.usefixtures("used_root")
def test_a_whole_run_works_from_images_that_may_only_be_read(tiny: dict[str, Any], tmp_path: Path, photos: Path):
    sources = tmp_path / "sources"
    shutil.copytree(photos, sources / "below")
    (sources / "broken.png").write_bytes(b"no picture")
    before = state_of(sources)
    config = make(tiny, name="careful", data={"images": str(sources)}, evaluation={"images": str(sources)})
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json())
    command = [sys.executable, "-m", "flows", "run", "--config", str(file)]
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", READ_ONLY, "sh", str(sources), *command],
        cwd=PROJECT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert state_of(sources) == before
    run = config.root / "runs" / "careful"
    assert len(list(run.glob("evaluation/*/evaluation.json"))) == 2, "of the test split, and of the images"
    assert (run / "promotion.json").is_file()
