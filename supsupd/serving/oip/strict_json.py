"""JSON of strangers: read to the letter, with one error for everything else."""

import json
from collections.abc import Mapping
from typing import Any

import orjson


class ProtocolError(ValueError):
    """The request breaks the protocol; its text is "code: what is wrong" and it is the caller's to mend."""


def parse_json(body: bytes) -> Any:
    """The value that `body` holds, strictly: UTF-8, no NaN, no key twice, no half of a pair. Raises ProtocolError.

    orjson is as strict, but for keys that come twice, of which it keeps one: then some of the strings that were written
    are nowhere in the value. What it refuses, and what cannot be told so, is read by the slow parser.
    """
    if b"\\" in body:  # a quotation mark may be part of a string
        return parse_json_slowly(body)
    try:
        value = orjson.loads(body)
    except ValueError:
        return parse_json_slowly(body)
    return value if 2 * _strings(value) == body.count(b'"') else parse_json_slowly(body)


def parse_json_slowly(body: bytes) -> Any:
    """The same, by a parser that can say what is wrong."""
    try:
        text = str(body, "utf-8")
        value = _decoder.decode(text)
        if "\\u" in text:  # only an escape can write half of a surrogate pair, which is no character
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ProtocolError("bad_json: nested too deep") from None
    except UnicodeError:
        raise ProtocolError("bad_json: not UTF-8, or half of a surrogate pair") from None
    except ValueError as error:
        raise ProtocolError(f"bad_json: {error}") from None


def _strings(value: Any) -> int:
    """How many strings are in a JSON value, keys too; in an array that begins with a number none are looked for."""
    if type(value) is dict:
        return len(value) + sum(map(_strings, value.values()))
    if type(value) is list:
        return sum(map(_strings, value)) if value and type(value[0]) not in (float, int) else 0
    return type(value) is str


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` holds. Raises ProtocolError."""
    value = parse_json(body)
    if not isinstance(value, dict):
        raise ProtocolError("bad_json: expected a JSON object")
    return value


def field(table: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """A field of an object, of exactly this type. Raises ProtocolError."""
    value = table.get(key, default)
    # Exact types: a JSON true is no number, though a Python True is an int.
    if value is not default and type(value) is not kind:
        raise ProtocolError(f"bad_request: {key} must be {_KINDS[kind]}")
    return value


_KINDS = {dict: "an object", list: "an array", int: "an integer", bool: "true or false", str: "a string"}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object has a key twice")
    return value


_decoder = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
