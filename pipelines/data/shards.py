"""From a folder of images to a shard set, named by all that went into it: the same inputs make the same bytes."""

import hashlib
import math
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.config import RunConfig
from pipelines.data import remote_sets, suspects
from pipelines.data.abandoned import remove_abandoned
from pipelines.data.assembly import DamagedPieceError, Outline, Piece, inputs_digest, link_shard, write_shard
from pipelines.data.earlier_sets import EarlierSets
from pipelines.data.encoding import ChangedSourceError
from pipelines.data.encoding_worker import run_here, run_in_processes
from pipelines.data.hashing import Source
from pipelines.data.parts import PART, Part, part_file, read_part
from pipelines.data.planning import Plan, discard, hand_over, make_plan
from pipelines.data.repairing import write_manifest
from pipelines.data.settling import LostSourcesError, RunParts, Settled, Settling
from pipelines.data.shard_format import (
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    Manifest,
    SetAsideRow,
    ShardRow,
    SourceRow,
    canonical,
    codec_versions,
    is_whole,
)
from pipelines.data.shard_index import SPAN
from pipelines.data.shard_set import ShardSet
from pipelines.data.splitting import group
from pipelines.data.waiting import alone
from pipelines.durable_files import room_for, sync_folder
from pipelines.errors import CodecmillError
from pipelines.progress import Progress, report

SMALLEST_STD = 0.5 / 255
"""For a channel that hardly changes: half a level, so that normalising with it stays finite."""


def create_shards(config: RunConfig, run_parts: RunParts | None = None) -> ShardSet:
    """Make the shard set of a config, or find it made.

    What an interrupted call has encoded is used; so is what an earlier set under the same root holds already. A damaged
    shard (a file missing or of another size, or marked by a reader) is made again, and no other. What vanishes or
    becomes unreadable meanwhile is set aside, as if it had been so from the start; what turns out to be damaged of the
    samples that were there is encoded again.

    Args:
        run_parts: what encodes in parallel; by default `data.workers` processes.

    Raises:
        InputError: no image is found, or too few for the splits.
        CodecmillError: more images than `data.max_bad_fraction` are broken, or one changes meanwhile.
    """
    plan = make_plan(config)
    remove_abandoned(plan.shards)
    given_up: list[Plan] = []
    lost: dict[str, str] = {}
    damaged: set[Path] = set()
    while not _is_complete(plan.folder):
        with alone(plan.lock_file, plan.title.capitalize(), plan.files, "makes the same shard set"):
            try:
                _complete(plan, run_parts or _default_runner(config.data.workers))
                break
            except LostSourcesError as error:
                lost |= error.reasons
                given_up.append(plan)
                plan = make_plan(config, lost)
                hand_over(given_up[-1], plan)
            except DamagedPieceError as error:
                if error.file in damaged or not _passed_over(error.file):
                    raise
                damaged.add(error.file)
            except ChangedSourceError:
                hand_over(plan, make_plan(config, lost))
                raise
    for other in given_up:
        if other.working != plan.working:
            discard(other)
    with suppress(OSError):  # a root that others own: a cleaning goes by when somebody last wanted it
        os.utime(plan.folder / MANIFEST)
    return ShardSet.open(plan.folder)


def find_shards(config: RunConfig) -> Path | None:
    """The folder of a config's shard set if it is made and whole; the images are looked at, nothing is encoded.

    Raises:
        InputError: no image is found.
    """
    folder = make_plan(config).folder
    return folder if _is_complete(folder) else None


def _is_complete(folder: Path) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    if remote_sets.origin(folder) is not None:
        return True  # in a store
    manifest = Manifest.read(folder)
    return not suspects.still_damaged(folder, manifest.shards) and all(
        is_whole(folder / name, size) for shard in manifest.shards for name, size, _ in shard.files()
    )


def _complete(plan: Plan, run_parts: RunParts) -> None:
    if not _is_complete(plan.folder):
        if not _is_complete(plan.working):
            _make(plan, run_parts)
        _publish(plan)


def _default_runner(workers: int) -> RunParts:
    return run_here if workers == 1 else partial(run_in_processes, workers=workers)


def _make(plan: Plan, run_parts: RunParts) -> None:
    """Fill the working folder: parts, then shards, then the manifest."""
    plan.parts.mkdir(parents=True, exist_ok=True)
    earlier = EarlierSets(plan.shards, plan.settings_digest, verify=plan.folder.exists())
    settling = Settling(
        pool=dict(plan.sources),
        set_aside=list(plan.set_aside),
        files=plan.files,
        data=plan.config.data,
        seed=plan.settings["seed"],
        parts=plan.parts,
        earlier=earlier,
        run_parts=run_parts,
    )
    with room_for(plan.shards, plan.title, partial(_still_needed, plan)):
        settled = settling.settle()
        rows = _shards(plan, settled, earlier)
        write_manifest(plan.working, _manifest(plan, settled, rows), plan.folder)


def _passed_over(file: Path) -> bool:
    """Have nothing taken any more from a damaged part, or tar of an earlier set; returns whether that was possible."""
    if file.suffix == PART:
        file.unlink()
        return True
    return suspects.mark(file.parent, file.stem)


