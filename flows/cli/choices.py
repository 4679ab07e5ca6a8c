"""Every field of RunConfig as people meet it: its dotted name, what it is, what it may be, and its default."""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from pipelines.config import RunConfig
from pipelines.errors import InputError

Schema = dict[str, Any]

LONGEST_LIST = 40
"""Characters of a placeholder that lists its values; longer lists stand in the help text, where they are wrapped."""


@dataclass(frozen=True)
class Choice:
    """One field.

    Attributes:
        name: dotted, as in `training.steps`.
        description: one line that says the unit.
        placeholder: what stands for the value in a list of flags: `N`, `N|auto`, `grid|random`, `KIND`.
        allowed: the values it may take, in words; empty when any text will do.
        default: as JSON.
    """

    name: str
    description: str
    placeholder: str
    allowed: str
    default: Any
    is_switch: bool
    is_list: bool
    may_be_null: bool

    @property
    def section(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def key(self) -> str:
        return self.name.rpartition(".")[2]

    def parse(self, text: str) -> Any:
        """The value that a flag's text stands for, checked later, together with all others.

        Raises:
            InputError: it looks like JSON and is none.
        """
        if self.may_be_null and text.lower() in ("null", "none"):
            return None
        is_structured = self.is_list or self.placeholder.endswith("JSON")
        if is_structured and text.lstrip().startswith(("{", "[")):
            try:
                return json.loads(text)
            except ValueError as error:
                raise InputError(
                    f"--{self.name} is {text}, which is no JSON ({error}). It may be {self.allowed}."
                ) from error
        return [part.strip() for part in text.split(",")] if self.is_list else text


@cache
def choices() -> dict[str, Choice]:
    """All fields by dotted name, in the order in which `RunConfig` declares them."""
    schema = RunConfig.model_json_schema(by_alias=True)
    found: dict[str, Choice] = {}
    for name, field in schema["properties"].items():
        section = _resolve(field, schema) if "$ref" in field else None
        inner = {f"{name}.{key}": value for key, value in section["properties"].items()} if section else {name: field}
        found |= {dotted: _choice(dotted, value, schema) for dotted, value in inner.items()}
    return found


@cache
def sections() -> dict[str, str]:
    """The sections' names and what each is about, in order."""
    schema = RunConfig.model_json_schema(by_alias=True)
    return {
        name: _resolve(field, schema).get("description", name)
        for name, field in schema["properties"].items()
        if "$ref" in field
    }


def _resolve(schema: Schema, whole: Schema) -> Schema:
    return whole["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _choice(name: str, schema: Schema, whole: Schema) -> Choice:
    kinds = [_resolve(kind, whole) for kind in schema.get("anyOf", [schema])]
    types = {kind.get("type") for kind in kinds}
    return Choice(
        name=name,
        description=schema["description"],
        placeholder="|".join(_placeholder(kind) for kind in kinds if kind.get("type") != "null"),
        allowed=", or ".join(filter(None, (_allowed(kind, whole) for kind in kinds if kind.get("type") != "null"))),
        default=schema.get("default"),
        is_switch="boolean" in types,
        is_list="array" in types,
        may_be_null="null" in types,
    )


def _placeholder(kind: Schema) -> str:
    if "enum" in kind or "const" in kind:
        listed = "|".join(kind.get("enum", [kind.get("const")]))
        return listed if len(listed) <= LONGEST_LIST else "KIND"
    if kind["type"] == "array":
        return ",".join(_placeholder(item) for item in kind["prefixItems"])
    if kind["type"] == "string":
        return "PATH" if kind.get("format") == "path" else "TEXT"
    return {"integer": "N", "number": "X", "boolean": "true|false", "object": "JSON"}[kind["type"]]


def _allowed(kind: Schema, whole: Schema) -> str:
    if "enum" in kind or "const" in kind:
        *most, last = kind.get("enum", [kind.get("const")])
        return f"{', '.join(most)} or {last}" if most else last
    if kind["type"] == "array":
        items = kind["prefixItems"]
        return f"{len(items)} numbers {_allowed(items[0], whole)}".replace(" a number", "").strip()
    if kind["type"] == "object":
        return "{" + ", ".join(f"{key}: {_allowed(value, whole)}" for key, value in kind["properties"].items()) + "}"
    if kind["type"] == "boolean":
        return "true or false"
    return _bounds(kind) if kind["type"] in ("integer", "number") else ""


def _bounds(kind: Schema) -> str:
    low, above, high = kind.get("minimum"), kind.get("exclusiveMinimum"), kind.get("maximum")
    if low is not None and high is not None:
        return f"{low:.15g} to {high:.15g}" if kind["type"] == "number" else f"{low} to {high}"
    parts = [
        f"at least {low}" if low is not None else "",
        f"above {above:g}" if above is not None else "",
        f"at most {high:g}" if high is not None else "",
    ]
    return ", ".join(filter(None, parts)) or "a number"
