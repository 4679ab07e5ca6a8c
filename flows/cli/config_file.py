"""The effective config: a YAML file, flags over it, checked once, explained where it is wrong, printed to edit."""

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flows.cli.choices import choices, sections
from pipelines.config import RunConfig
from pipelines.errors import InputError

LARGEST_FILE = 50_000
"""Bytes. A config has 6 kB with all its comments; PyYAML takes half a second for the worst file of this size."""

DEEPEST = 20
"""Brackets in brackets. A config has two; PyYAML takes seconds to find that it cannot read a thousand."""

LONGEST_NUMBER = 100
"""Characters. The time for 1:1:1:... (to base 60) grows with its square, and Python shows no number of 5,000 digits."""

MOST_FAULTS = 20
"""Of a file, that are explained one by one."""

Values = dict[str, Any]


def effective_config(file: Path | None, overrides: Values) -> RunConfig:
    """The config of a file, or the defaults, with nested `overrides` on top.

    Raises:
        InputError: the file cannot be read, or a value cannot be used.
    """
    return checked(combined(read_config_file(file) if file else {}, overrides), file, overrides)


def combined(base: Mapping[str, Any], top: Mapping[str, Any]) -> Values:
    """Nested values, those of `top` over those of `base`, section by section."""
    merged = dict(base)
    for key, value in top.items():
        both_sections = key in sections() and isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = combined(base[key], value) if both_sections else value
    return merged


def checked(values: Values, file: Path | None, overrides: Values) -> RunConfig:
    """The config that nested values make.

    Args:
        file, overrides: where the values came from, to be named when one is wrong.

    Raises:
        InputError: one line for each value that cannot be used.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(_explanations(error, file, overrides))) from error


class _StrictLoader(yaml.SafeLoader):
    """YAML of plain values and plain keys, none given twice: PyYAML itself would silently take the last.

    What makes a short file an endless one is refused: maps merged into maps, lists as keys, brackets without end.
    """

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:  # PyYAML's name
        if self.flow_level == DEEPEST:
            raise yaml.MarkedYAMLError(problem="there are too many brackets in brackets", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        is_number = isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float"))
        if is_number and len(node.value) > LONGEST_NUMBER:
            raise yaml.MarkedYAMLError(problem="a number has too many digits", problem_mark=node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # PyYAML does not look whether a value is what its tag says: !!bool maybe, or the 45th of a month.
            problem = f"{reprlib.repr(node.value)} is no {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # `!!map x` is none
            problem = None
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key is not text"
            elif key.tag == "tag:yaml.org,2002:merge":
                problem = "'<<' is not understood here"
            elif key.value in seen:
                problem = f"'{key.value}' is given twice"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_config_file(path: Path) -> Values:
    """The nested values in a YAML file.

    Raises:
        InputError: it is missing, too large, no YAML, or no `key: value` lines.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise InputError(f"The config {path} has more than {LARGEST_FILE:,} bytes: too large to be one.")
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise InputError(
            f"The config {path} cannot be read: {reason}. `codecmill config` prints one to edit."
        ) from error
    try:
        values = yaml.load(text, _StrictLoader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"The config {path} is no valid YAML: {_where(error)}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"The config {path} has no 'key: value' lines. `codecmill config` prints one to edit.")
    return {str(key): value for key, value in values.items()}


def _where(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0] or type(error).__name__
    return f"line {mark.line + 1}: {problem}" if mark else problem


def _explanations(error: ValidationError, file: Path | None, overrides: Values) -> list[str]:
    """One line for each value at fault; a value that fits no branch of a union is one fault, not one a branch."""
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        name = _field_of(problem["loc"])
        if name not in lines and len(lines) == MOST_FAULTS:
            return [*lines.values(), "And more than these."]
        if name not in lines:
            lines[name] = _explanation(name, problem, file, overrides)
    return list(lines.values())


def _field_of(location: tuple[int | str, ...]) -> str:
    dotted = ".".join(map(str, location[:2]))
    return str(location[0]) if location and str(location[0]) in choices() else dotted


def _explanation(name: str, problem: Any, file: Path | None, overrides: Values) -> str:
    source = _source(name, file, overrides)
    if problem["type"] == "extra_forbidden" and name in choices():
        section, _, key = name.partition(".")
        shown = _shown(problem["input"])
        return (
            f"{source} is not known as one key. Write two lines, the second indented: '{section}:', '{key}: {shown}'."
        )
    if problem["type"] == "extra_forbidden":
        return f"{source} is not known.{nearest(name, [*choices(), *sections()])}"
    if problem["type"] == "value_error" and name not in choices():
        return f"{problem['ctx']['error']}."
    if name in sections():
        return f"{source} is {_shown(problem['input'])}, but must be a section of 'key: value' lines."
    choice = choices()[name]
    own_rule = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else ""
    if problem["type"] == "string_too_short":
        own_rule = "left out, where there is none"
    must = own_rule or choice.allowed or ("a path" if choice.placeholder == "PATH" else "text, in quotes if need be")
    value = _shown(_value_at(name, overrides, problem["input"]))
    is_count = choice.placeholder.startswith("N") and not choice.is_list and not own_rule
    if is_count and not re.fullmatch("[+-]?[0-9]+", value):
        must = f"a whole number, {must}"
    return f"{source} is {value}, but must be {must}. ({choice.description})".replace("must be a run's", "a run's")


def _source(name: str, file: Path | None, overrides: Values) -> str:
    section, _, key = name.rpartition(".")
    given = overrides.get(section, {}) if section else overrides
    return f"--{name}" if key in given else f"{name} in {file}" if file else name


def _value_at(name: str, overrides: Values, fallback: Any) -> Any:
    section, _, key = name.rpartition(".")
    return (overrides.get(section, {}) if section else overrides).get(key, fallback)


def _shown(value: Any) -> str:
    """A value as it may stand in a message: short, even where YAML's aliases make it endless."""
    if isinstance(value, list) and len(value) < 10 and not any(isinstance(each, list | dict) for each in value):
        value = ",".join(map(str, value))
    if isinstance(value, list | dict):
        shallow = reprlib.Repr()
        shallow.maxlevel = 2
        return shallow.repr(value)
    text = "null" if value is None else str(value)
    text = text if len(text) < 200 else f"{text[:200]}..."
    return f"'{text}'" if text == "" or " " in text else text


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence with the known names that look most like `name`, whole or after the last dot; empty if none does."""
    name = name.replace("-", "_")

    def likeness(other: str) -> float:
        pairs = ((name, other), (name.rpartition(".")[2], other.rpartition(".")[2]))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    scores = sorted(((likeness(other), other) for other in known), reverse=True)
    best = max(0.66, scores[0][0] - 0.05) if scores else 1.0
    found = [other for score, other in scores[:2] if score >= best]
    return f" Did you mean {' or '.join(found)}?" if found else ""


def as_yaml(config: RunConfig) -> str:
    """The complete config as YAML with a comment over each value, ready to edit; read again, it is the same config."""
    values = config.model_dump(mode="json", by_alias=True)
    lines = ["# A codecmill config. Use it with: codecmill run --config FILE"]
    section = ""
    for choice in choices().values():
        if choice.section != section:
            section = choice.section
            lines += ["", f"# {sections()[section]}", f"{section}:"]
        indent = "  " if section else ""
        value = (values[section] if section else values)[choice.key]
        comment = f"{choice.description} [{choice.allowed}]" if choice.allowed else choice.description
        lines += [f"{indent}# {comment}", f"{indent}{choice.key}: {_inline(value)}"]
    return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1_000_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("...").rstrip("\n")
