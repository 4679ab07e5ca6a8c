"""What MLflow's pages say in words of a run and of its version, with the ways to its report and to Prefect's page."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from pipelines.run_directory import RunDirectory
from pipelines.tracking.connection import connected
from pipelines.tracking.registry import MODEL
from pipelines.tracking.runs import TrackedRun, opened

if TYPE_CHECKING:
    from mlflow import MlflowClient

PICTURE = "worst.webp"
NOTE_TAG = "mlflow.note.content"
OURS = "codecmill: "
"""How our descriptions begin: one that somebody else has written is left alone."""


def describe(
    run: RunDirectory, version: int, found: str, report: str, picture: bytes | None, flow_run: str | None
) -> None:
    """Describe a run and its registered version; a repeat says the same, or what is true by now.

    Args:
        found: what the evaluation found and what became of the version; lists show it as it is, without Markdown.
        report: the artifact that is the report.
        picture: WebP to be shown, some 550 pixels wide; it becomes an artifact beside the report.
        flow_run: Prefect's page of the flow run that did it.
    """
    with connected(run.root) as client:
        known = TrackedRun.of(opened(run))
        links = [f"[Report with pictures]({known.page(report)})", f"[Version {version}]({version_page(version)})"]
        if flow_run:
            links.append(f"[Flow run in Prefect]({flow_run})")
        shown = [f"![]({_shown(client, known, report, picture)})"] if picture else []
        before = client.get_run(known.run_id).data.tags.get(NOTE_TAG, "")
        if _is_free(before):
            note = "\n\n".join([OURS + found, " · ".join(links), *shown])
            client.set_tag(known.run_id, NOTE_TAG, note, synchronous=True)
        if _is_free(client.get_model_version(MODEL, str(version)).description or ""):
            use = f"`--training.start_from models:/{MODEL}/{version}` begins with its weights."
            client.update_model_version(MODEL, str(version), "\n\n".join([OURS + found, links[0], use]))


def version_page(version: int) -> str:
    """A version's page below the address of an MLflow server."""
    return f"#/models/{MODEL}/versions/{version}"


def _is_free(description: str) -> bool:
    return not description or description.startswith(OURS)


def _shown(client: "MlflowClient", known: TrackedRun, report: str, picture: bytes) -> str:
    """Send a picture; returns where MLflow's pages find it, from their own address."""
    folder = report.rpartition("/")[0]
    with tempfile.TemporaryDirectory(prefix="codecmill-") as scratch:
        (file := Path(scratch) / PICTURE).write_bytes(picture)
        client.log_artifact(known.run_id, str(file), folder)
    return f"get-artifact?{urlencode({'path': f'{folder}/{PICTURE}', 'run_uuid': known.run_id})}"
