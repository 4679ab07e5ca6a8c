"""Shard sets: read by webdataset itself, the same bytes after any interruption, rewritten only where they change."""

import errno
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make, picture
from PIL import Image
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from pipelines.config import RunConfig
from pipelines.data import shard_set as shard_set_module
from pipelines.data import suspects
from pipelines.data.encoding import EncodingOrder
from pipelines.data.encoding_worker import run_here
from pipelines.data.images import decode_png, open_image, open_mask
from pipelines.data.parts import part_file
from pipelines.data.planning import make_plan
from pipelines.data.shard_format import SPLITS, ShardRow, read_sources
from pipelines.data.shard_set import ShardSet
from pipelines.data.shards import create_shards
from pipelines.data.splitting import assign_splits
from pipelines.durable_files import write_json
from pipelines.errors import CodecmillError, InputError
from pipelines.locks import lock
from pipelines.progress import Progress, listen
from pipelines.sealed_json import read_sealed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures of 32 to 96 pixels, which may be added to and removed."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        picture(number, 32 + 16 * (number % 5), 48 + 16 * (number % 3)).save(images / f"{number:02d}.png")
    return images


@pytest.fixture
def config(folder: Path, tiny: dict[str, Any]) -> RunConfig:
    return make(tiny, data={"images": str(folder), "patch_size": 16})


def varied(config: RunConfig, place: Path | None = None, /, **data: Any) -> RunConfig:
    """The config under another root, with choices for the data."""
    value = config.model_dump(mode="json", by_alias=True)
    return RunConfig.model_validate(value | {"root": place or config.root, "data": value["data"] | data})


def bytes_of(shard_set: ShardSet, *suffixes: str) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(shard_set.path.iterdir())
        if file.suffix in suffixes
    }


def inodes(shard_set: ShardSet) -> dict[str, int]:
    return {row.tar: (shard_set.path / row.tar).stat().st_ino for row in shard_set.manifest.shards}


def _all(dataset: Any) -> list[dict[str, Any]]:
    return list(dataset)


def only_here(orders: Sequence[EncodingOrder]) -> Iterator[int]:
    raise AssertionError("nothing was to be encoded")
    yield from run_here(orders)


# webdataset leaves it to the garbage collector to close what it reads.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_webdataset_reads_the_tars_with_its_usual_decoders(config: RunConfig, folder: Path, tmp_path: Path):
    (tmp_path / "masks").mkdir()
    for file in folder.iterdir():
        Image.open(file).getchannel("G").save(tmp_path / "masks" / file.name)
    shard_set = create_shards(varied(config, masks=str(tmp_path / "masks")))
    for split in SPLITS:
        originals = {row.sha256: row for row in shard_set.sources(split)}
        tars = [str(shard_set.path / row.tar) for row in shard_set.rows(split)]
        samples = _all(WebDataset(tars, shardshuffle=False, empty_check=False).decode("pil"))
        assert len(samples) == sum(shard_set.counts(split)) > 0
        for sample, own in zip(samples, shard_set.samples(split), strict=True):
            left, top, width, height = sample["json"]["box"]
            original = Image.open(originals[sample["json"]["source"]].path).crop(
                (left, top, left + width, top + height)
            )
            assert np.array_equal(sample["png"], np.asarray(original))
            assert np.array_equal(np.asarray(sample["mask.png"])[..., 0], np.asarray(original)[..., 1])
            assert (sample["__key__"], sample["json"]) == (own.key, own.info)
            assert decode_png(own.image).tobytes() == original.tobytes()
            assert own.mask is not None
            assert decode_png(own.mask).tobytes() == original.getchannel("G").tobytes()
            assert sample["json"]["split"] == split


def test_a_tar_is_what_webdatasets_writer_makes_of_its_samples(config: RunConfig):
    shard_set = create_shards(config)
    row = shard_set.rows("train")[0]
    whole = io.BytesIO()
    with TarWriter(whole, encoder=False, mtime=0) as writer:
        for sample in shard_set.samples("train"):
            info = json.dumps(sample.info, sort_keys=True, separators=(",", ":")).encode()
            writer.write({"__key__": sample.key, "png": sample.image, "json": info})
    assert whole.getvalue() == (shard_set.path / row.tar).read_bytes()


def test_small_files_are_another_set_of_the_same_pixels(config: RunConfig):
    fast, small = create_shards(config), create_shards(varied(config, compression="small"))
    assert fast.path != small.path
    for one, other in zip(fast.samples("train"), small.samples("train"), strict=True):
        assert one.info == other.info
        assert one.image != other.image
        assert decode_png(one.image).tobytes() == decode_png(other.image).tobytes()


def test_what_cuts_patches_does_so_without_torch(config: RunConfig):
    script = "import sys; from pipelines.data import encoding_worker; encoding_worker.main(); print(*sys.modules)"
    orders: list[EncodingOrder] = []

    def elsewhere(given: Sequence[EncodingOrder]) -> Iterator[int]:
        orders.extend(given)
        lines = "".join(f"{order.model_dump_json()}\n" for order in given)
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parent.parent,
            input=lines,
            capture_output=True,
            text=True,
            timeout=60,
        )
        loaded = set(done.stderr.split())
        assert "pipelines.data.png_writing" in loaded
        assert not {"torch", "webdataset"} & loaded, "each takes hundreds of MB, in every process"
        yield sum(len(order.jobs) for order in given)

    assert create_shards(config, run_parts=elsewhere).verify() == []
    assert orders


def test_patches_cover_the_image_once(config: RunConfig):
    shard_set = create_shards(config)
    for source in shard_set.sources("train"):
        boxes = [s.info["box"] for s in shard_set.samples("train") if s.info["source"] == source.sha256]
        covered = np.zeros((source.height, source.width), int)
        for left, top, width, height in boxes:
            covered[top : top + height, left : left + width] += 1
        assert covered.min() == covered.max() == 1, "all sizes here are multiples of the patch"


