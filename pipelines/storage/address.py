"""Where the store is: an address like those of MLflow and Prefect, in the environment and in no config."""

import os
import re

from pipelines.errors import InputError

STORE = "CODECMILL_STORE"
"""Names the store, such as s3://bucket/prefix. Keys, region and endpoint are where AWS's own tools look for them."""

SCHEME = "s3"

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
"""S3's own rule is stricter, and others are more generous."""


def store_url() -> str | None:
    """The store that the environment names, if any, without a slash at its end.

    Raises:
        InputError: what it names is no address of a store.
    """
    named = os.environ.get(STORE, "").strip()
    return checked_url(named, STORE) if named else None


def checked_url(url: str, what: str) -> str:
    """An address below a bucket, without a slash at its end.

    Args:
        what: names where it was given, for the message.

    Raises:
        InputError: it is none, or holds a password, which would be written into logs.
    """
    scheme, _, rest = url.partition("://")
    bucket = rest.partition("/")[0]
    if "@" in bucket:
        raise InputError(
            f"{what} holds a key or password, which would end in logs. Leave it out, and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
        )
    if scheme != SCHEME or not _BUCKET.fullmatch(bucket) or set("?#") & set(rest):
        raise InputError(f"{what} is '{url}', which is no address such as s3://bucket or s3://bucket/prefix.")
    return url.rstrip("/")


def is_url(text: str) -> bool:
    """Whether something is meant as an address in a store, and not as a path."""
    return text.startswith(f"{SCHEME}://")
