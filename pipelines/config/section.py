"""What the sections of a config have in common."""

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A frozen group of choices in which an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, serialize_by_alias=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes True for 1, and so does pydantic: YAML's `steps: yes` would be one step."""
        if isinstance(value, bool) and info.field_name is not None:
            kinds = _kinds(cls.model_fields[info.field_name].annotation)
            if kinds & {int, float} and bool not in kinds:
                raise PydanticCustomError("number_type", "Input should be a number")
        return value


def at_home(path: str) -> str:
    """A path with a home for its `~`, which a shell leaves alone behind `--flag=`, and a file anywhere.

    Raises:
        ValueError: it is none that is known here.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:  # pathlib's word for it
        raise ValueError("in the home of a user known here, or written out") from error


def _kinds(annotation: Any) -> set[Any]:
    """A type, or all that a union or an annotated one is made of."""
    parts = get_args(annotation)
    return set().union(*map(_kinds, parts)) if parts else {annotation}
