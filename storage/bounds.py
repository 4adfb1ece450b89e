"""What every store of ours can hold, checked before a statement reaches one: both kinds give the same answer."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import BigInteger, Column, Insert, Integer, String, Update

from storage.errors import ValueRefused

ROW_BYTES = 999_000_000
"""Of all values of a row: SQLite takes 10⁹ bytes, PostgreSQL a little more."""


def check_statement(context: Any, parameters: Any, many: bool) -> None:
    """Refuse what one of the stores would refuse, or keep as something else. Raises ValueRefused.

    context: SQLAlchemy's, of a statement; parameters: as the driver gets them, `many`: a list of such.
    """
    for row in parameters if many and isinstance(parameters, list) else (parameters,):
        _check_all(row.values() if isinstance(row, Mapping) else row)
    statement = context.compiled.statement if context.compiled is not None else None
    if isinstance(statement, Insert | Update):
        columns = statement.table.columns
        for values in context.compiled_parameters:  # those to store have the names of their columns, no others do
            stored = {columns[name]: value for name, value in values.items() if name in columns}
            for column, value in stored.items():
                _check_value(column, value)
            _check_size(sum(len(value) for value in stored.values() if isinstance(value, bytes)))


def check_text(text: str) -> None:
    """Raises ValueRefused for what is no text to a database."""
    if "\0" in text:
        raise ValueRefused(f"this cannot be stored: a text with a NUL: {text[:40]!a}")
    try:
        _check_size(len(text) if text.isascii() else len(text.encode()))
    except UnicodeEncodeError:
        raise ValueRefused(f"this cannot be stored: a text with half a character: {text[:40]!a}") from None


def storable(text: str, most: int | None = None) -> str:
    """The text, with a mark for what no database holds, cut to `most` characters."""
    return text[:most].encode(errors="replace").decode().replace("\0", "?")


def _check_all(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, str):
            check_text(value)
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueRefused("this cannot be stored: a number of more than 64 bits")


def _check_size(size: int) -> None:
    if size > ROW_BYTES:
        raise ValueRefused(f"this cannot be stored: {size} bytes in one row, at most {ROW_BYTES} expected")


def _check_value(column: Column[Any], value: Any) -> None:
    kind, place = column.type, f"this cannot be stored: {column.table.name}.{column.name}"
    if isinstance(value, str) and isinstance(kind, String) and kind.length is not None and len(value) > kind.length:
        raise ValueRefused(f"{place}: {len(value)} characters, at most {kind.length} expected")
    if isinstance(value, int) and isinstance(kind, Integer) and not isinstance(kind, BigInteger):
        if not -(2**31) <= value < 2**31:
            raise ValueRefused(f"{place}: {value}, a number of 32 bits expected")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueRefused(f"{place}: {value}, a finite number expected")
