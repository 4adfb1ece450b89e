"""The places that settings come from, and how an error names what is wrong in one of them."""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from supsupd.sections import hide_password
from supsupd.toml_lines import key_lines

ENV_PREFIX = "SUPSUPD_"
DISCRIMINATOR = "kind"
"""The key of a table in a list that says which table it is; its value stands in the locations of errors."""
_SECRET = re.compile("password|secret|token")
_TOML_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")

Location = tuple[str | int, ...]
"""Keys of tables and indices of lists, outermost first."""


class ConfigError(Exception):
    """The configuration can't be used; `problems` holds one line for each thing that is wrong."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Layer:
    """One place that settings come from.

    Args:
        origin: the name of a file, or `command line`, `environment`, `defaults`.
        values: as they are given there.
        lines: of a file, where each location stands.
    """

    def __init__(self, origin: str, values: Mapping[str, Any], lines: Mapping[Location, int] | None = None) -> None:
        self.origin = origin
        self.values = values
        self._lines = lines or {}

    def find(self, location: Location) -> Location | None:
        """`location` in this layer, without the kinds in it and as far as there are tables and lists; None where
        another layer must have it."""
        node: Any = self.values
        found: Location = ()
        for part in location:
            if isinstance(node, Mapping):
                if part not in node and node.get(DISCRIMINATOR) == part:
                    continue
                if part not in node:
                    return None
            elif not isinstance(node, list):
                break  # a value where a table is wanted, or one that stands for a list
            node = node[part]
            found = (*found, part)
        return found

    def name(self, location: Location) -> str:
        """Where a location stands and what it is called there."""
        keys = [part for part in location if isinstance(part, str)]
        if self.origin == "environment":
            return f"{self.origin}: {ENV_PREFIX}{'__'.join(keys).upper()}"
        if self.origin == "command line":
            return f"{self.origin}: --{'-'.join(keys).replace('_', '-')}"
        dotted = "".join(f".{part}" if isinstance(part, str) else f"[{part}]" for part in location).removeprefix(".")
        line = next((self._lines[p] for p in _outwards(location) if p in self._lines), None)
        return f"{self.origin}: {dotted}" if line is None else f"{self.origin}:{line}: {dotted}"


def read_toml(file: Path) -> Layer:
    """The layer of a TOML file. Raises ConfigError."""
    try:
        text = file.read_bytes().decode()
    except OSError as error:
        raise ConfigError([f"{file}: {error.strerror}; expected a TOML file that can be read"]) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise ConfigError([f"{file}:{line}: given the byte {byte:#x}; expected TOML in UTF-8"]) from None
    try:
        return Layer(str(file), tomllib.loads(text), key_lines(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_describe_bad_toml(file, text, str(error))]) from None


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, table by table; what is `above` counts where a key is in both."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        is_table = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if is_table else value  # type: ignore[arg-type]  # two tables
    return merged


def name_setting(layers: Sequence[Layer], location: Location) -> str:
    """Where a setting comes from and what it is called there; one that is not set stands in its table, or nowhere."""
    for reached in _outwards(location):
        for layer in layers:
            if layer.find(reached) is not None:
                return layer.name(location)
    return Layer("defaults", {}).name(location)


def describe(detail: ErrorDetails, layers: list[Layer], root: type[BaseModel]) -> str:
    """One line: where, which key, what was given, what was expected."""
    context = detail.get("ctx", {})
    location: Location = detail["loc"] if detail["loc"] and "key" not in context else tuple(context["key"].split("."))
    given, expected = context.get("given", detail["input"]), _expected(detail, location, root)
    if detail["type"] == "union_tag_invalid":
        location, given = (*location, DISCRIMINATOR), given[DISCRIMINATOR]
    is_missing = detail["type"] in ("missing", "union_tag_not_found")
    # What is missing stands nowhere: the table around it does.
    reached = location[:-1] if detail["type"] == "missing" else location
    found = ((layer, place) for layer in layers if (place := layer.find(reached)) is not None)
    layer, place = next(found, (Layer("defaults", {}), reached))
    if detail["type"] == "missing":
        place = (*place, location[-1])
    elif is_missing:
        place = (*place, DISCRIMINATOR)
    return f"{layer.name(place)}: given {'nothing' if is_missing else _shown(given, place)}; expected {expected}"


def _expected(detail: ErrorDetails, location: Location, root: type[BaseModel]) -> str:
    match detail["type"]:
        case "extra_forbidden":
            return "one of the keys " + ", ".join(sorted(_table(root, location[:-1]).model_fields))
        case "model_type" | "model_attributes_type":
            return "a table of settings"
        case "missing" | "union_tag_not_found":
            return "a value"
        case "union_tag_invalid":
            return f"one of {detail['ctx']['expected_tags']}"
    return detail["msg"].removeprefix("Input should be ").removeprefix("Input should ")


def _table(root: type[BaseModel], location: Location) -> type[BaseModel]:
    """The model of the table at `location`."""
    models = [root]
    for part in location:
        if part in models[0].model_fields:
            models = list(_models_in(models[0].model_fields[str(part)].annotation))
        elif isinstance(part, str):
            models = [model for model in models if part in get_args(model.model_fields[DISCRIMINATOR].annotation)]
    return models[0]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _shown(given: Any, location: Location) -> str:
    """What was given, as it may stand in a log."""
    if isinstance(given, Mapping):
        return "a table"
    if any(_SECRET.search(part) for part in location[-1:] if isinstance(part, str)) and not isinstance(given, Path):
        return "***"
    return hide_password(repr(str(given) if isinstance(given, Path) else given))


def _describe_bad_toml(file: Path, text: str, message: str) -> str:
    place = _TOML_PLACE.search(message)
    lines = text.splitlines() or [""]
    line = int(place[1]) if place and place[1] else len(lines)
    key, _, value = lines[min(line, len(lines)) - 1].partition("=")
    reason = _TOML_PLACE.sub("", message)
    where = f" at column {place[2]}" if place and place[2] else ""
    name = key.strip()
    return f"{file}:{line}: {name}: given {_shown(value.strip(), (name,))}; expected TOML: {reason}{where}"


def _outwards(location: Location) -> Iterator[Location]:
    """`location` and what it lies in, innermost first."""
    for size in range(len(location), 0, -1):
        yield location[:size]
