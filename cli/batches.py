"""`supsup-cli batches`: what became of every batch, and what to do with those that were rejected."""

from typing import Annotated

import typer

from cli.connection import AsJson, Socket, daemon
from cli.output import print_pairs, print_rows

BATCH_FIELDS = ("batch", "name", "sha256", "state", "task", "decision", "reason")
REJECTED_FIELDS = ("batch", "source", "name", "code", "reason", "state", "bytes", "at")

batches_app = typer.Typer(help="The batches that the daemon has seen.", rich_markup_mode=None, no_args_is_help=True)

BatchIds = Annotated[list[int], typer.Argument(metavar="ID...", min=1, help="Numbers of rejected batches.")]


@batches_app.command("list")
def list_batches(
    context: typer.Context,
    state: Annotated[str | None, typer.Option(metavar="S", help="Only batches in this state.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="At most this many.")] = None,
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """What became of every batch."""
    with daemon(context, socket) as client:
        rows = client.batches(state, limit)
    print_rows(rows, BATCH_FIELDS, as_json)


@batches_app.command("show")
def show_batch(
    context: typer.Context,
    batch: Annotated[str, typer.Argument(metavar="ID", help="A batch's number, or the SHA-256 of its bytes.")],
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """What became of one batch."""
    with daemon(context, socket) as client:
        row = client.batch(batch)
    if as_json:
        print_rows([row], row, as_json)
    else:
        print_pairs(row)


@batches_app.command("rejected")
def list_rejected(
    context: typer.Context,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="At most this many.")] = None,
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """The batches that were refused, with the reason; their bytes are kept until they are dropped."""
    with daemon(context, socket) as client:
        rows = client.rejected(limit)
    print_rows(rows, REJECTED_FIELDS, as_json)


@batches_app.command("retry")
def retry_batches(context: typer.Context, batches: BatchIds, socket: Socket = None) -> None:
    """Send rejected batches in again, as new ones at the end of the queue."""
    with daemon(context, socket) as client:
        for batch in batches:
            typer.echo(f"batch {batch} is batch {client.retry(batch)['batch']} now")


@batches_app.command("drop")
def drop_batches(context: typer.Context, batches: BatchIds, socket: Socket = None) -> None:
    """Give up rejected batches: their bytes are removed, their rows stay."""
    with daemon(context, socket) as client:
        for batch in batches:
            client.drop(batch)
            typer.echo(f"batch {batch} is dropped")
