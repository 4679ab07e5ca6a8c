"""Which shard set is to be made: what goes in, what it is called, where it is made, and what passes to another."""

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.config import RunConfig
from pipelines.data.hashing import Source, identify
from pipelines.data.image_files import SetAside
from pipelines.data.shard_format import codec_versions, fingerprint_of, settings_digest_of, settings_of
from pipelines.data.sources import Sources, find_sources
from pipelines.durable_files import link_or_copy
from pipelines.errors import BusyError
from pipelines.locks import lock
from pipelines.run_directory import Root


@dataclass(frozen=True)
class Plan:
    """A shard set to be made: what goes in, what it is called, and where it lies."""

    config: RunConfig
    sources: dict[str, Source]
    set_aside: tuple[SetAside, ...]
    files: int
    settings: dict[str, Any]
    settings_digest: str
    fingerprint: str
    shards: Path

    @property
    def folder(self) -> Path:
        return self.shards / self.fingerprint[:16]

    @property
    def working(self) -> Path:
        return self.shards / f".tmp-{self.fingerprint[:16]}"

    @property
    def parts(self) -> Path:
        return self.working / "parts"

    @property
    def title(self) -> str:
        return f"shard set {self.fingerprint[:16]}"

    @property
    def lock_file(self) -> Path:
        return self.shards / f".tmp-{self.fingerprint[:16]}.lock"


def make_plan(config: RunConfig, lost: Mapping[str, str] | None = None) -> Plan:
    """Find and hash the sources, and name the set that they make.

    Args:
        lost: why some images are known to be unreadable, by their paths.
    """
    shards = Root(config.root.absolute()).shards
    shards.mkdir(parents=True, exist_ok=True)
    found = _without(lost or {}, find_sources(config))
    sources, set_aside = identify(found, shards / "hash-cache.json", config.data.workers)
    settings = settings_of(config)
    settings_digest = settings_digest_of(settings, codec_versions())
    hashes = [source.sha256 for source in sources]
    return Plan(
        config=config,
        sources=dict(zip(hashes, sources, strict=True)),
        set_aside=tuple(set_aside),
        files=len(found.images) + len(found.set_aside),
        settings=settings,
        settings_digest=settings_digest,
        fingerprint=fingerprint_of(settings_digest, hashes),
        shards=shards,
    )


def _without(lost: Mapping[str, str], found: Sources) -> Sources:
    named = {row.path for row in found.set_aside}
    rows = [SetAside(path, "broken", reason) for path, reason in lost.items() if path not in named]
    images = tuple(image for image in found.images if image.path not in lost)
    return replace(found, images=images, set_aside=(*found.set_aside, *rows))


def hand_over(done: Plan, plan: Plan) -> None:
    """What is encoded for one set serves another of the same settings: parts are named by what they were made of.

    They stay where they were too, for the first set may be wanted again, as soon as a disk is back.
    """
    if done.working == plan.working or not done.parts.exists():
        return
    plan.parts.mkdir(parents=True, exist_ok=True)
    for file in done.parts.iterdir():
        if not (plan.parts / file.name).exists():
            link_or_copy(file, plan.parts / file.name)


def discard(plan: Plan) -> None:
    """Delete what was encoded for a set that was not made, unless another process makes it now."""
    with suppress(BusyError), lock(plan.lock_file, plan.title, wait=0.0):
        if plan.working.exists():
            shutil.rmtree(plan.working)
