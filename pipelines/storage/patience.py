"""What is done about a store that fails: tried again for a while, then explained in one sentence."""

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

from pipelines.errors import CodecmillError

T = TypeVar("T")

USUAL_SECONDS = 30.0
"""How long one object is tried for, where nobody is ready to wait longer."""

LEAST_TRIES = 3
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 10.0
"""Seconds between two tries: they double from the first to the longest, give or take a quarter."""

_REFUSALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "InvalidConfigError")
"""Of botocore: what no further try changes."""

_REFUSED_KEYS = frozenset(
    {"ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "RequestTimeTooSkewed", "SignatureDoesNotMatch"}
)
"""S3's names of what is wrong with the key that a request is signed with, and not with what it asks for."""


class StoreError(CodecmillError):
    """An object could not be had or sent."""


class StoreFailed(StoreError):
    """The store as a whole, and not this object alone: what it says of others means nothing now."""


class StoreUnavailable(StoreFailed):
    """The store failed again and again, or was not there: later it may well work."""

    may_pass = True


class StoreRefused(StoreFailed):
    """The store takes no request of ours, whatever it is for: the key is wrong or has expired, or there is none."""


class MissingObject(StoreError):
    """The store has no such object."""


class DamagedObject(StoreError):
    """What the store gives is not what was sent, however often it is asked."""


class HalfObject(Exception):
    """What arrived is not what was recorded; the text is how it differs, as the rest of a sentence."""


def patiently(url: str, verb: str, attempt: Callable[[], T], seconds: float | None = None) -> T:
    """Try until it works; what can pass is tried for some time, what cannot (no key, no object) once.

    Args:
        url: of the object, for the message; `verb`: what is tried, as in "could not be VERB".
        seconds: for how long, pauses included; by default `USUAL_SECONDS`.

    Raises:
        MissingObject: there is no such object, or bucket.
        DamagedObject: it arrived, each time, and was not what was recorded of it.
        StoreUnavailable: the store did not answer, or with errors.
        StoreRefused: the store lets nothing of ours through. StoreError: it does not let us do this.
    """
    patience = USUAL_SECONDS if seconds is None else seconds
    begun = time.monotonic()
    tries, pause = 0, FIRST_PAUSE
    while True:
        tries += 1
        try:
            return attempt()
        except FileNotFoundError as error:
            raise MissingObject(f"{url} could not be {verb}: there is no such object, or no such bucket.") from error
        except Exception as error:
            _raise_unless_passing(url, verb, error)
            spent = time.monotonic() - begun
            if tries >= LEAST_TRIES and spent + pause > patience:
                raise _given_up(url, verb, error, tries, spent) from error
        time.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311  # so that ranks do not all come back at once
        pause = min(2 * pause, LONGEST_PAUSE)


def _raise_unless_passing(url: str, verb: str, error: Exception) -> None:
    if isinstance(error, CodecmillError):
        raise error
    if isinstance(error, OSError) and error.filename is not None:  # of a file here: s3fs's own errors name none
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise CodecmillError(f"{url} could not be {verb}: {error.filename}: {error.strerror}.") from error
        raise error
    if _is_damage(error):
        return
    concerns_us = type(error).__name__ in _REFUSALS or store_code(error) in _REFUSED_KEYS
    if isinstance(error, PermissionError) or concerns_us:
        raise (StoreRefused if concerns_us else StoreError)(
            f"{url} could not be {verb}: {_reason(error)}. Look at AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (or "
            "AWS_PROFILE) and at what they may do in this bucket."
        ) from error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise error
    if not _comes_from_outside(error):
        raise error


def store_code(error: BaseException) -> str:
    """S3's own name of an error, such as NoSuchKey; empty where there is none."""
    response = getattr(error.__cause__, "response", None)
    return str(response["Error"].get("Code")) if response else ""


def _is_damage(error: Exception) -> bool:
    """Whether something arrived and was not what was sent; botocore looks at the checksums that S3 itself keeps."""
    return isinstance(error, HalfObject) or type(error).__name__ == "FlexibleChecksumError"


def _comes_from_outside(error: Exception) -> bool:
    """Whether it is the network's or the store's, and not a fault of the program."""
    libraries = ("botocore.", "aiobotocore.", "aiohttp.", "fsspec.", "s3fs.")
    return isinstance(error, OSError) or type(error).__module__.startswith(libraries)


def _given_up(url: str, verb: str, error: Exception, tries: int, spent: float) -> StoreError:
    often = f"{tries} times in {spent:.0f} s"
    if _is_damage(error):
        how = error if isinstance(error, HalfObject) else f"was damaged on the way: {_reason(error)}"
        return DamagedObject(f"{url} was {verb} {often}, and at last it {how}.")
    return StoreUnavailable(
        f"{url} could not be {verb}, {often}: {_reason(error)}. Look at the store (AWS_ENDPOINT_URL, network), then "
        "run the same again."
    )


def _reason(error: Exception) -> str:
    """The first line of what a library says, without the full stop at its end; some say nothing but their name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.partition("\n")[0].rstrip(".")
    return str(error).partition("\n")[0].rstrip(".") or {"FSTimeoutError": "it stalled"}.get(
        type(error).__name__, type(error).__name__
    )