def test_test_images_are_stored_whole(config: RunConfig):
    shard_set = create_shards(varied(config, test_fraction=0.4))
    sources = list(shard_set.sources("test"))
    for source, sample in zip(sources, shard_set.samples("test"), strict=True):
        assert decode_png(sample.image).tobytes() == open_image(Path(source.path)).tobytes()
    assert len(sources) == sum(shard_set.counts("test"))


def test_a_list_of_sources_that_is_not_that_of_its_shard_is_named(config: RunConfig):
    shard_set = create_shards(varied(config, test_fraction=0.4))
    row = shard_set.rows("test")[0]
    file = shard_set.path / row.sources
    lines = file.read_bytes().splitlines(keepends=True)
    file.chmod(0o644)
    file.write_bytes(b"".join(lines[:-1]))
    message = rf"{file.name} is damaged: it lists {row.samples - 1} samples, and its shard has {row.samples}\. Delete"
    with pytest.raises(CodecmillError, match=message):
        list(shard_set.sources("test"))


def test_mean_and_std_are_those_of_the_training_patches(config: RunConfig):
    shard_set = create_shards(config)
    pixels = np.concatenate([np.asarray(decode_png(s.image)).reshape(-1, 3) for s in shard_set.samples("train")]) / 255
    assert shard_set.measured.mean == pytest.approx(pixels.mean(axis=0), rel=1e-12)
    assert shard_set.measured.std == pytest.approx(pixels.std(axis=0), rel=1e-9)


def test_splits_are_disjoint_and_by_content(config: RunConfig, folder: Path):
    shard_set = create_shards(config)
    splits = {row.sha256: split for split in SPLITS for row in shard_set.sources(split)}
    assert len(splits) == 12
    assert set(splits.values()) == set(SPLITS)
    for split in SPLITS:
        for sample in shard_set.samples(split):
            assert splits[sample.info["source"]] == split
            assert sample.key.startswith(sample.info["source"][:16])
    moved = folder.with_name("moved")
    shutil.copytree(folder, moved / "deeper")
    for number, file in enumerate(sorted((moved / "deeper").iterdir())):
        file.rename(file.with_name(f"renamed {99 - number}.png"))
    again = create_shards(varied(config, images=str(moved)), run_parts=only_here)
    assert again.path == shard_set.path, "paths and names are no part of what a set is"


def test_an_earlier_set_that_is_damaged_is_passed_over(config: RunConfig, folder: Path):
    (create_shards(config).path / "store.json").write_text("{")
    next(folder.glob("*.png")).unlink()
    assert create_shards(config).verify() == []


@pytest.mark.parametrize("choices", [{}, {"patches": "random", "max_patches_per_image": 5}])
def test_bytes_are_the_same_on_any_number_of_processes(config: RunConfig, tmp_path: Path, choices: dict[str, Any]):
    one = create_shards(varied(config, tmp_path / "one", workers=1, **choices))
    two = create_shards(varied(config, tmp_path / "two", workers=2, **choices))
    assert one.path != two.path
    assert bytes_of(one, ".tar", ".index", ".json", ".jsonl") == bytes_of(two, ".tar", ".index", ".json", ".jsonl")


CREATE = """
import sys
from pathlib import Path
from pipelines.config import RunConfig
from pipelines.data.shards import create_shards
from pipelines.data.splitting import assign_splits
create_shards(RunConfig.model_validate_json(Path(sys.argv[1]).read_bytes()))
"""


def start(config: RunConfig, file: Path) -> subprocess.Popen[bytes]:
    write_json(file, config.model_dump(mode="json", by_alias=True))
    code = Path(__file__).parent.parent
    return subprocess.Popen(
        [sys.executable, "-c", CREATE, str(file)], cwd=code, start_new_session=True, preexec_fn=_hear_ctrl_c
    )


def _hear_ctrl_c() -> None:
    # What a shell starts in the background, these tests perhaps, ignores it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_orders_begin_large_and_end_small_so_that_workers_end_together(config: RunConfig):
    sizes: list[int] = []

    def counted(orders: Sequence[EncodingOrder]) -> Iterator[int]:
        sizes.extend(len(order.jobs) for order in orders)
        yield from run_here(orders)

    create_shards(varied(config, workers=2), run_parts=counted)
    assert sizes == [3, 3, 2, 2, 2], "each a fourth of what is left of twelve, and two at least"


def test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_bytes(config: RunConfig, folder: Path, tmp_path: Path):
    for number in range(12, 24):
        picture(number, 300, 300).save(folder / f"{number}.png")
    whole = create_shards(varied(config, tmp_path / "whole"))
    root = tmp_path / "killed"
    cut = varied(config, root, workers=2)
    process = start(cut, tmp_path / "config.json")
    deadline = time.monotonic() + 60
    while len(list(root.glob("shards/.tmp-*/parts/[!.]*.part"))) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    workers = children(process.pid)
    process.kill()
    process.wait()
    assert len(workers) == 2
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.01)
    assert not list(root.glob("shards/[!.]*/manifest.json")), "no half-written set is seen"
    parts = {file: file.stat().st_mtime_ns for file in root.glob("shards/.tmp-*/parts/[!.]*.part")}
    assert 4 <= len(parts) < 24
    encoded: list[str] = []

    def counted(orders: Sequence[EncodingOrder]) -> Iterator[int]:
        encoded.extend(job.sha256 for order in orders for job in order.jobs)
        yield from run_here(orders)

    again = create_shards(cut, run_parts=counted)
    assert not {file.name.partition(".")[0] for file in parts} & set(encoded), "what is encoded stays encoded"
    assert len(encoded) + len(parts) == 24
    assert bytes_of(again, ".tar", ".index", ".json", ".jsonl") == bytes_of(whole, ".tar", ".index", ".json", ".jsonl")
    assert not list(root.glob("shards/.tmp-*/*"))


