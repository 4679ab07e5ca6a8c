"""Whose certificates a server may have, where somebody has said so: for those who ask it without its own client."""

import ssl
from pathlib import Path

import certifi


def trusted(authorities: str | None, all_are: bool) -> ssl.SSLContext:
    """The context of a connection.

    Args:
        authorities: a file or folder of certificates to believe; by default those that Prefect and MLflow bring along.
        all_are: believe any.

    Raises:
        OSError: they cannot be read.
    """
    if all_are:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context
    place = authorities or certifi.where()
    if Path(place).is_dir():
        return ssl.create_default_context(capath=place)
    try:
        return ssl.create_default_context(cafile=place)
    except OSError as error:
        raise OSError(f"the certificates to believe cannot be read from {place}: {error.strerror}") from error