def _still_needed(plan: Plan) -> int:
    """Bytes: what the parts that are there say of those to come, and of the tars that all of them go into."""
    parts = [file.stat().st_size for file in plan.parts.glob(f"[!.]*{PART}")]
    written = sum(file.stat().st_size for file in plan.working.rglob("*") if file.is_file())
    return max(2 * sum(parts) * len(plan.sources) // max(len(parts), 1) - written, 0)


def _shards(plan: Plan, settled: Settled, earlier: EarlierSets) -> list[ShardRow]:
    groups: list[tuple[Outline, list[str]]] = []
    for split in SPLITS:
        members = [sha256 for sha256, of in settled.splits.items() if of == split]
        sizes = {sha256: settled.known[sha256].pixels * (4 if plan.sources[sha256].mask else 3) for sha256 in members}
        for place, hashes in group(sizes, plan.config.data.max_shard_mib * 2**20).items():
            inputs = inputs_digest(plan.settings_digest, split, hashes)
            groups.append((Outline(f"{split}-{place}", split, inputs), hashes))

    def make(outline: Outline, hashes: list[str]) -> ShardRow:
        found = earlier.shard(outline.inputs)
        if found:
            sources = [_source_row(plan.sources[sha256], settled.known[sha256]) for sha256 in hashes]
            return link_shard(plan.working, outline, sources, *found)
        pieces = [_piece(plan, settled, earlier, outline, sha256) for sha256 in hashes]
        return write_shard(plan.working, outline, pieces)

    # Checksums, reading, writing and waiting for the disk all leave the interpreter to others.
    pool = ThreadPoolExecutor(plan.config.data.workers)
    rows: list[ShardRow] = []
    try:
        report(Progress("shards", 0, len(groups), "shards", "writing"))
        for row in pool.map(make, *zip(*groups, strict=True)):
            rows.append(row)
            report(Progress("shards", len(rows), len(groups), "shards", "writing"))
    finally:
        pool.shutdown(cancel_futures=True)
    return rows


def _piece(plan: Plan, settled: Settled, earlier: EarlierSets, outline: Outline, sha256: str) -> Piece:
    known = settled.known[sha256]
    row = _source_row(plan.sources[sha256], known)
    if isinstance(known, SourceRow):
        return Piece(row, *earlier.samples(sha256, outline.split))
    file = part_file(plan.parts, sha256, outline.split)
    part = read_part(plan.parts, sha256, outline.split)
    if part is None:
        raise CodecmillError(f"{file} has vanished while the shards were being made. Run again.")
    return Piece(row, file, np.array([tuple(span) for span in part.spans], dtype=SPAN))


def _source_row(source: Source, known: Part | SourceRow) -> SourceRow:
    figures = ("width", "height", "samples", "tar_bytes", "pixels", "sums", "squares", "pixels_sha256", "note")
    return SourceRow(**asdict(source), status="used", **{name: getattr(known, name) for name in figures})


def _manifest(plan: Plan, settled: Settled, rows: list[ShardRow]) -> Manifest:
    known = {split: [settled.known[s] for s, of in settled.splits.items() if of == split] for split in SPLITS}
    mean, std = _moments(known["train"])
    tested = sorted(str(part.pixels_sha256) for part in known["test"])
    set_aside = sorted(settled.set_aside, key=lambda row: (row.path, row.status))
    return Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=plan.fingerprint,
        settings=plan.settings,
        settings_digest=plan.settings_digest,
        versions=codec_versions(),
        shards=rows,
        set_aside=[SetAsideRow(**asdict(row)) for row in set_aside],
        sources={split: len(known[split]) for split in SPLITS},
        samples={split: sum(part.samples for part in known[split]) for split in SPLITS},
        mean=mean,
        std=std,
        test_set_sha256=hashlib.sha256(canonical(tested)).hexdigest(),
    )


def _moments(parts: Sequence[Part | SourceRow]) -> tuple[Any, Any]:
    """Mean and standard deviation of each channel on the scale 0 to 1, from exact integer sums."""
    pixels = sum(part.pixels for part in parts)
    means, deviations = [], []
    for channel in range(3):
        total = sum(part.sums[channel] for part in parts)
        squares = sum(part.squares[channel] for part in parts)
        means.append(total / (255 * pixels))
        variance = (pixels * squares - total * total) / (255 * pixels) ** 2
        deviations.append(max(math.sqrt(variance), SMALLEST_STD))
    return tuple(means), tuple(deviations)


def _publish(plan: Plan) -> None:
    """Show the set whole: rename its folder, or, where a damaged one is in the way, its files, the manifest last."""
    if plan.parts.exists():
        shutil.rmtree(plan.parts)
    sync_folder(plan.working)
    if plan.folder.exists():
        names = sorted((file.name for file in plan.working.iterdir()), key=lambda name: (name == MANIFEST, name))
        for name in names:
            (plan.working / name).replace(plan.folder / name)
        suspects.clear(plan.folder)
        remote_sets.make_own(plan.folder)
        sync_folder(plan.folder)
        shutil.rmtree(plan.working)  # renaming a file onto another link of itself leaves both
    else:
        plan.working.rename(plan.folder)
    sync_folder(plan.shards)
