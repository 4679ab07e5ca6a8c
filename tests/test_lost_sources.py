"""Images that vanish, change or become unreadable while the shards are made, after their hashes were taken."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import make, picture
from test_bad_images import POWERLESS

from pipelines.config import RunConfig
from pipelines.data.encoding import EncodingOrder
from pipelines.data.encoding_worker import run_here, run_in_processes
from pipelines.data.hashing import identify
from pipelines.data.shard_set import ShardSet
from pipelines.data.shards import create_shards
from pipelines.data.sources import find_sources
from pipelines.errors import CodecmillError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures that may be taken away."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        picture(number, 64, 48).save(images / f"{number:02d}.png")
    return images


@pytest.fixture
def config(folder: Path, tiny: dict[str, Any]) -> RunConfig:
    return make(tiny, data={"images": str(folder), "patch_size": 16, "max_bad_fraction": 0.2})


class Encoding:
    """Encodes in this process, and counts; before the first image something else happens."""

    def __init__(self, before: Callable[[], object] = lambda: None):
        self.before = before
        self.encoded: list[str] = []

    def __call__(self, orders: Sequence[EncodingOrder]) -> Iterator[int]:
        if not self.encoded:
            self.before()
        self.encoded += [Path(job.path).name for order in orders for job in order.jobs]
        yield from run_here(orders)


def elsewhere(config: RunConfig, root: Path) -> ShardSet:
    return create_shards(config.model_copy(update={"root": root}))


def tars(made: ShardSet) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in made.path.glob("*.tar")}


def set_aside(made: ShardSet) -> dict[str, tuple[str, str]]:
    return {Path(row.path).name: (row.status, row.reason) for row in made.manifest.set_aside}


def working_folders(made: ShardSet) -> list[str]:
    return [path.name for path in made.path.parent.glob(".tmp-*/")]


def test_an_image_that_vanishes_meanwhile_is_set_aside_and_nothing_else_is_lost(
    config: RunConfig, folder: Path, tmp_path: Path
):
    encoding = Encoding(before=(folder / "05.png").unlink)
    made = create_shards(config, run_parts=encoding)
    assert set_aside(made) == {
        "05.png": ("broken", "it could no longer be read when its turn came: No such file or directory")
    }
    assert len(encoding.encoded) == 12, "what was encoded when it was missed is not encoded again"
    without = elsewhere(config, tmp_path / "without")
    assert (made.manifest.fingerprint, tars(made)) == (without.manifest.fingerprint, tars(without))
    assert working_folders(made) == []
    picture(5, 64, 48).save(folder / "05.png")
    encoding = Encoding()
    assert set_aside(create_shards(config, run_parts=encoding)) == {}, "nobody remembers that it was gone"
    assert encoding.encoded == ["05.png"]


def test_so_it_is_in_several_processes(config: RunConfig, folder: Path):
    def vanishing(orders: Sequence[EncodingOrder]) -> Iterator[int]:
        (folder / "03.png").unlink(missing_ok=True)
        (folder / "08.png").unlink(missing_ok=True)
        yield from run_in_processes(orders, 2)

    assert set(set_aside(create_shards(config, run_parts=vanishing))) == {"03.png", "08.png"}


def test_a_twin_takes_the_place_of_an_image_that_vanishes(config: RunConfig, folder: Path, tmp_path: Path):
    (folder / "twin.png").write_bytes((folder / "05.png").read_bytes())
    made = create_shards(config, run_parts=Encoding(before=(folder / "05.png").unlink))
    assert set(set_aside(made)) == {"05.png"}
    assert "twin.png" in {Path(row.path).name for split in made.manifest.sources for row in made.sources(split)}
    assert tars(made) == tars(elsewhere(config, tmp_path / "without"))


def test_an_image_whose_mask_vanishes_is_set_aside_with_it(config: RunConfig, folder: Path, tmp_path: Path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in ("02.png", "05.png"):
        picture(50, 64, 48).convert("L").save(masks / name)
    data = config.data.model_copy(update={"masks": str(masks)})
    made = create_shards(config.model_copy(update={"data": data}), run_parts=Encoding((masks / "05.png").unlink))
    ((name, (status, reason)),) = set_aside(made).items()
    assert (name, status) == ("05.png", "broken")
    assert (
        reason == f"its mask {masks / '05.png'} could no longer be read when its turn came: No such file or directory"
    )


def test_a_disk_that_goes_away_costs_nothing_once_it_is_back(config: RunConfig, folder: Path):
    away = folder.with_name("away")

    def unmount() -> None:
        away.mkdir()
        for number in range(6, 12):
            (folder / f"{number:02d}.png").rename(away / f"{number:02d}.png")

    encoding = Encoding(before=unmount)
    with pytest.raises(CodecmillError, match=r"6 of 12 images are broken, and data.max_bad_fraction 0.2 allows fewer"):
        create_shards(config, run_parts=encoding)
    assert len(encoding.encoded) == 12
    for file in away.iterdir():
        file.rename(folder / file.name)
    encoding = Encoding()
    assert set_aside(create_shards(config, run_parts=encoding)) == {}
    assert sorted(encoding.encoded) == [f"{number:02d}.png" for number in range(6, 12)]


def test_an_image_that_changes_meanwhile_is_named_and_what_is_encoded_is_kept(config: RunConfig, folder: Path):
    encoding = Encoding(before=lambda: picture(99, 64, 48).save(folder / "05.png"))
    with pytest.raises(CodecmillError, match=r"05\.png changed while the shards were being made. Run again once"):
        create_shards(config, run_parts=encoding)
    assert len(encoding.encoded) == 12
    encoding = Encoding()
    assert set_aside(create_shards(config, run_parts=encoding)) == {}
    assert encoding.encoded == ["05.png"]


def test_an_image_that_vanishes_before_its_hash_is_taken_is_set_aside(config: RunConfig, folder: Path, tmp_path: Path):
    found = find_sources(config)
    (folder / "05.png").unlink()
    sources, rows = identify(found, tmp_path / "hashes.json", workers=2)
    assert len(sources) == 11
    assert [(Path(row.path).name, row.status, row.reason) for row in rows] == [
        ("05.png", "broken", "No such file or directory")
    ]


LOCKED_MEANWHILE = """
import sys
from pathlib import Path
from pipelines.config import RunConfig
from pipelines.data.encoding_worker import run_here
from pipelines.data.shards import create_shards

def locking(orders):
    Path(sys.argv[2]).chmod(0)
    yield from run_here(orders)

made = create_shards(RunConfig.model_validate_json(sys.argv[1]), run_parts=locking)
print([(row.path, row.reason) for row in made.manifest.set_aside])
"""


def test_an_image_that_may_no_longer_be_read_is_set_aside(config: RunConfig, folder: Path):
    file = folder / "05.png"
    done = subprocess.run(
        [*POWERLESS, sys.executable, "-c", LOCKED_MEANWHILE, config.model_dump_json(by_alias=True), str(file)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    reason = "it could no longer be read when its turn came: Permission denied"
    assert done.stdout == f"{[(str(file), reason)]}\n"
