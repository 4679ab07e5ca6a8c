"""Whether a run here, and what a store has under its name, are one run: else each would be written over the other."""

from pydantic import ValidationError

from pipelines.config import RunConfig
from pipelines.durable_files import read_json
from pipelines.errors import CodecmillError, InputError, first_fault
from pipelines.run_directory import RunDirectory
from pipelines.runs import shaped_otherwise
from pipelines.storage import keys
from pipelines.storage.patience import MissingObject
from pipelines.storage.store import Store


def config_in_store(run: RunDirectory, store: Store) -> RunConfig | None:
    """What a store has as a run's config, under this root; None where it does not have the run.

    Raises:
        StoreError: it cannot be had. CodecmillError: it is none of this version.
    """
    key = keys.of_run(run.path.name, run.config_file.name)
    try:
        values = store.read_object(key)
        return RunConfig.model_validate({**values, "root": str(run.root.path.absolute())})
    except MissingObject:
        return None
    except ValidationError as error:
        raise CodecmillError(f"{store.address(key)} is no config of this version: {first_fault(error)}.") from error


def must_be_one(run: RunDirectory, store: Store, there: RunConfig) -> None:
    """Compare what shapes the weights, and the shard sets, if both have theirs: one run has them once and for all.

    Two runs that agree in both are the same to the bit, whoever trains them.

    Args:
        there: the config in the store.

    Raises:
        InputError: they are two. StoreError: the store does not say.
    """
    differences = shaped_otherwise(run.read_config(), there)
    ours, theirs = _fingerprint_here(run), _fingerprint_there(run, store)
    if ours and theirs and ours != theirs:
        differences.append(f"shard set {ours[:16]} here, {theirs[:16]} there")
    if differences:
        raise InputError(
            f"{store.url} has another run called '{run.path.name}': {'; '.join(differences)}. Give one of them another "
            "--name, or this root another store."
        )


def _fingerprint_here(run: RunDirectory) -> str | None:
    return str(read_json(run.shard_set_file).get("fingerprint")) if run.shard_set_file.is_file() else None


def _fingerprint_there(run: RunDirectory, store: Store) -> str | None:
    try:
        return str(store.read_object(keys.of_run(run.path.name, run.shard_set_file.name)).get("fingerprint"))
    except MissingObject:
        return None
