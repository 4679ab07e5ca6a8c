"""Where things lie in a store: as under a root, so that a copy of one is the other."""

import re
from pathlib import Path

from pipelines.checkpoint_format import MANIFEST
from pipelines.storage.store import Store

_CHECKPOINT = re.compile(rf"step_(\d{{8,}})/{re.escape(MANIFEST)}")


def of_run(name: str, *inside: str) -> str:
    return "/".join(("runs", name, *inside))


def of_checkpoint(name: str, step: int, *file: str) -> str:
    return of_run(name, "checkpoints", f"step_{step:08d}", *file)


def of_shard_set(folder: Path, *file: str) -> str:
    """Of a set in a folder of the root: its name is the beginning of its fingerprint."""
    return "/".join(("shards", folder.name, *file))


def complete_steps(store: Store, name: str) -> list[int]:
    """The steps of a run that have a whole checkpoint in a store, ascending: its manifest is sent last.

    Raises:
        StoreError: the store does not say.
    """
    prefix = of_run(name, "checkpoints/")
    found = (_CHECKPOINT.fullmatch(each.key.removeprefix(prefix)) for each in store.list(prefix))
    return sorted(int(match[1]) for match in found if match)
