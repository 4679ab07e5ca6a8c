"""The values of a config by dotted name, as flags and messages have them, and back."""

from typing import Any


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """A config's values by dotted name, sections opened, everything else whole."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": content for inner, content in value.items()}
        else:
            found[key] = value
    return found


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted name, as sections: `flat` undone."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        (found.setdefault(section, {}) if section else found)[field] = value
    return found
