"""What the sections of a config have in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of choices in which an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, serialize_by_alias=True
    )
