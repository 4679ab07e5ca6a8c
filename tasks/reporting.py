"""A task ends only when Prefect is there to hear of it: its work is done by then, and does not fail with its witness.

Prefect's own client gives up after a minute, at the start of the next task already after a second.
"""

import time

import httpx
from prefect import get_run_logger
from prefect.settings import PREFECT_API_URL, get_current_settings

from pipelines.errors import CodecmillError
from pipelines.run_directory import RunDirectory
from pipelines.trusted_certificates import trusted

PATIENCE_SECONDS = 600.0
INTERVAL_SECONDS = 2.0


class Unreported(CodecmillError):
    """The work is done on disk, and Prefect is not there to hear of it."""


def wait_until_heard(done: str, run: RunDirectory) -> None:
    """Return when Prefect's server answers, at once where it does.

    Args:
        done: what is on disk by now: "Training".

    Raises:
        Unreported: it does not answer for `PATIENCE_SECONDS`.
    """
    api = PREFECT_API_URL.value()
    if api is None:  # Prefect keeps one of its own beside this process
        return
    deadline = time.monotonic() + PATIENCE_SECONDS
    warned = False
    while (reason := silence(api)) is not None:
        if time.monotonic() > deadline:
            give_up()
            raise Unreported(
                f"{done} of '{run.path.name}' is done on disk, unreported: Prefect at {api} did not answer for "
                f"{PATIENCE_SECONDS:.0f} s ({reason}). Once it does, or without PREFECT_API_URL, go on with: "
                f"{run.command('resume')}"
            )
        if not warned:
            get_run_logger().warning("Prefect at %s does not answer; %s is done, and waits to say so.", api, done)
            warned = True
        time.sleep(INTERVAL_SECONDS)


def give_up() -> None:
    """Have Prefect's client ask once and no more: it would for minutes, for each thing that it wants to say."""
    get_current_settings().client.max_retries = 0


def silence(api: str) -> str | None:
    """Why the server does not answer, or None where it does."""
    settings = get_current_settings().api
    try:
        believed = trusted(settings.ssl_cert_file, all_are=settings.tls_insecure_skip_verify)
        answer = httpx.get(f"{api.rstrip('/')}/health", timeout=5, verify=believed)
    except (httpx.HTTPError, OSError) as error:
        return str(error) or type(error).__name__
    return f"status {answer.status_code}" if answer.status_code >= 500 else None
