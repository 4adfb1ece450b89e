"""What is said about a route, beside what the route says itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Schema = Mapping[str, Any]
"""A JSON schema."""

STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
"""What fits in 64 bits."""
BINARY: Schema = {"type": "string", "format": "binary"}
JSON, BYTES = "application/json", "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path.

    Args:
        summary: one line.
        answer: the type of the JSON that is answered; None: there is none.
        status: of that answer.
        media_types: in which it may be answered beside JSON.
        path, query, headers: schemas of parameters; any string where the path has one and nothing is said.
        required: names of the parameters that must be given, beside those of the path.
        body: schema of each media type.
        errors: beside those that follow from the rest.
    """

    summary: str
    answer: Any = None
    status: int = 200
    media_types: tuple[str, ...] = ()
    path: Mapping[str, Schema] = field(default_factory=dict)
    query: Mapping[str, Schema] = field(default_factory=dict)
    headers: Mapping[str, Schema] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    body: Mapping[str, Schema] = field(default_factory=dict)
    body_required: bool = True
    errors: tuple[int, ...] = ()


def text(shortest: int, longest: int) -> Schema:
    return {"type": "string", "minLength": shortest, "maxLength": longest}


def words(*allowed: str) -> Schema:
    return {"type": "string", "enum": list(allowed)}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def table(properties: Mapping[str, Schema], *required: str, closed: bool = False) -> Schema:
    """An object, with these fields and, unless `closed`, any others."""
    known = {"type": "object", "properties": dict(properties), "required": list(required)}
    return known | ({"additionalProperties": False} if closed else {})
