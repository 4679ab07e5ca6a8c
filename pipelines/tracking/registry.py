"""Registered versions of the model 'codecmill': one for each run and checkpoint, and which of them is champion."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import CodecmillError
from pipelines.promotion import Decision, Scores
from pipelines.run_directory import Root, RunDirectory
from pipelines.tracking.artifacts import log_checkpoint
from pipelines.tracking.connection import connected, is_unmade, sent_once
from pipelines.tracking.runs import opened

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MODEL = "codecmill"
ABOUT = f"Image codecs that codecmill trained. `models:/{MODEL}@champion` is the best of them on the test set."
CHAMPION = "champion"
CANDIDATE = "candidate"
TEST = "test/"
"""Before the names of test metrics, in tags as in charts."""
CURVE_IMAGES = "curve_images"
"""The tag beside them that says of how many images a codec's curves are."""


@dataclass(frozen=True)
class Version:
    """A registered version.

    Attributes:
        number: from 1.
        source: the `runs:/` address of its checkpoint.
        run: name of the codecmill run.
        run_id: of MLflow.
        step: optimiser steps done.
        fingerprint: of the shard set.
        checkpoint_sha256: of the weights' file.
        scores: of its last evaluation on a test split.
    """

    number: int
    source: str
    run: str
    run_id: str
    step: int
    fingerprint: str
    checkpoint_sha256: str
    scores: Scores
    tags: Mapping[str, str]


def register_model(
    run: RunDirectory,
    checkpoint_folder: Path,
    checkpoint_sha256: str,
    fingerprint: str,
    metrics: Mapping[str, float],
    test_set_sha256: str,
    curve_images: int = 0,
) -> int:
    """Register a checkpoint; the same checkpoint of the same run has one version, however often it is registered.

    Args:
        checkpoint_folder: `step_<step>`; it is sent to MLflow first if it was not yet.
        metrics: of the test, without a prefix: `psnr` in dB, `ms_ssim` from 0 to 1.
        curve_images: as of `Scores`.

    Returns:
        The version's number.
    """
    source = log_checkpoint(run, checkpoint_folder)
    with connected(run.root) as client:
        run_id = opened(run).run_id
        _ensure_model(client)
        versions = client.search_model_versions(f"name = '{MODEL}' and run_id = '{run_id}'", max_results=1000)
        known = [int(v.version) for v in versions if v.tags.get("checkpoint_sha256") == checkpoint_sha256]
        if known:
            record_evaluation(run.root, min(known), metrics, test_set_sha256, curve_images)
            return min(known)
        tags = {
            "run": run.path.name,
            "step": str(int(checkpoint_folder.name.removeprefix("step_"))),
            "fingerprint": fingerprint,
            "checkpoint_sha256": checkpoint_sha256,
            **_test_tags(metrics, test_set_sha256, curve_images),
        }
        with sent_once():
            made = client.create_model_version(MODEL, source, run_id, tags=tags, await_creation_for=0)
        return int(made.version)


def _ensure_model(client: "MlflowClient") -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(MODEL, description=ABOUT)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _test_tags(metrics: Mapping[str, float], test_set_sha256: str, curve_images: int) -> dict[str, str]:
    values = {TEST + name: repr(float(value)) for name, value in metrics.items()}
    return values | {CURVE_IMAGES: str(curve_images), "test_set_sha256": test_set_sha256}


def record_evaluation(
    root: Root, version: int, metrics: Mapping[str, float], test_set_sha256: str, curve_images: int = 0
) -> None:
    """Replace a version's test metrics, as when the champion was evaluated on a new test set."""
    with connected(root) as client:
        new = _test_tags(metrics, test_set_sha256, curve_images)
        former = client.get_model_version(MODEL, str(version)).tags
        # Whatever ends this half-way leaves a version that was evaluated on no known test set, and is evaluated again.
        client.set_model_version_tag(MODEL, str(version), "test_set_sha256", "")
        for key in former:
            if key.startswith(TEST) and key not in new:
                client.delete_model_version_tag(MODEL, str(version), key)
        for key, value in new.items():
            client.set_model_version_tag(MODEL, str(version), key, value)


def version_with(checkpoint_sha256: str, root: Root) -> str | None:
    """The address of the oldest version whose weights have this sha256; None where there is none."""
    if is_unmade(root):
        return None
    with connected(root) as client:
        wanted = f"name = '{MODEL}' and tags.checkpoint_sha256 = '{checkpoint_sha256}'"
        numbers = [int(version.version) for version in client.search_model_versions(wanted)]
    return f"models:/{MODEL}/{min(numbers)}" if numbers else None


def champion(root: Root) -> Version | None:
    """The version that has the alias 'champion'; None before there is one."""
    with connected(root) as client:
        number = _aliases(client).get(CHAMPION)
        return None if number is None else _as_version(client.get_model_version(MODEL, str(number)))


def _aliases(client: "MlflowClient") -> dict[str, int]:
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(MODEL).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
    return {alias: int(number) for alias, number in aliases.items()}


def _as_version(known: "ModelVersion") -> Version:
    tags = dict(known.tags)
    number = int(known.version)
    try:
        curves = tags.get(CURVE_IMAGES)  # versions of former times have none
        metrics = {key.removeprefix(TEST): float(value) for key, value in tags.items() if key.startswith(TEST)}
        return Version(
            number=number,
            source=known.source or "",
            run=tags["run"],
            run_id=known.run_id or "",
            step=int(tags["step"]),
            fingerprint=tags["fingerprint"],
            checkpoint_sha256=tags["checkpoint_sha256"],
            scores=Scores(number, metrics, tags["test_set_sha256"], int(curves) if curves else None),
            tags=tags,
        )
    except (KeyError, ValueError) as error:
        raise CodecmillError(
            f"Version {number} of the registered model '{MODEL}' was not made by codecmill, or its tags were changed "
            f"({error}). Give the alias '{CHAMPION}' to another version in MLflow, or delete the alias."
        ) from error


def promote(run: RunDirectory, version: int, decision: Decision) -> None:
    """Give a version its alias, and keep the reason as its tags; a repeat changes nothing.

    An alias belongs to one version: a former champion loses it to the new one.
    """
    with connected(run.root) as client:
        aliases = _aliases(client)
        known = client.get_model_version(MODEL, str(version)).tags
        is_anew = aliases.get(decision.alias) != version
        # Of a champion that is compared with itself the tags tell more: how it became one.
        if is_anew or decision.alias != CHAMPION:
            for tag, value in (("promotion", decision.alias), ("promotion_reason", decision.reason)):
                if known.get(tag) != value:
                    client.set_model_version_tag(MODEL, str(version), tag, value)
        if is_anew:
            client.set_registered_model_alias(MODEL, decision.alias, str(version))
        if decision.alias == CHAMPION and aliases.get(CANDIDATE) == version:
            client.delete_registered_model_alias(MODEL, CANDIDATE)
