"""What the command lines print: a JSON array for programs, a table for people, one line for a failure."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import typer

EXIT_NO = 1
EXIT_USAGE = 2
EXIT_BAD_DATA = 65
EXIT_NO_INPUT = 66
EXIT_UNAVAILABLE = 69
EXIT_IO = 74
EXIT_CONFIG = 78


def fail(text: str, code: int) -> NoReturn:
    """Says `text` in one line on stderr and ends the command with `code`."""
    typer.echo(printable(" ".join(text.split())), err=True)
    raise typer.Exit(code)


def print_rows(rows: Sequence[Mapping[str, Any]], fields: Iterable[str], as_json: bool) -> None:
    """`rows` as ONE JSON array with all their keys, or as a table of `fields`."""
    if as_json:
        typer.echo(json.dumps(list(rows)))
    else:
        print_table(rows, list(fields))


def print_table(rows: Sequence[Mapping[str, Any]], fields: list[str]) -> None:
    """A table of `fields`, a line for each row; never cut when it goes to a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for field in fields:
        table.add_column(field, overflow="fold", justify=_justify(rows, field))
    for row in rows:
        table.add_row(*(Text(_cell(row.get(field))) for field in fields))
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def print_pairs(values: Mapping[str, Any]) -> None:
    """`key  value` lines, nested keys joined by dots."""
    pairs = list(flatten(values))
    width = max((len(key) for key, _ in pairs), default=0)
    for key, value in pairs:
        typer.echo(f"{key:<{width}}  {_cell(value)}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, value) pairs of a nested mapping."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def printable(text: str) -> str:
    """`text` with what a terminal would obey (or can't show) escaped: file names come from outside."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _justify(rows: Sequence[Mapping[str, Any]], field: str) -> Any:
    numbers = all(isinstance(row.get(field), int | float | None) for row in rows)
    return "right" if rows and numbers else "left"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
