"""The S3 that the environment names: whether it answers, and lets us in."""

import os
from collections.abc import Iterator
from http import HTTPStatus
from importlib.util import find_spec

from pipelines.doctor.findings import Finding, fault, good, note
from pipelines.storage import STORE
from pipelines.tracking import without_password

TIMEOUT_SECONDS = 5.0


def examine_s3() -> Iterator[Finding]:
    """`AWS_ENDPOINT_URL_S3` (or `AWS_ENDPOINT_URL`) and the credentials, as every S3 client here reads them.

    Where a store is named, that lies there, and what is found of it says more.
    """
    address = endpoint()
    if not address or os.environ.get(STORE):
        return
    if find_spec("botocore") is None:
        yield fault("S3", f"{without_password(address)} is named, and no client of S3 is installed", _INSTALL)
        return
    yield _asked(without_password(address))


def endpoint() -> str | None:
    """The S3 that the environment names, if it is not AWS's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


_INSTALL = "Install it: pip install -c requirements.lock -e '.[services]'"


def _asked(address: str) -> Finding:
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.session import Session

    patience = Config(
        connect_timeout=TIMEOUT_SECONDS,
        read_timeout=TIMEOUT_SECONDS,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": "path"},
    )
    region = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
    try:
        answer = Session().create_client("s3", region_name=region, config=patience).list_buckets()
    except ClientError as error:
        return _refused(address, error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"]["Code"])
    except (BotoCoreError, ValueError) as error:
        remedy = "Start it, or correct address and credentials in the environment or services.env."
        return fault("S3", f"{address} cannot be used: {str(error).strip()[:300]}", remedy)
    if "Buckets" not in answer:
        return fault("S3", f"{address} answers, but not as S3 does", "Correct AWS_ENDPOINT_URL.")
    names = ", ".join(sorted(each["Name"] for each in answer["Buckets"])[:4]) or "none"
    return good("S3", f"{address} lets us in; buckets: {names}")


def _refused(address: str, status: int, code: str) -> Finding:
    """What an error says: keys that are for one bucket alone may not list all, and are good."""
    if code == "AccessDenied":
        remedy = "If they are for single buckets: name one with CODECMILL_STORE, and look again."
        return note("S3", f"{address} answers, and does not let our credentials list its buckets", remedy)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return fault("S3", f"{address} fails ({status}, {code})", "Look at what the server says of it.")
    text = f"{address} refuses our credentials ({status}, {code})"
    return fault("S3", text, "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY as the server wants them.")
