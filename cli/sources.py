"""`supsup-cli sources`: what batches come from."""

from typing import TYPE_CHECKING, Annotated

import typer

from cli.connection import AsJson, asking
from cli.output import print_rows, printable

if TYPE_CHECKING:
    from supsupd.client import Client

SOURCE_FIELDS = ("name", "passes", "pending", "problem")

sources_app = typer.Typer(help="What batches come from.", rich_markup_mode=None, no_args_is_help=True)


@sources_app.command("list")
@asking
def list_sources(client: "Client", as_json: AsJson = False) -> None:
    """What batches come from, and what keeps it from working."""
    rows = client.sources()
    print_rows(rows, SOURCE_FIELDS, as_json)


@sources_app.command("accept")
@asking
def accept_gap(
    client: "Client",
    source: Annotated[str, typer.Argument(metavar="NAME", help="A source that stands still at a gap.")],
) -> None:
    """Accept what a source lost before it was read: it goes on behind the gap."""
    gap = client.accept_gap(source)
    typer.echo(printable(f"accepted: {gap['reason']}"))
