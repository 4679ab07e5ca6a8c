"""The errors that a user meets: each is one clear sentence and an exit code."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class CodecmillError(Exception):
    """Something went wrong that the message explains in full: the file or value, the reason, the way out."""

    exit_code = 1
    may_pass = False
    """Whether the same again may well succeed, with nothing changed."""


class RankFailure(CodecmillError):
    """A rank ended without an explanation, killed perhaps: from its checkpoint the training may well go on."""

    may_pass = True


class InputError(CodecmillError):
    """What the user gave (a config, a flag, a name, a glob) cannot be used."""

    exit_code = 2


class DiskFullError(CodecmillError):
    """A disk is full."""


class BusyError(CodecmillError):
    """Another process holds the run or the shard set."""

    exit_code = 3
    may_pass = True


class Interrupted(CodecmillError):
    """The work was asked to stop, saved what it had reached, and can be resumed."""

    def __init__(self, message: str, exit_code: int = 130):
        super().__init__(message)
        self.exit_code = exit_code


def first_fault(error: "ValidationError") -> str:
    """The first thing that is wrong with a value, and where in it, as the end of a sentence."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    what = first["msg"].removeprefix("Value error, ")  # pydantic's word before ours
    return f"{where}: {what}" if where else what
