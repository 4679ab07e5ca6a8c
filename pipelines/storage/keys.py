"""Where things lie in a store: as under a root, so that a copy of one is the other."""

import re
from pathlib import Path

from pipelines.checkpoint_format import MANIFEST
from pipelines.data import other_manifests
from pipelines.evaluation.contents import RESULT
from pipelines.run_directory import step_name
from pipelines.storage.objects import Object
from pipelines.storage.store import Store

_CHECKPOINT = re.compile(r"(step_(\d{8,}))/(.+)")
_EVALUATION = re.compile(rf"(step_(\d{{8,}})(?:_[0-9a-f]{{8}})?)/{re.escape(RESULT)}")


def of_run(name: str, *inside: str) -> str:
    return "/".join(("runs", name, *inside))


def of_checkpoint(name: str, step: int, *file: str) -> str:
    return of_run(name, "checkpoints", step_name(step), *file)


def of_evaluation(name: str, folder: str, *file: str) -> str:
    """Of a folder such as `step_00000500`."""
    return of_run(name, "evaluation", folder, *file)


def of_journal(name: str, piece: int) -> str:
    """Of a piece of the journal, counted from 0: the first one has the journal's own name."""
    return of_run(name, "metrics.jsonl") if piece == 0 else of_run(name, "journal", f"{piece:08}")


def journal_pieces(store: Store, name: str) -> list[int]:
    """The pieces of a run's journal after the first one that a store has, ascending.

    Raises:
        StoreError: the store does not say.
    """
    prefix = of_run(name, "journal/")
    found = (each.key.removeprefix(prefix) for each in store.list(prefix))
    return sorted(int(number) for number in found if re.fullmatch(r"\d{8}", number))


def of_shard_set(folder: Path, *file: str) -> str:
    """Of a set in a folder of the root: its name is the beginning of its fingerprint."""
    return "/".join(("shards", folder.name, *file))


def of_other_manifests(folder: Path, *file: str) -> str:
    return of_shard_set(folder, other_manifests.FOLDER, *file)


def complete_steps(store: Store, name: str) -> list[int]:
    """The steps of a run that have a whole checkpoint in a store, ascending: its manifest is sent last.

    Raises:
        StoreError: the store does not say.
    """
    return sorted(step for step, files in checkpoint_files(store, name).items() if MANIFEST in files)


def checkpoint_files(store: Store, name: str) -> dict[int, set[str]]:
    """The files of a run's checkpoints in a store, whole or not, by their steps.

    Raises:
        StoreError: the store does not say.
    """
    prefix = of_run(name, "checkpoints/")
    found: dict[int, set[str]] = {}
    for each in store.list(prefix):
        match = _CHECKPOINT.fullmatch(each.key.removeprefix(prefix))
        if match and match[1] == step_name(int(match[2])):
            found.setdefault(int(match[2]), set()).add(match[3])
    return found


def complete_evaluations(store: Store, name: str) -> dict[str, tuple[int, Object]]:
    """The whole evaluations of a run in a store, by the names of their folders: the step, and what was sent last.

    Raises:
        StoreError: the store does not say.
    """
    prefix = of_run(name, "evaluation/")
    found = ((each, _EVALUATION.fullmatch(each.key.removeprefix(prefix))) for each in store.list(prefix))
    return {match[1]: (int(match[2]), each) for each, match in found if match}
