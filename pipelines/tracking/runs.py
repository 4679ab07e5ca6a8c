"""One MLflow run for each run directory: made once, found again, and told what the run's files say."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.checkpoints import readable_manifests
from pipelines.config import RunConfig
from pipelines.run_directory import RunDirectory
from pipelines.tracking.connection import (
    connected,
    experiment_id,
    is_server,
    sent_once,
    tracking_uri,
    without_password,
)
from pipelines.tracking.lines import first_point, in_batches, read_lines
from pipelines.tracking.marks import Marks, read_marks, write_marks
from pipelines.versions import git_commit, package_versions

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger("codecmill.tracking")

RUN_TAG = "codecmill.run"
DIRECTORY_TAG = "codecmill.run_directory"
FIRST_POINT_TAG = "codecmill.first_point"
SHARD_SET_TAG = "codecmill.shard_set"

# MLflow's own limits (mlflow/utils/validation.py): it refuses what is longer or more.
METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
LONGEST_PARAM = 6000
LONGEST_TAG = 8000
LONGEST_DIGEST = 36

_AS_TRAINING = "?workflowType=machine_learning"
"""Else MLflow's pages show a run among the evaluations of chats."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as MLflow knows it."""

    run_id: str
    experiment_id: str
    tracking_uri: str
    """Without a password."""

    @classmethod
    def of(cls, marks: Marks) -> "TrackedRun":
        return cls(marks.run_id, marks.experiment_id, marks.tracking_uri)

    def page(self, artifact: str = "") -> str:
        """The run's page below the address of any MLflow server that shows it, with one of its artifacts open."""
        inside = f"/artifacts/{artifact}" if artifact else ""
        return f"#/experiments/{self.experiment_id}/runs/{self.run_id}{inside}{_AS_TRAINING}"

    def url(self, artifact: str = "") -> str | None:
        """The same with its address; None where MLflow is a database that no server shows yet."""
        return f"{self.tracking_uri.rstrip('/')}/{self.page(artifact)}" if is_server(self.tracking_uri) else None


def open_run(run: RunDirectory, config: RunConfig, is_running: bool = True) -> TrackedRun:
    """Make the run known to MLflow, or go on with what MLflow has of it; it says that it is RUNNING unless told not to.

    The whole config goes in as params, dotted; what has changed since (params cannot) as tags `config.*`; and as the
    artifact `config.json`, uncut. Git commit and package versions are tags: what runs here, or of a run that is not
    running, what made its newest checkpoint.

    Raises:
        TrackingUnavailable: MLflow cannot be reached.
    """
    return TrackedRun.of(_opened(run, config, is_running))


def _opened(run: RunDirectory, config: RunConfig, is_running: bool) -> Marks:
    with connected(run.root) as client:
        marks, known = _found_or_made(client, run, is_running)
        _log_config(client, known, config)
        _set_tags(client, marks.run_id, {DIRECTORY_TAG: str(run.path.resolve()), **_origin(run, is_running)})
        if is_running:
            client.update_run(marks.run_id, status="RUNNING")
    return marks


def tracked(run: RunDirectory) -> TrackedRun | None:
    """A run as MLflow knew it when it last took something of it; asks nobody."""
    marks = read_marks(run)
    return TrackedRun.of(marks) if marks else None


def opened(run: RunDirectory) -> Marks:
    """The marks of a run that MLflow knows; one that it does not know is opened first."""
    return read_marks(run) or _opened(run, run.read_config(), is_running=False)


def _found_or_made(client: "MlflowClient", run: RunDirectory, is_running: bool) -> tuple[Marks, "Run"]:
    experiment = experiment_id(client, run.root)
    marks = read_marks(run)
    known = marked(client, run, marks) or _searched(client, run, experiment)
    if known is None:
        tags = {RUN_TAG: run.path.name, DIRECTORY_TAG: str(run.path.resolve())}
        with sent_once():
            known = client.create_run(experiment, run_name=run.path.name, tags=tags)
        if not is_running:  # MLflow takes each new one to be; how it stands is said when all of it is there
            client.set_terminated(known.info.run_id, status="KILLED")
    elif known.info.lifecycle_stage == "deleted":
        client.restore_run(known.info.run_id)
    here = without_password(tracking_uri(run.root))
    if marks is None or marks.run_id != known.info.run_id:
        marks = Marks(run_id=known.info.run_id, experiment_id=known.info.experiment_id, tracking_uri=here)
        write_marks(run, marks)
    elif marks.tracking_uri != here:  # MLflow, or the root with its database, has moved
        marks = marks.model_copy(update={"tracking_uri": here})
        write_marks(run, marks)
    has = _last_trained_step(known)
    if has > marks.journal_step:
        marks = marks.model_copy(update={"journal_step": has})
        write_marks(run, marks)
    return marks, known


def _last_trained_step(known: "Run") -> int:
    """The last step of which MLflow has a figure of the training; 0 where it has none.

    The marks may be older than that, where another machine has sent what came after them, or the run's folder is from
    a backup. Steps that are trained again here have other times, and would become second rows.
    """
    return max((each.step for each in known.data.to_proto().metrics if each.key.startswith("train/")), default=0)


