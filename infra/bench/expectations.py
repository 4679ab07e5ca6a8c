"""What the quick benchmark is expected to find: `expected.toml`, and which figures fell behind it."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter, ValidationError

from pipelines.config import Section
from pipelines.errors import InputError, first_fault

EXPECTED = Path(__file__).with_name("expected.toml")


class Expectation(Section):
    """Of one figure: a value, which way is better, and how much worse it may be, as a share of the value."""

    value: float = Field(gt=0)
    tolerance: float = Field(ge=0)
    better: Literal["more", "less"]

    @property
    def limit(self) -> float:
        """The worst value that has not fallen."""
        return self.value * (1 - self.tolerance if self.better == "more" else 1 + self.tolerance)

    def is_met_by(self, found: float) -> bool:
        return found >= self.limit if self.better == "more" else found <= self.limit


def read_expectations(path: Path = EXPECTED) -> dict[str, Expectation]:
    """By the names that the figures have in `latest.json`.

    Raises:
        InputError: the file is no table of expectations.
    """
    try:
        return TypeAdapter(dict[str, Expectation]).validate_python(tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no TOML: {error}. Restore it: git checkout -- {path}") from error
    except ValidationError as error:
        raise InputError(
            f"{path} has no such expectations: {first_fault(error)}. See the comment at its top."
        ) from error


def fallen(found: Mapping[str, float], expected: Mapping[str, Expectation]) -> list[str]:
    """A sentence for each figure that fell, or that is expected and was not measured."""
    sentences = []
    for name, expectation in expected.items():
        if name not in found:
            sentences.append(f"{name} is expected to be {expectation.value:g}, but was not measured.")
        elif not expectation.is_met_by(found[name]):
            bound = "at least" if expectation.better == "more" else "at most"
            sentences.append(
                f"{name} fell: it is {found[name]:.3g}, was expected to be {expectation.value:g}, and should be "
                f"{bound} {expectation.limit:.3g}."
            )
    return sentences
