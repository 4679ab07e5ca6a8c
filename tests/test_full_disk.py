"""A disk that is full, for real (a small tmpfs in a mount namespace): clear words, nothing lost, the run goes on."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make
from processes import PROJECT
from trainings import Undisturbed

from pipelines.training.following import SPOKEN

# Runs where a small disk is mounted: trains to a step, fills the disk but for some bytes, expects the error, makes
# room, and goes on. For shards the disk is full before there is anything.
BODY = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tests")
from trainings import begin, result, steps_done, train
from pipelines import checkpoints
from pipelines.config import RunConfig
from pipelines.errors import CodecmillError
from pipelines.training import launch
folder, left, first = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[5])
config = RunConfig.model_validate_json(Path(sys.argv[3]).read_text())
filler = folder / "filler"
def fill():
    filler.write_bytes(b"")
    with filler.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - left))
said = newest = None
steps = 0
try:
    if sys.argv[4].startswith("shards"):
        fill()
    directory = begin(config)
    if first:
        with directory.locked(wait=5) as lock:
            launch.train(directory, lock, on_line=print, until=first)
    if not sys.argv[4].startswith("shards"):
        fill()
    train(directory)
except CodecmillError as error:
    said = str(error)
if not sys.argv[4].startswith("shards"):
    steps, newest = steps_done(directory), checkpoints.latest(directory)
filler.unlink()
directory = begin(config)
train(directory)
print(json.dumps({"said": said, "saved": newest and newest.step, "steps": steps, "result": result(directory)}))
"""


def on_a_small_disk(
    place: Path, size: str, left: int, config: Any, what: str, first: int, tmp_path: Path
) -> dict[str, Any]:
    place.mkdir(parents=True)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    program = [sys.executable, "-c", BODY, str(place), str(left), str(tmp_path / "config.json"), what, str(first)]
    done = with_disk(place, size, program)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def with_disk(place: Path, size: str, program: list[str]) -> subprocess.CompletedProcess[str]:
    script = 'mount -t tmpfs -o size="$2" tmpfs "$1" && shift 2 && exec "$@"'
    return subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(place), size, *program],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.full
@pytest.mark.parametrize(
    ("what", "size", "left", "first", "training", "message"),
    [
        (
            "checkpoints",
            "4m",
            300_000,
            4,
            {"checkpoint_interval": 2, "steps": 60},
            r"There is no room in .*/checkpoints.*: \S+ needs ",
        ),
        # The journal alone grows: no picture is written, and no checkpoint.
        (
            "run",
            "4m",
            60_000,
            50,
            {"steps": 800, "checkpoint_interval": 1000, "validation_interval": 1000},
            r"There is no room in .*/runs/small: (the line of step \d+ in )?metrics\.jsonl needs ",
        ),
        ("shards", "2m", 30_000, 0, {}, r"There is no room in .*/shards: .* needs more, and [\d,]+ bytes are left"),
        ("shards by two processes", "2m", 30_000, 0, {}, r"There is no room in .*/shards: .* needs .* bytes are left"),
    ],
)
def test_it_says_where_room_is_needed_and_goes_on_to_the_same_bits(
    tiny: dict[str, Any],
    tmp_path: Path,
    undisturbed: Undisturbed,
    what: str,
    size: str,
    left: int,
    first: int,
    training: dict[str, Any],
    message: str,
):
    data = {"workers": 2 if "two processes" in what else 1}
    config = make(tiny, name="small", root=str(tmp_path / "full"), training=training, data=data)
    place = {"checkpoints": "runs/small/checkpoints", "run": "runs/small"}.get(what, "shards")
    found = on_a_small_disk(tmp_path / "full" / place, size, left, config, what, first, tmp_path)
    assert found["said"] is not None, "the disk was not full"
    assert "Traceback" not in found["said"]
    assert re.search(message, found["said"]), found["said"]
    # The checkpoint before the one for which there was no room can be loaded all the time.
    assert found["saved"] == {"checkpoints": found["steps"] - 2, "run": first}.get(what)
    assert found["saved"] is None or first <= found["saved"] < found["steps"] < training["steps"]
    assert found["result"] == undisturbed(config)


RANK_ON_A_FULL_DISK = """
import os, sys
from pathlib import Path
from pipelines.training import worker
attempt = Path(sys.argv[1])
with (attempt / "filler").open("ab", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
worker.main(attempt / "run", attempt)
"""


@pytest.mark.full
def test_a_rank_that_has_no_room_for_its_signs_of_life_says_so(tmp_path: Path):
    done = with_disk(tmp_path, "64k", [sys.executable, "-c", RANK_ON_A_FULL_DISK, str(tmp_path)])
    assert done.returncode == 1, done.stderr
    failure = json.loads(done.stdout.encode().removeprefix(SPOKEN))
    assert failure["explained"]
    assert failure["message"].startswith(f"There is no room in {tmp_path}: heartbeat_0 needs 48 bytes, and 0 bytes are")


SIGN_IN = """
import sys
from pathlib import Path
from pipelines.attendance import Entry, sign_in
from pipelines.cleaning import find_removable, remove
from pipelines.errors import DiskFullError
from pipelines.run_directory import Root
from pipelines.training.distributed import Ranks
from pipelines.training.writing import sole_writer
root = Root(Path(sys.argv[1]))
root.attendance.mkdir()
root.run("r").checkpoints.mkdir(parents=True)
(root.shards / ("0" * 16)).mkdir(parents=True)
(root.shards / ("0" * 16) / "manifest.json").write_text("{}")
with (root.path / "filler").open("ab", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
first = Ranks(rank=0, world_size=1, device="cpu")
for attempt in (lambda: sign_in(root, Entry(id="1", process=1)), sole_writer(root.run("r"), first).__enter__):
    try:
        attempt()
    except DiskFullError as error:
        print(error)
old = root.shards / ("0" * 16)
[found] = find_removable(root, days=0, runs=False)
print(found.path == old, remove(found), old.exists())
"""


def test_when_not_a_byte_is_left_a_flow_says_where_and_room_can_be_made(tmp_path: Path):
    done = with_disk(tmp_path, "64k", [sys.executable, "-c", SIGN_IN, str(tmp_path)])
    signed_in, writes, removed = done.stdout.splitlines()
    assert signed_in.startswith(f"There is no room in {tmp_path}/at_work: 1.json needs more, and 0 bytes"), done
    assert writes.startswith(f"There is no room in {tmp_path}/runs/r for the name of the process that writes.")
    assert removed == "True True False", "its lock has no room for the name of who holds it"
