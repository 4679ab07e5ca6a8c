"""The links of a chain that lie in the run: its config, the weights that it began with, where its shards are."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.durable_files import json_bytes
from pipelines.provenance import remedies
from pipelines.provenance.chain import Chain, recorded_folder
from pipelines.provenance.ledger import Ledger
from pipelines.provenance.locating import with_weights
from pipelines.run_directory import Root, RunDirectory
from pipelines.runs import flat, may_change


def verify_parent(chain: Chain, root: Root, ledger: Ledger) -> None:
    """The weights that the run started from: the run keeps a copy of them."""
    sha256, kept = chain.manifest.parent, chain.kept_parent
    if sha256 is None:
        return
    if kept is not None:
        ledger.check(kept, None, sha256, remedies.of_parent(sha256, root))
    elif with_weights(sha256, root) is None:
        ledger.note(f"{chain.folder} was started from the weights {sha256[:16]}..., which are not under {root.path}.")


def verify_choices(run: RunDirectory, chains: Sequence[Chain], ledger: Ledger) -> None:
    """`config.json` against what each checkpoint says that it was trained with."""
    way_out = remedies.of_config(chains[-1].folder)
    values = _as_written(run.config_file, ledger, way_out)
    if values is None:
        return
    differences: dict[tuple[str, str, str], list[str]] = {}
    for chain in chains:
        for difference in _differences(chain.manifest.config or {}, values):
            differences.setdefault(difference, []).append(chain.folder.name)
    for (name, before, now), folders in differences.items():
        how = f"says {name} {now} instead of {before} in {', '.join(folders)}"
        if _may_change(name, before, now):
            ledger.note(f"{run.config_file} {how}; this may change.")
        else:
            ledger.wrong(run.config_file, how, way_out)


def verify_pointer(run: RunDirectory, chains: Sequence[Chain], ledger: Ledger) -> None:
    """`shard_set.json`, by which the run itself finds its shard set."""
    way_out = remedies.of_pointer(run)
    values = _as_written(run.shard_set_file, ledger, way_out)
    if values is None:
        return
    trained_on = {chain.manifest.shard_set for chain in chains}
    fingerprint = str(values.get("fingerprint"))
    if fingerprint not in trained_on:
        how = f"names shard set {fingerprint[:16]}, but the checkpoints were trained on "
        ledger.wrong(run.shard_set_file, how + ", ".join(name[:16] for name in sorted(trained_on)), way_out)
        return
    said, lies = recorded_folder(run), next(chain.shard_folder for chain in chains)
    if said is None or lies is None or said.resolve() != lies.resolve():
        ledger.note(f"{run.shard_set_file} names the folder {said}; the set lies in {lies or 'none that was found'}.")


def _as_written(file: Path, ledger: Ledger, way_out: str) -> dict[str, Any] | None:
    """The values in a JSON file of ours; that it has other bytes than are written of such values is wrong as well."""
    ledger.begin(file)
    try:
        content = file.read_bytes()
        ledger.heard(len(content))
        values = json.loads(content)
        is_ours = isinstance(values, dict) and json_bytes(values) == content
    except OSError as error:
        how = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        how = f"is no JSON any more: {error}"
    else:
        if is_ours:
            return values
        how = "was changed: the same values would be written in other bytes"
    ledger.wrong(file, how, way_out)
    return None


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Fields with another value, as JSON; what a later codecmill has added to a config is passed over."""
    old, new = flat(before), flat(now)
    for name, value in old.items():
        if name not in new:
            yield name, json.dumps(value), "nothing"
        elif new[name] != value:
            yield name, json.dumps(value), json.dumps(new[name])


def _may_change(name: str, before: str, now: str) -> bool:
    """What `runs.merge` lets a resumed run have."""
    if name == "training.steps":
        return before.isdecimal() and now.isdecimal() and int(now) >= int(before)
    return now != "nothing" and may_change(name)