@pytest.mark.parametrize("kills", [1, 1000])
def test_a_worker_that_is_killed_is_replaced_and_one_that_is_killed_each_time_is_reported(
    config: RunConfig, tmp_path: Path, kills: int
):
    script = """
import os, signal, sys, threading, time
from contextlib import suppress
from pathlib import Path
from pipelines.config import RunConfig
from pipelines.data.shards import create_shards
from pipelines.errors import CodecmillError
def kill():
    left = int(sys.argv[2])
    while left:
        for task in Path("/proc/self/task").iterdir():
            with suppress(FileNotFoundError):
                for child in (task / "children").read_text().split()[:left]:
                    with suppress(ProcessLookupError):
                        os.kill(int(child), signal.SIGKILL)
                        left -= 1
        time.sleep(0.01)
threading.Thread(target=kill, daemon=True).start()
try:
    create_shards(RunConfig.model_validate_json(Path(sys.argv[1]).read_bytes()))
except CodecmillError as error:
    print(error)
"""
    write_json(tmp_path / "config.json", varied(config, workers=2).model_dump(mode="json", by_alias=True))
    program = [sys.executable, "-c", script, str(tmp_path / "config.json"), str(kills)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    said = "A process that encodes images was killed by SIGKILL. If memory ran out, lower data.workers; what is done is"
    if kills == 1:
        assert f"{said} kept. Its work goes on in a new one." in done.stderr
        assert not done.stdout
    else:
        assert done.stdout.startswith(said), done.stderr
    assert create_shards(config, run_parts=only_here if kills == 1 else None).verify() == []


def test_what_a_killed_build_left_is_deleted_after_a_week(config: RunConfig):
    shards = config.root / "shards"
    names, long_ago = ("recent", "abandoned", "held"), time.time() - 8 * 24 * 3600
    for name in names:
        (shards / f".tmp-{name}" / "parts").mkdir(parents=True)
        (shards / f".tmp-{name}" / "parts" / "x.part").write_bytes(bytes(100))
        if name != "recent":
            for folder in (shards / f".tmp-{name}" / "parts", shards / f".tmp-{name}"):
                os.utime(folder, times=(long_ago, long_ago))
    with lock(shards / ".tmp-held.lock", "held", wait=0):
        create_shards(config)
    assert {name for name in names if (shards / f".tmp-{name}").exists()} == {"recent", "held"}
    create_shards(config)
    assert {name for name in names if (shards / f".tmp-{name}").exists()} == {"recent"}


def test_two_builders_of_one_set_make_it_once(config: RunConfig, tmp_path: Path):
    processes = [start(varied(config, workers=1), tmp_path / f"{n}.json") for n in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    shard_set = create_shards(config, run_parts=only_here)
    assert shard_set.verify() == []
    assert [path.name for path in shard_set.path.parent.glob("[!.]*/")] == [shard_set.path.name]


def large(config: RunConfig, folder: Path) -> RunConfig:
    """A config whose training split fills several shards of at most 1 MiB."""
    for number in range(100, 130):
        picture(number, 256, 256).save(folder / f"{number}.png")
    return varied(config, patch_size=64, max_shard_mib=1)


def test_adding_an_image_rewrites_one_shard_and_links_the_others(config: RunConfig, folder: Path):
    config = large(config, folder)
    before = create_shards(config)
    assert len(before.rows("train")) >= 4
    picture(200, 64, 64).save(folder / "new.png")
    orders: list[EncodingOrder] = []

    def counted(given: Sequence[EncodingOrder]) -> Iterator[int]:
        orders.extend(given)
        yield from run_here(given)

    after = create_shards(config, run_parts=counted)
    assert [Path(job.path).name for order in orders for job in order.jobs] == ["new.png"]
    changed = {name for name, inode in inodes(after).items() if inodes(before).get(name) != inode}
    assert len(changed) == 1
    assert set(inodes(before)) == set(inodes(after)), "no shard is renamed"
    new = hashlib.sha256((folder / "new.png").read_bytes()).hexdigest()
    (shard,) = [row for row in after.manifest.shards if row.tar in changed]
    assert new in {row.sha256 for row in read_sources(after.path / shard.sources)}
    assert before.verify() == after.verify() == []
    fresh = create_shards(varied(config, config.root / "fresh"))
    assert bytes_of(fresh, ".tar", ".index", ".json") == bytes_of(after, ".tar", ".index", ".json")


@pytest.mark.full
def test_one_image_more_of_ten_thousand_touches_one_shard(tiny: dict[str, Any], tmp_path: Path):
    images = tmp_path / "many"
    images.mkdir()
    levels = np.random.default_rng(0).integers(0, 256, (10_001, 16, 16, 3), dtype=np.uint8)
    for number, pixels in enumerate(levels[:-1]):
        Image.fromarray(pixels).save(images / f"{number:05d}.png", compress_level=1)
    data = {"images": str(images), "patch_size": 16, "max_shard_mib": 1, "validation_fraction": 0.1, "workers": 2}
    config = make(tiny, data=data)
    before = create_shards(config)
    assert sum(before.manifest.sources.values()) == 10_000
    assert len(before.manifest.shards) > 5
    Image.fromarray(levels[-1]).save(images / "new.png")
    encoded: list[str] = []

    def counted(orders: Sequence[EncodingOrder]) -> Iterator[int]:
        encoded.extend(Path(job.path).name for order in orders for job in order.jobs)
        yield from run_here(orders)

    after = create_shards(config, run_parts=counted)
    assert encoded == ["new.png"]
    assert len({name for name, node in inodes(after).items() if inodes(before).get(name) != node}) == 1
    assert sum(after.manifest.sources.values()) == 10_001


def test_removing_an_image_rewrites_one_shard_without_encoding(config: RunConfig, folder: Path):
    config = large(config, folder)
    before = create_shards(config)
    source = next(before.sources("train"))
    Path(source.path).unlink()
    after = create_shards(config, run_parts=only_here)
    changed = {name for name, inode in inodes(after).items() if inodes(before)[name] != inode}
    assert len(changed) == 1
    assert all(sample.info["source"] != source.sha256 for sample in after.samples("train"))
    assert after.verify() == []
    assert after.manifest.mean != before.manifest.mean


def test_a_shard_that_is_missing_or_cut_is_made_again_and_no_other(config: RunConfig, folder: Path):
    config = large(config, folder)
    shard_set = create_shards(config)
    expected, nodes = bytes_of(shard_set, ".tar", ".index", ".json", ".jsonl"), inodes(shard_set)
    first, second = shard_set.rows("train")[:2]
    (shard_set.path / first.tar).unlink()
    os.truncate(shard_set.path / second.index, 100)
    with pytest.raises(CodecmillError, match=rf"{first.tar} cannot be read: No such file.* codecmill resume"):
        ShardSet.open(shard_set.path)
    encoded: set[str] = set()

    def counted(orders: Sequence[EncodingOrder]) -> Iterator[int]:
        encoded.update(job.sha256 for order in orders for job in order.jobs)
        yield from run_here(orders)

    again = create_shards(config, run_parts=counted)
    assert bytes_of(again, ".tar", ".index", ".json", ".jsonl") == expected
    assert {name for name, node in inodes(again).items() if nodes[name] != node} == {first.tar, second.tar}
    assert encoded == {row.sha256 for shard in (first, second) for row in read_sources(again.path / shard.sources)}


def test_a_set_that_is_repaired_after_its_images_were_moved_is_the_one_that_it_was(config: RunConfig, folder: Path):
    """Checkpoints name its manifest by sha256; so does one that lies in a store."""
    (folder / "broken.png").write_text("none")
    shard_set = create_shards(config)
    expected = bytes_of(shard_set, ".tar", ".index", ".json", ".jsonl")
    folder = folder.rename(folder.with_name("moved"))
    (folder / "00.png").rename(folder / "renamed.png")
    config = varied(config, images=str(folder))
    first, second = shard_set.manifest.shards[:2]
    os.truncate(shard_set.path / first.tar, 100)
    again = create_shards(config)
    assert bytes_of(again, ".tar", ".index", ".json", ".jsonl") == expected

    os.truncate(shard_set.path / second.sources, 100)
    again = create_shards(config)
    assert again.verify() == []
    rows = [row for shard in again.manifest.shards for row in read_sources(again.path / shard.sources)]
    assert all(Path(row.path).is_relative_to(folder) for row in rows), "nobody knows any more what the list said"
    assert bytes_of(again, ".tar", ".index") == {
        name: sha256 for name, sha256 in expected.items() if name.endswith((".tar", ".index"))
    }


def test_repairing_does_not_take_over_damage_from_a_set_that_shares_the_file(config: RunConfig, folder: Path):
    before = create_shards(config)
    picture(200, 64, 64).save(folder / "new.png")
    after = create_shards(config)
    shared = next(name for name, node in inodes(after).items() if inodes(before)[name] == node)
    with (after.path / shared).open("r+b") as tar:
        tar.seek(700)
        tar.write(b"\xff\x00\xff")
    assert [problem for problem in after.verify() if shared in problem]
    (after.path / shared).unlink()
    assert create_shards(config).verify() == []


@pytest.mark.parametrize("suffix", [".index", ".sources.jsonl"])
def test_damage_beside_an_earlier_tar_is_not_sealed_anew_in_the_next_set(
    config: RunConfig, folder: Path, tmp_path: Path, suffix: str
):
    before = create_shards(config)
    picture(200, 64, 64).save(folder / "new.png")
    clean = create_shards(varied(config, tmp_path / "clean"))
    kept = next(row for row in before.rows("train") if row.inputs in {each.inputs for each in clean.rows("train")})
    file = before.path / f"{kept.name}{suffix}"
    content = file.read_bytes()
    at = len(content) - 3 if suffix == ".index" else content.index(b'"sums":[') + len(b'"sums":[')
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    after = create_shards(config)
    assert after.fingerprint == clean.fingerprint
    assert after.verify() == []
    assert bytes_of(after, ".tar", ".index") == bytes_of(clean, ".tar", ".index")
    assert after.manifest.mean == clean.manifest.mean
    assert list(after.samples("train"))[-1].info == list(clean.samples("train"))[-1].info


def test_what_is_damaged_of_what_was_encoded_is_encoded_again(config: RunConfig, folder: Path, tmp_path: Path):
    """A part that lost its pages with the power, and the tar of an earlier set."""
    clean = create_shards(varied(config, tmp_path / "clean"))

    def and_lose_pages(orders: Sequence[EncodingOrder]) -> Iterator[int]:
        yield from run_here(orders)
        for order in orders:
            part = part_file(order.folder, order.jobs[0].sha256, order.jobs[0].split)
            with part.open("r+b") as stream:
                stream.seek(600)
                stream.write(bytes(300))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create_shards(config, run_parts=and_lose_pages)
    made = create_shards(config)
    assert bytes_of(made, ".tar", ".index") == bytes_of(clean, ".tar", ".index")
    row = made.rows("train")[0]
    spoil(made, row, "a flipped byte")
    first, *others = read_sources(made.path / row.sources)
    Path(others[-1].path).unlink()
    after = create_shards(config)
    assert after.verify() == []
    assert first.sha256 in {source.sha256 for source in after.sources("train")}
    assert suspects.marked(made.path) == [row.name]


@pytest.mark.parametrize("changed", ["a mask is retouched", "masks are given"])
def test_an_image_stays_in_its_split_whatever_its_mask_is(
    config: RunConfig, folder: Path, tmp_path: Path, changed: str
):
    """Else what was trained on would be tested on: `start_from` the champion, and its PSNR is a memory's."""
    (masks := tmp_path / "masks").mkdir()

    def splits(shard_set: ShardSet) -> dict[str, str]:
        return {row.image_sha256: split for split in SPLITS for row in shard_set.sources(split)}

    def paint(level: int) -> RunConfig:
        for file in folder.iterdir():
            with Image.open(file) as image:
                Image.new("L", image.size, level).save(masks / file.name)
        return varied(config, masks=str(masks))

    before = create_shards(config if changed == "masks are given" else paint(9))
    after = create_shards(paint(200))
    assert after.fingerprint != before.fingerprint
    assert splits(after) == splits(before)


def test_a_flipped_byte_is_found_when_it_is_read(config: RunConfig):
    shard_set = create_shards(config)
    row = shard_set.rows("train")[0]
    content = bytearray((shard_set.path / row.tar).read_bytes())
    index = np.load(shard_set.path / row.index)
    content[int(index[3]["offset"]) + 700] ^= 4
    (shard_set.path / row.tar).write_bytes(content)
    damaged = ShardSet.open(shard_set.path)
    damaged.read("train", 0, 2)
    with pytest.raises(CodecmillError, match=rf"Sample 3 of .*{row.tar} is damaged: .*codecmill resume"):
        damaged.read("train", 0, 3)
    found = hashlib.sha256(content).hexdigest()
    assert damaged.verify() == [
        f"{shard_set.path / row.tar} was changed: its sha256 is {found[:16]}... instead of {row.sha256[:16]}...; "
        "damaged: its sample 3."
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_takes_no_more_is_named_by_its_own_reason(config: RunConfig, workers: int):
    config = config.model_copy(update={"data": config.data.model_copy(update={"workers": workers})})
    make_plan(config)  # the cache of hashes is written
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as refused:
            create_shards(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert refused.value.errno == errno.EFBIG
    assert create_shards(config).verify() == []


def test_what_a_killed_attempt_has_linked_is_not_written_through(config: RunConfig, folder: Path):
    earlier = create_shards(config)
    files = bytes_of(earlier, ".tar", ".index")
    picture(99, 80, 80).save(folder / "another.png")
    working = make_plan(config).working
    working.mkdir()
    for name in files:
        os.link(earlier.path / name, working / name)
    assert create_shards(config).verify() == []
    assert bytes_of(earlier, ".tar", ".index") == files


def spoil(shard_set: ShardSet, row: ShardRow, damage: str) -> None:
    """Damage a tar and leave its size as it is."""
    file = shard_set.path / row.tar
    content = bytearray(file.read_bytes())
    if damage == "a flipped byte":
        content[700] ^= 4
    else:  # replaced
        content = bytearray(len(content))
    file.unlink()  # other sets share it
    file.write_bytes(content)


@pytest.mark.parametrize("damage", ["a flipped byte", "replaced", "a flipped byte in the index"])
def test_what_a_reader_finds_damaged_is_made_again_by_the_shard_stage_and_no_other(
    config: RunConfig, folder: Path, damage: str
):
    config = large(config, folder)
    shard_set = create_shards(config)
    expected, nodes = bytes_of(shard_set, ".tar", ".index", ".json", ".jsonl"), inodes(shard_set)
    row = shard_set.rows("train")[1]
    if damage.endswith("index"):
        content = bytearray((shard_set.path / row.index).read_bytes())
        content[-3] ^= 1
        (shard_set.path / row.index).write_bytes(content)
    else:
        spoil(shard_set, row, damage)
    assert create_shards(config).path == shard_set.path, "sizes alone do not tell"
    with pytest.raises(CodecmillError, match=rf"{row.name}.* codecmill resume RUN"):
        ShardSet.open(shard_set.path).read("train", 1, 0)
    with pytest.raises(CodecmillError, match=rf"{row.tar} was damaged when it was read. It is made again"):
        ShardSet.open(shard_set.path)
    again = create_shards(config)
    assert again.verify() == []
    assert bytes_of(again, ".tar", ".index", ".json", ".jsonl") == expected
    assert {name for name, node in inodes(again).items() if nodes[name] != node} == {row.tar}
    assert not list(again.path.glob("*.suspect"))


def test_a_mark_at_a_sound_shard_costs_a_look_and_changes_nothing(config: RunConfig):
    shard_set = create_shards(config)
    nodes = inodes(shard_set)
    assert suspects.mark(shard_set.path, shard_set.rows("train")[0].name)
    again = create_shards(config)
    assert (inodes(again), suspects.marked(again.path)) == (nodes, [])


def test_a_marked_shard_that_was_restored_is_used_though_the_images_are_gone(config: RunConfig, folder: Path):
    shard_set = create_shards(config)
    first, second = shard_set.rows("train")[0], shard_set.rows("validation")[0]
    whole = (shard_set.path / first.tar).read_bytes()
    spoil(shard_set, first, "a flipped byte")
    with pytest.raises(CodecmillError, match=rf"{first.tar} is damaged.* Or restore it from a copy"):
        shard_set.read("train", 0, 0)
    assert suspects.mark(shard_set.path, second.name), "read badly once, from a disk far away"
    shutil.rmtree(folder)
    with pytest.raises(CodecmillError, match=rf"{first.tar} was damaged when it was read. .* Or restore it from a co"):
        ShardSet.open(shard_set.path)
    assert suspects.marked(shard_set.path) == [first.name]
    (shard_set.path / first.tar).write_bytes(whole)
    assert ShardSet.open(shard_set.path).read("train", 0, 0).key
    assert suspects.marked(shard_set.path) == []


def test_a_damaged_index_is_found_and_a_cut_tar_is_refused(config: RunConfig):
    shard_set = create_shards(config)
    row = shard_set.rows("train")[0]
    opened = ShardSet.open(shard_set.path)
    content = bytearray((shard_set.path / row.index).read_bytes())
    content[-3] ^= 1
    (shard_set.path / row.index).write_bytes(content)
    with pytest.raises(
        CodecmillError,
        match=rf"{row.index} was changed: its sha256 is .* It is made again, and no other, by: codecmill",
    ):
        opened.read("train", 0, 0)
    suspects.clear(shard_set.path)
    os.truncate(shard_set.path / row.tar, row.bytes - 512)
    with pytest.raises(
        CodecmillError, match=rf"{row.tar} has {row.bytes - 512} bytes, but the manifest says {row.bytes}"
    ):
        ShardSet.open(shard_set.path)


def test_a_tar_that_is_cut_while_it_is_open_is_an_error_not_a_crash(config: RunConfig):
    shard_set = create_shards(config)
    last = shard_set.counts("train")[0] - 1
    shard_set.read("train", 0, last)
    os.truncate(shard_set.path / shard_set.rows("train")[0].tar, 4096)
    with pytest.raises(CodecmillError, match=f"Sample {last} of .* is damaged"):
        shard_set.read("train", 0, last)


def test_an_index_is_read_once_also_where_its_tar_is_not_kept_open(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    """Samples of a window lie anywhere in it, and it may have more shards than a process may open."""
    monkeypatch.setattr(shard_set_module, "OPEN_TARS", 1)
    shard_set = create_shards(config)
    samples = [list(shard_set.samples(split)) for split in SPLITS]
    for row in shard_set.manifest.shards:
        (shard_set.path / row.index).unlink()
    assert [list(shard_set.samples(split)) for split in SPLITS] == samples
    open_files = [each.readlink() for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    assert [each.suffix for each in open_files if each.parent == shard_set.path] == [".tar"]
    monkeypatch.setattr(shard_set_module, "INDEX_BYTES", 1)
    bounded = create_shards(config)
    assert [list(bounded.samples(split)) for split in SPLITS] == samples
    assert len(bounded._indexes) == 1


def test_while_an_index_is_read_others_read_what_is_known(config: RunConfig):
    known = threading.Event()

    class Slow(ShardSet):
        def _read_index(self, row: ShardRow) -> np.ndarray:
            assert row.split != "test" or known.wait(20)
            return super()._read_index(row)

    shard_set = Slow.open(create_shards(config).path)
    expected = shard_set.read("train", 0, 0)
    with ThreadPoolExecutor(1) as other:
        reading = other.submit(shard_set.read, "test", 0, 0)
        assert shard_set.read("train", 0, 0) == expected
        known.set()
        assert reading.result().image


def test_manifests_that_cannot_be_used_are_explained(config: RunConfig, tmp_path: Path):
    shard_set = create_shards(config)
    manifest = json.loads((shard_set.path / "manifest.json").read_bytes())
    with pytest.raises(
        CodecmillError, match=r"is no shard set: it has no manifest\.json. Make it with: codecmill shards"
    ):
        ShardSet.open(tmp_path)
    for value, reason in (
        (manifest | {"format_version": 99}, "has format version 99, but this codecmill reads 1"),
        ({key: manifest[key] for key in manifest if key != "mean"}, "is damaged: mean: Field required"),
        ([], "has format version None"),
    ):
        write_json(tmp_path / "manifest.json", value)
        with pytest.raises(CodecmillError, match=reason):
            ShardSet.open(tmp_path)


def test_duplicates_count_once(config: RunConfig, folder: Path):
    alone = create_shards(config)
    shutil.copy(folder / "03.png", folder / "again.png")
    (folder / "link.png").hardlink_to(folder / "04.png")
    (folder / "soft.png").symlink_to(folder / "05.png")
    copy = varied(config, config.root / "other")
    both = create_shards(copy)
    assert both.fingerprint == alone.fingerprint
    assert bytes_of(both, ".tar", ".index") == bytes_of(alone, ".tar", ".index")
    rows = {Path(row.path).name: row for row in both.manifest.set_aside}
    assert {name: row.status for name, row in rows.items()} == {"again.png": "duplicate", "link.png": "duplicate"}
    assert rows["again.png"].reason == f"the same content as {folder / '03.png'}"


def test_a_broken_colour_profile_is_ignored_and_noted(config: RunConfig, folder: Path):
    with Image.open(folder / "00.png") as image:
        image.save(folder / "00.png", icc_profile=b"no profile at all")
    shard_set = create_shards(config)
    notes = {Path(row.path).name: row.note for split in SPLITS for row in shard_set.sources(split)}
    assert notes.pop("00.png").startswith("its colour profile was ignored: ")
    assert set(notes.values()) == {""}


def test_broken_images_are_set_aside_with_their_reason(config: RunConfig, folder: Path):
    whole = create_shards(config)
    good = (folder / "00.png").read_bytes()
    (folder / "cut.png").write_bytes(good[:-300])
    (folder / "empty.png").touch()
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "folder.png").mkdir()
    (folder / "unreadable.txt").write_text("not looked at")
    os.mknod(folder / "socket.png", stat.S_IFSOCK | 0o600)
    config = varied(config, max_bad_fraction=0.5)
    for workers in (1, 2):
        shard_set = create_shards(varied(config, config.root / f"{workers}", workers=workers))
        reasons = {Path(row.path).name: (row.status, row.reason) for row in shard_set.manifest.set_aside}
        assert set(reasons) == {"cut.png", "empty.png", "pipe.png", "loop.png", "socket.png"}
        assert {status for status, _ in reasons.values()} == {"broken"}
        assert "truncated" in reasons["cut.png"][1] or "broken" in reasons["cut.png"][1]
        assert "it is empty" in reasons["empty.png"][1]
        sizes = {Path(row.path).name: row.bytes for row in shard_set.manifest.set_aside}
        assert (sizes["cut.png"], sizes["empty.png"], sizes["pipe.png"]) == (len(good) - 300, 0, None)
        assert reasons["pipe.png"][1] == reasons["socket.png"][1] == "it is no regular file"
        assert "symbolic links" in reasons["loop.png"][1]
        assert bytes_of(shard_set, ".tar") == bytes_of(whole, ".tar"), "the rest goes on as if they were not there"


def test_too_many_broken_images_fail_with_the_list(config: RunConfig, folder: Path):
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"not an image " + name.encode())
    with pytest.raises(CodecmillError) as caught:
        create_shards(config)
    message = str(caught.value)
    assert message.startswith("2 of 14 images are broken, and data.max_bad_fraction 0.1 allows fewer.")
    assert "a.png: " in message
    assert "b.png: " in message
    assert "its content is of no known image format" in message
    assert len(create_shards(varied(config, max_bad_fraction=0.2)).manifest.set_aside) == 2


def test_a_file_rewritten_with_its_old_size_and_time_is_seen(config: RunConfig, folder: Path):
    file = folder / "raw.bmp"
    picture(70, 64, 64).save(file)
    os.utime(file, (1_000_000_000, 1_000_000_000))
    time.sleep(2.1)  # until the files count as settled
    about, first = file.stat(), create_shards(config)
    assert str(file) in json.loads((config.root / "shards" / "hash-cache.json").read_bytes())
    picture(71, 64, 64).save(file)
    os.utime(file, (1_000_000_000, 1_000_000_000))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (about.st_size, about.st_mtime_ns)
    assert create_shards(config).fingerprint != first.fingerprint


def test_the_hash_cache_saves_the_reading_and_may_be_lost(config: RunConfig, folder: Path):
    for file in folder.iterdir():
        os.utime(file, (1_000_000_000, 1_000_000_000))
    time.sleep(2.1)  # until the files count as settled
    first = create_shards(config)
    cache = config.root / "shards" / "hash-cache.json"
    known, is_sealed = read_sealed(cache)
    assert is_sealed
    assert {path: row[-1] for path, row in known.items()} == {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()
    }
    changed = cache.read_bytes().replace(known[str(folder / "00.png")][-1].encode(), b"0" * 64)
    for rubbish in (b"", b"[1, 2]", b'{"%s": 3}' % str(folder / "00.png").encode(), changed):
        cache.write_bytes(rubbish)
        assert create_shards(config).fingerprint == first.fingerprint


def test_masks_are_checked_against_their_images(config: RunConfig, folder: Path, tmp_path: Path):
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.new("L", (48, 48), 200).save(masks / "06.png")
    (masks / "00.png").write_bytes(b"no mask")
    Image.new("L", (5, 5)).save(masks / "01.png")
    shard_set = create_shards(varied(config, masks=str(masks), max_bad_fraction=0.5))
    reasons = {Path(row.path).name: row.reason for row in shard_set.manifest.set_aside}
    assert set(reasons) == {"00.png", "01.png"}
    assert "no known image format" in reasons["00.png"]
    assert reasons["01.png"] == f"its mask {masks / '01.png'} has 5 x 5 pixels, the image 48 x 64"


def test_small_images_are_padded_resized_or_skipped(config: RunConfig, folder: Path):
    small = picture(50, 20, 40)
    small.save(folder / "small.png")
    place = hashlib.sha256((folder / "small.png").read_bytes()).hexdigest()
    base = {"patch_size": 32, "validation_fraction": 0, "test_fraction": 0}

    def patches(how: str) -> list[np.ndarray]:
        shard_set = create_shards(varied(config, small_images=how, **base))
        return [
            np.asarray(decode_png(sample.image))
            for sample in shard_set.samples("train")
            if sample.info["source"] == place
        ]

    (padded,) = patches("pad")
    pixels = np.asarray(small)[4:36]
    assert np.array_equal(padded[:, :20], pixels)
    assert np.array_equal(padded[:, 20:], np.repeat(pixels[:, 19:20], 12, axis=1))
    resized = patches("resize")
    assert len(resized) == 2
    assert np.array_equal(np.concatenate(resized), np.asarray(small.resize((32, 64), Image.Resampling.BICUBIC)))
    assert patches("skip") == []
    skipped = create_shards(varied(config, small_images="skip", **base)).manifest.set_aside
    assert [(row.status, row.reason) for row in skipped if row.sha256 == place] == [
        ("skipped", "its 20 x 40 pixels are smaller than a patch of 32")
    ]


def test_a_skipped_image_leaves_the_splits_to_the_others(config: RunConfig, folder: Path):
    """Whichever images are too small, every split with a fraction is filled from those that are not."""
    for file in sorted(folder.iterdir())[3:]:
        number = int(file.stem)
        picture(number, 10, 10).save(file)
    shard_set = create_shards(varied(config, small_images="skip", patch_size=32))
    assert all(shard_set.manifest.samples[split] > 0 for split in SPLITS)


def test_flat_patches_are_passed_over(config: RunConfig, folder: Path):
    half = np.full((64, 64, 3), 128, np.uint8)
    half[:, 32:] = np.random.Generator(np.random.Philox(1)).integers(0, 255, (64, 32, 3))
    Image.fromarray(half).save(folder / "half.png")
    Image.new("RGB", (64, 64), (3, 4, 5)).save(folder / "flat.png")
    base = {"validation_fraction": 0, "test_fraction": 0, "patch_size": 32, "min_detail": 10}
    source = hashlib.sha256((folder / "half.png").read_bytes()).hexdigest()
    grid = create_shards(varied(config, **base))
    assert [s.info["box"] for s in grid.samples("train") if s.info["source"] == source] == [
        [32, 0, 32, 32],
        [32, 32, 32, 32],
    ]
    assert [(Path(row.path).name, row.reason) for row in grid.manifest.set_aside if row.status == "skipped"] == [
        ("flat.png", "no patch has a detail of 10 (data.min_detail)")
    ]
    random = create_shards(varied(config, patches="random", **base))
    for sample in random.samples("train"):
        assert np.asarray(decode_png(sample.image).convert("L")).std() >= 10


def test_random_patches_lie_anywhere_and_follow_the_seed(config: RunConfig, tmp_path: Path):
    def boxes(seed: int, place: Path | None = None) -> list[list[int]]:
        seeded = varied(config, place, patches="random", max_patches_per_image=3).model_copy(update={"seed": seed})
        shard_set = create_shards(seeded)
        for sample in shard_set.samples("train"):
            assert decode_png(sample.image).size == (16, 16)
        counts = [row.samples for row in shard_set.sources("train")]
        assert set(counts) == {3}
        return [sample.info["box"] for sample in shard_set.samples("train")]

    assert boxes(1) == boxes(1, tmp_path / "again") != boxes(2)
    assert any(left % 16 for left, *_ in boxes(1))


def test_a_cap_takes_patches_of_the_grid_from_all_over(config: RunConfig, folder: Path):
    picture(60, 320, 320).save(folder / "big.png")
    source = hashlib.sha256((folder / "big.png").read_bytes()).hexdigest()
    shard_set = create_shards(varied(config, max_patches_per_image=60, validation_fraction=0, test_fraction=0))
    boxes = [sample.info["box"] for sample in shard_set.samples("train") if sample.info["source"] == source]
    assert len({tuple(box) for box in boxes}) == 60
    assert all(left % 16 == 0 and top % 16 == 0 for left, top, *_ in boxes)
    for axis in (0, 1):
        assert min(box[axis] for box in boxes) < 100
        assert max(box[axis] for box in boxes) > 200


def test_what_shapes_a_set_names_it_and_nothing_else_does(config: RunConfig):
    fingerprint = create_shards(config).fingerprint
    for same in ({"normalization": "half"}, {"workers": 2}, {"shuffle_window": 3}, {"flip_vertical": True}):
        assert create_shards(varied(config, **same), run_parts=only_here).fingerprint == fingerprint
    for other in ({"patch_size": 24}, {"background": [0, 0, 0]}, {"test_fraction": 0.3}, {"patches": "random"}):
        assert create_shards(varied(config, **other)).fingerprint != fingerprint


def test_the_test_set_is_named_by_its_pixels(config: RunConfig, folder: Path):
    first = create_shards(config)
    assert create_shards(varied(config, patch_size=24)).test_set_sha256 == first.test_set_sha256
    Path(next(first.sources("test")).path).unlink()
    assert create_shards(config).test_set_sha256 != first.test_set_sha256


def test_splits_follow_the_threshold_and_an_empty_one_gets_the_nearest():
    def hashes(*places: float) -> list[str]:
        return [f"{int(place * 2**64):016x}" + 48 * "0" for place in places]

    low, middle, high, top = hashes(0.05, 0.15, 0.5, 0.9)
    assert assign_splits([top, high, middle, low], 0.1, 0.1) == {
        low: "test",
        middle: "validation",
        high: "train",
        top: "train",
    }
    assert list(assign_splits(hashes(0.3, 0.5, 0.9), 0.1, 0.1).values()) == ["test", "validation", "train"]
    assert list(assign_splits(hashes(0.01, 0.02, 0.03), 0.1, 0.1).values()) == ["test", "validation", "train"]
    assert list(assign_splits(hashes(0.01, 0.02), 0, 0).values()) == ["train", "train"]


def test_too_few_images_are_an_input_error(config: RunConfig, folder: Path):
    for file in sorted(folder.iterdir())[2:]:
        file.unlink()
    with pytest.raises(InputError, match="2 different usable images are too few: training, validation and test need 3"):
        create_shards(config)
    create_shards(varied(config, test_fraction=0))


def test_masks_with_the_same_image_are_one_source(config: RunConfig, folder: Path, tmp_path: Path):
    shutil.copy(folder / "00.png", folder / "copy.png")
    (tmp_path / "masks").mkdir()
    Image.new("L", (32, 48), 9).save(tmp_path / "masks" / "copy.png")
    shard_set = create_shards(varied(config, masks=str(tmp_path / "masks")))
    (duplicate,) = shard_set.manifest.set_aside
    assert Path(duplicate.path).name == "00.png", "the one with a mask stays, so that no picture is in two splits"
    kept = [row for split in SPLITS for row in shard_set.sources(split) if row.mask]
    assert [(Path(row.path).name, row.mask) for row in kept] == [("copy.png", str(tmp_path / "masks" / "copy.png"))]
    assert np.asarray(open_mask(Path(str(kept[0].mask)))).max() == 9


def test_progress_is_reported_to_the_end(config: RunConfig):
    heard: list[Progress] = []
    stop = listen(heard.append)
    try:
        create_shards(varied(config, workers=2))
    finally:
        stop()
    assert {one.stage for one in heard} == {"shards"}
    encoding = [(one.done, one.total) for one in heard if one.message == "encoding"]
    assert encoding[0] == (0, 12)
    assert encoding[-1] == (12, 12)
    assert encoding == sorted(encoding)


def test_a_listener_that_fails_leaves_no_worker(config: RunConfig):
    def fail(progress: Progress) -> None:
        if progress.message == "encoding" and progress.done:
            raise ZeroDivisionError

    before = children(os.getpid())
    stop = listen(fail)
    try:
        with pytest.raises(ZeroDivisionError) as caught:
            create_shards(varied(config, workers=2))
        assert caught.tb
        assert children(os.getpid()) == before
    finally:
        stop()


def test_ctrl_c_ends_the_workers(config: RunConfig, folder: Path, tmp_path: Path):
    picture(12, 1200, 1200).save(folder / "12.png")
    content = (folder / "12.png").read_bytes()
    for number in range(13, 60):  # more than is done before a loaded machine gets to the signal
        (folder / f"{number}.png").write_bytes(content + bytes([number]))
    process = start(varied(config, workers=2, max_patches_per_image=100_000), tmp_path / "config.json")
    deadline = time.monotonic() + 60
    while not list(config.root.glob("shards/.tmp-*/parts/[!.]*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=20)
    assert process.returncode != 0
    assert not any(map(alive, workers))
