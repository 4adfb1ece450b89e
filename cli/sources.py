"""`supsup-cli sources`: what batches come from."""

from typing import Annotated

import typer

from cli.connection import AsJson, Socket, daemon
from cli.output import print_rows, printable

SOURCE_FIELDS = ("name", "passes", "pending", "problem")

sources_app = typer.Typer(help="What batches come from.", rich_markup_mode=None, no_args_is_help=True)


@sources_app.command("list")
def list_sources(context: typer.Context, socket: Socket = None, as_json: AsJson = False) -> None:
    """What batches come from, and what keeps it from working."""
    with daemon(context, socket) as client:
        rows = client.sources()
    print_rows(rows, SOURCE_FIELDS, as_json)


@sources_app.command("accept")
def accept_gap(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="NAME", help="A source that stands still at a gap.")],
    socket: Socket = None,
) -> None:
    """Accept what a source lost before it was read: it goes on behind the gap."""
    with daemon(context, socket) as client:
        gap = client.accept_gap(source)
    typer.echo(printable(f"accepted: {gap['reason']}"))
