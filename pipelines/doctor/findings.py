"""What an examination finds: one line each, and what to do about it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

State = Literal["good", "note", "fault"]
"""A `note` is worth knowing and stops nothing; with a `fault` runs fail, now or later."""


class Finding(BaseModel):
    """One thing that was looked at.

    Attributes:
        about: a word or two that say what.
        text: what there is.
        remedy: what to do, where there is something to do.
    """

    model_config = ConfigDict(frozen=True)

    about: str
    state: State
    text: str
    remedy: str = ""


def good(about: str, text: str) -> Finding:
    return Finding(about=about, state="good", text=text)


def note(about: str, text: str, remedy: str) -> Finding:
    return Finding(about=about, state="note", text=text, remedy=remedy)


def fault(about: str, text: str, remedy: str) -> Finding:
    return Finding(about=about, state="fault", text=text, remedy=remedy)