def marked(client: "MlflowClient", run: RunDirectory, marks: Marks | None) -> "Run | None":
    """The MLflow run that the marks name, if MLflow still has it and the marks were not copied from another run."""
    from mlflow.exceptions import MlflowException

    if marks is None:
        return None
    try:
        known = client.get_run(marks.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        log.warning("MLflow no longer has run %s; all of it is sent anew.", marks.run_id)
        return None
    return known if known.data.tags.get(RUN_TAG) == run.path.name else None


def _searched(client: "MlflowClient", run: RunDirectory, experiment: str) -> "Run | None":
    """A run that was made just before its marks were lost; never one of a deleted folder that had the same name."""
    same_name = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run.path.name}'", max_results=1000)
    point = first_point(run.journal)
    for known in same_name:
        tags = known.data.tags
        if tags.get(DIRECTORY_TAG) == str(run.path.resolve()) and tags.get(FIRST_POINT_TAG) in (None, point):
            return known
    return None


def _log_config(client: "MlflowClient", known: "Run", config: RunConfig) -> None:
    from mlflow.entities import Param

    whole = config.model_dump(mode="json")
    now = {key: _cut(value, LONGEST_PARAM) for key, value in _flattened(whole).items()}
    before, tags = known.data.params, known.data.tags
    new = [Param(key, value) for key, value in now.items() if key not in before]
    for start in range(0, len(new), PARAMS_PER_CALL):
        client.log_batch(known.info.run_id, params=new[start : start + PARAMS_PER_CALL], synchronous=True)
    changed = {
        f"config.{key}": value
        for key, value in now.items()
        if key in before and (before[key] != value or f"config.{key}" in tags)
    }
    _set_tags(client, known.info.run_id, changed)
    client.log_dict(known.info.run_id, whole, "config.json")


def _flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{'a': {'b': 1}} becomes {'a.b': '1'}; what is no text is written as JSON."""
    flat: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flattened(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item if isinstance(item, str) else json.dumps(item)
    return flat


def _cut(value: str, longest: int) -> str:
    return value if len(value) <= longest else value[: longest - 1] + "…"


def _origin(run: RunDirectory, is_running: bool) -> dict[str, str]:
    """Which code and packages made a run: those here, unless it is only told of, perhaps by others long after it."""
    manifest = None if is_running else next(readable_manifests(run), None)
    versions, commit = (manifest.versions, manifest.git_commit) if manifest else (package_versions(), git_commit())
    tags = {f"version.{package}": version for package, version in versions.items()}
    return tags | {"mlflow.source.name": "codecmill"} | ({"mlflow.source.git.commit": commit} if commit else {})


def _set_tags(client: "MlflowClient", run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    if tags:
        rows = [RunTag(key, _cut(value, LONGEST_TAG)) for key, value in tags.items()]
        client.log_batch(run_id, tags=rows, synchronous=True)


def log_shard_set(run: RunDirectory, fingerprint: str, folder: Path, profile: Mapping[str, Any]) -> None:
    """Record the shard set as the run's dataset; once, however often it is called.

    Args:
        fingerprint: the whole one; MLflow shows its first 36 characters as the digest.
        folder: where the shard set lies.
        profile: what is worth showing of it, as JSON: counts, mean and std.
    """
    with connected(run.root) as client:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        marks = opened(run)
        dataset = Dataset(
            name="shard_set",
            digest=fingerprint[:LONGEST_DIGEST],
            source_type="local",
            source=json.dumps({"uri": str(folder.resolve()), "fingerprint": fingerprint}),
            profile=json.dumps(dict(profile), sort_keys=True),
        )
        client.log_inputs(marks.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        _set_tags(client, marks.run_id, {SHARD_SET_TAG: fingerprint})


def ship_journal(run: RunDirectory) -> int:
    """Send the journal's steps that MLflow does not have yet; returns how many.

    They carry the journal's times, so that what is sent twice (the marks are written after the sending) is the same
    row. Every metric has one value a step.

    Raises:
        TrackingUnavailable: MLflow cannot be reached; what was sent until then is marked.
    """
    sent = 0
    with connected(run.root) as client:
        from mlflow.entities import Metric

        marks = opened(run)
        for lines in in_batches(read_lines(run.journal, marks.journal_offset, marks.journal_step), METRICS_PER_CALL):
            if marks.journal_step == 0:
                _set_tags(client, marks.run_id, {FIRST_POINT_TAG: first_point(run.journal) or ""})
            metrics = [
                Metric(key, value, line.milliseconds, line.step)
                for line in lines
                for key, value in line.figures.items()
            ]
            for start in range(0, len(metrics), METRICS_PER_CALL):
                client.log_batch(marks.run_id, metrics=metrics[start : start + METRICS_PER_CALL], synchronous=True)
            reached = {"journal_offset": lines[-1].end, "journal_step": lines[-1].step}
            marks = marks.model_copy(update=reached)
            write_marks(run, marks)
            sent += len(lines)
    return sent


def log_metrics(run: RunDirectory, step: int, metrics: Mapping[str, float], seconds: float) -> None:
    """Log figures that the journal has not, such as `test/psnr`.

    Args:
        step: optimiser steps done.
        seconds: when they were made, since 1970; the same on a repeat, so that it is the same row.
    """
    with connected(run.root) as client:
        from mlflow.entities import Metric

        marks = opened(run)
        rows = [Metric(key, float(value), round(seconds * 1000), step) for key, value in metrics.items()]
        client.log_batch(marks.run_id, metrics=rows, synchronous=True)


def set_status(run: RunDirectory, status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]) -> None:
    """Say in MLflow how the run is."""
    with connected(run.root) as client:
        marks = opened(run)
        if status == "RUNNING":
            client.update_run(marks.run_id, status=status)
        else:
            client.set_terminated(marks.run_id, status=status)
