"""A disk that is full, for real (a small tmpfs in a mount namespace): clear words, nothing lost, the run goes on."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make
from test_training import PROJECT, begin, result, train

# Runs where a small disk is mounted; fills it but for some bytes, expects the error, makes room, and goes on.
BODY = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_training import begin, result, train
from pipelines import checkpoints
from pipelines.config import RunConfig
from pipelines.errors import CodecmillError
folder, left = Path(sys.argv[1]), int(sys.argv[2])
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
said = None
try:
    if sys.argv[4] == "shards":
        fill()
    directory = begin(config)
    if sys.argv[4] != "shards":
        fill()
    train(directory)
except CodecmillError as error:
    said = str(error)
newest = checkpoints.latest(directory) if sys.argv[4] != "shards" else None
filler.unlink()
directory = begin(config)
train(directory)
print(json.dumps({"said": said, "saved": newest and newest.step, "result": result(directory)}))
"""


def on_a_small_disk(place: Path, size: str, left: int, config: Any, what: str, tmp_path: Path) -> dict[str, Any]:
    place.mkdir(parents=True)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    script = 'mount -t tmpfs -o size="$2" tmpfs "$1" && shift 2 && exec "$@"'
    program = [sys.executable, "-c", BODY, str(place), str(left), str(tmp_path / "config.json"), what]
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(place), size, *program],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.full
@pytest.mark.parametrize(
    ("what", "size", "left", "training", "message"),
    [
        ("checkpoints", "4m", 300_000, {"checkpoint_interval": 2}, r"There is no room in .*/checkpoints.*: \S+ needs "),
        (
            "run",
            "4m",
            60_000,
            {"steps": 400, "checkpoint_interval": 1000},
            r"There is no room in .*/runs/small.*needs ",
        ),
        ("shards", "2m", 30_000, {}, r"There is no room in .*/shards: .* needs more, and [\d,]+ bytes are left"),
    ],
)
def test_it_says_where_room_is_needed_and_goes_on_to_the_same_bits(
    tiny: dict[str, Any], tmp_path: Path, what: str, size: str, left: int, training: dict[str, Any], message: str
):
    undisturbed = begin(make(tiny, name="small", root=str(tmp_path / "undisturbed"), training=training))
    train(undisturbed)
    config = make(tiny, name="small", root=str(tmp_path / "full"), training=training)
    places = {"checkpoints": "runs/small/checkpoints", "run": "runs/small", "shards": "shards"}
    found = on_a_small_disk(tmp_path / "full" / places[what], size, left, config, what, tmp_path)
    assert found["said"] is not None, "the disk was not full"
    assert "Traceback" not in found["said"]
    assert re.search(message, found["said"]), found["said"]
    assert found["result"] == result(undisturbed)
