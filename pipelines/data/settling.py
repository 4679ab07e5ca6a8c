"""Encoding every source for its split, until it is settled which sources give samples and where they belong."""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipelines.config import DataConfig
from pipelines.data.earlier_sets import EarlierSets
from pipelines.data.encoding import EncodingOrder, Job, UnreadableSourceError, read_source
from pipelines.data.hashing import Source
from pipelines.data.image_files import SetAside
from pipelines.data.parts import Part, read_part
from pipelines.data.patches import PatchSettings
from pipelines.data.shard_format import SourceRow, Split
from pipelines.data.splitting import assign_splits
from pipelines.errors import CodecmillError
from pipelines.progress import Progress, report

RunParts = Callable[[Sequence[EncodingOrder]], Iterator[int]]
"""Calls `encode_sources` on every order, anywhere, in any order; yields an order's number of jobs when it is done."""

SMALLEST_ORDER, LARGEST_ORDER = 2, 64
"""Sources that one order names at least, the last one apart, and at most."""

LISTED = 20
"""Broken images that an error lists."""


class LostSourcesError(CodecmillError):
    """Sources can no longer be read, so the set that is being made cannot be; one without them can.

    Attributes:
        reasons: by the path of the source.
    """

    def __init__(self, reasons: dict[str, str]):
        super().__init__("\n".join(f"{path}: {reason}" for path, reason in reasons.items()))
        self.reasons = reasons


@dataclass(frozen=True)
class Settled:
    """The split of each source that gives samples, what is known of it, and what was set aside on the way."""

    splits: dict[str, Split]
    known: dict[str, Part | SourceRow]
    set_aside: list[SetAside]


@dataclass
class Settling:
    """The work of `settle`: sources leave the pool as they turn out to give nothing.

    Attributes:
        parts: the folder where parts are written.
        files: number of files that were found, which `max_bad_fraction` is a fraction of.
    """

    pool: dict[str, Source]
    set_aside: list[SetAside]
    files: int
    data: DataConfig
    seed: int | None
    parts: Path
    earlier: EarlierSets
    run_parts: RunParts
    known: dict[tuple[str, Split], Part | SourceRow] = field(default_factory=dict)

    def settle(self) -> Settled:
        """Encode all, set aside what gives no sample, and split anew what is left, until nothing leaves any more.

        Raises:
            InputError: too few sources are left.
            LostSourcesError: some can no longer be read.
            ChangedSourceError: one is not what it was.
            CodecmillError: too many are broken.
        """
        while True:
            self._check_broken()
            splits = self._splits()
            self._encode([(self.pool[sha256], split) for sha256, split in splits.items()])
            useless = {}
            for sha256, split in splits.items():
                known = self.known[sha256, split]
                if known.status != "used":
                    useless[sha256] = (known.status, known.reason)
            if not useless:
                known = {sha256: self.known[sha256, split] for sha256, split in splits.items()}
                return Settled(splits, known, self.set_aside)
            for sha256, (status, reason) in useless.items():
                source = self.pool.pop(sha256)
                self.set_aside.append(SetAside(source.path, status, reason, sha256, source.bytes))

    def _splits(self) -> dict[str, Split]:
        """By the image alone: with another mask it stays where it was, for its pixels have been trained on there."""
        images = [source.image_sha256 for source in self.pool.values()]
        splits = assign_splits(images, self.data.validation_fraction, self.data.test_fraction)
        return {sha256: splits[source.image_sha256] for sha256, source in self.pool.items()}

    def _encode(self, wanted: list[tuple[Source, Split]]) -> None:
        """Make every wanted part known: from an earlier set, from an interrupted call, or by encoding it now."""
        missing: list[Job] = []
        for source, split in wanted:
            found = self.known.get((source.sha256, split)) or self._found(source.sha256, split)
            if found:
                self.known[source.sha256, split] = found
            else:
                missing.append(_job(source, split))
        done, total = len(wanted) - len(missing), len(wanted)
        report(Progress("shards", done, total, "images", "encoding"))
        if missing:
            with _closing(self.run_parts(self._orders(missing))) as counts:
                for count in counts:
                    done += count
                    report(Progress("shards", done, total, "images", "encoding"))
        lost: dict[str, str] = {}
        for job in missing:
            part = self._part(job.sha256, job.split)
            if part:
                self.known[job.sha256, job.split] = part
            else:
                lost[job.path] = _why_lost(job)
        if lost:
            raise LostSourcesError(lost)

    def _found(self, sha256: str, split: Split) -> Part | SourceRow | None:
        useless = self.earlier.useless(sha256, split)
        if useless:
            return Part(sha256, split, status=useless[0], reason=useless[1])
        return self.earlier.row(sha256, split) or self._part(sha256, split)

    def _part(self, sha256: str, split: Split) -> Part | None:
        """Without its spans, which are read again when they are needed: a large set has millions."""
        part = read_part(self.parts, sha256, split)
        return replace(part, spans=[]) if part else None

    def _orders(self, jobs: list[Job]) -> list[EncodingOrder]:
        """Each a part of what is left: large ones first, and small ones last, so that all workers end together.

        That is guided self-scheduling (Polychronopoulos and Kuck, 1987): whoever is quicker takes more orders.
        """
        settings = PatchSettings(
            patch_size=self.data.patch_size,
            patches=self.data.patches,
            max_patches_per_image=self.data.max_patches_per_image,
            min_detail=self.data.min_detail,
            small_images=self.data.small_images,
            background=self.data.background,
            seed=self.seed,
        )
        orders: list[EncodingOrder] = []
        start = 0
        while start < len(jobs):
            share = math.ceil((len(jobs) - start) / (2 * self.data.workers))
            end = start + min(max(share, SMALLEST_ORDER), LARGEST_ORDER)
            named = tuple(jobs[start:end])
            orders.append(
                EncodingOrder(folder=self.parts, settings=settings, compression=self.data.compression, jobs=named)
            )
            start = end
        return orders

    def _check_broken(self) -> None:
        broken = [row for row in self.set_aside if row.status == "broken"]
        if len(broken) <= self.data.max_bad_fraction * self.files:
            return
        listed = [f"{row.path}: {row.reason}" for row in broken[:LISTED]]
        more = [f"and {len(broken) - LISTED} more"] if len(broken) > LISTED else []
        raise CodecmillError(
            f"{len(broken)} of {self.files} images are broken, and data.max_bad_fraction "
            f"{self.data.max_bad_fraction:g} allows fewer. Repair or remove them, or raise it:\n  "
            + "\n  ".join(listed + more)
        )


def _why_lost(job: Job) -> str:
    """Why a source that is not encoded cannot be read."""
    try:
        read_source(job)
    except UnreadableSourceError as error:
        return str(error)
    raise CodecmillError(f"{job.path} could not be read for a while. Run again; what is encoded is kept.")


@contextmanager
def _closing(counts: Iterator[int]) -> Iterator[Iterator[int]]:
    """End what encodes at once when its consumer fails, and not when the garbage collector comes by."""
    try:
        yield counts
    finally:
        if isinstance(counts, Generator):
            counts.close()


def _job(source: Source, split: Split) -> Job:
    return Job(
        sha256=source.sha256,
        split=split,
        path=source.path,
        bytes=source.bytes,
        image_sha256=source.image_sha256,
        mask=source.mask,
        mask_sha256=source.mask_sha256,
    )
