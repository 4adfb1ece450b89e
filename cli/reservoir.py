"""`supsup-cli reservoir`: the masks that the Hopfield reservoir holds."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from cli.connection import AsJson, asking
from cli.output import print_pairs, print_rows

if TYPE_CHECKING:
    from supsupd.client import Client

reservoir_app = typer.Typer(
    help="The Hopfield reservoir of finished masks.", rich_markup_mode=None, no_args_is_help=True
)


@reservoir_app.callback()
def reservoir() -> None:
    """The Hopfield reservoir of finished masks."""


@reservoir_app.command("show")
@asking
def show_reservoir(client: "Client", as_json: AsJson = False) -> None:
    """What it holds, what it costs against raw bits, and how many masks come back from it."""
    values = client.reservoir()
    if as_json:
        print_rows([values], values, as_json)
        return
    print_pairs(values)
    if values["enabled"]:
        typer.echo()
        typer.echo(_judgement(values))


def _judgement(values: Mapping[str, Any]) -> str:
    """What the bytes come to, in words."""
    times = values["matrix_bytes"] / max(1, values["raw_bytes"])
    text = f"The matrices take {times:.0f} times" if times >= 1 else f"The matrices take {times:.2f} of"
    text += f" the bytes of the raw bits; from {values['break_even_patterns']} masks on they would take fewer"
    if values["break_even_patterns"] > values["capacity"]:
        text += f", but they hold {values['capacity']} at most"
    return text + ". The bits are kept as well, so that nothing is saved: what it gives is recall by content."
