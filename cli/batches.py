"""`supsup-cli batches`: what became of every batch, and what to do with those that were rejected."""

from typing import TYPE_CHECKING, Annotated

import typer

from cli.connection import AsJson, asking
from cli.output import print_pairs, print_rows

if TYPE_CHECKING:
    from supsupd.client import Client

BATCH_FIELDS = ("batch", "sender", "name", "sha256", "state", "task", "decision", "reason")
REJECTED_FIELDS = ("batch", "source", "sender", "name", "code", "reason", "state", "bytes", "at")

batches_app = typer.Typer(help="The batches that the daemon has seen.", rich_markup_mode=None, no_args_is_help=True)

BatchIds = Annotated[list[int], typer.Argument(metavar="ID...", min=1, help="Numbers of rejected batches.")]
DropIds = Annotated[
    list[int], typer.Argument(metavar="ID...", min=1, help="Numbers of batches that wait or were rejected.")
]
Limit = Annotated[int | None, typer.Option(metavar="N", min=1, help="At most this many.")]


@batches_app.command("list")
@asking
def list_batches(
    client: "Client",
    state: Annotated[str | None, typer.Option(metavar="S", help="Only batches in this state.")] = None,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """What became of every batch."""
    rows = client.batches(state, limit)
    print_rows(rows, BATCH_FIELDS, as_json)


@batches_app.command("show")
@asking
def show_batch(
    client: "Client",
    batch: Annotated[str, typer.Argument(metavar="ID", help="A batch's number, or the SHA-256 of its bytes.")],
    as_json: AsJson = False,
) -> None:
    """What became of one batch."""
    row = client.batch(batch)
    if as_json:
        print_rows([row], row, as_json)
    else:
        print_pairs(row)


@batches_app.command("rejected")
@asking
def list_rejected(
    client: "Client",
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """The batches that were refused, with the reason; their bytes are kept until they are dropped."""
    rows = client.rejected(limit)
    print_rows(rows, REJECTED_FIELDS, as_json)


@batches_app.command("retry")
@asking
def retry_batches(client: "Client", batches: BatchIds) -> None:
    """Send rejected batches in again, as new ones at the end of the queue."""
    for batch in batches:
        typer.echo(f"batch {batch} is batch {client.retry(batch)['batch']} now")


@batches_app.command("drop")
@asking
def drop_batches(client: "Client", batches: DropIds) -> None:
    """Give up batches that wait or were rejected: their bytes are removed, their rows stay."""
    for batch in batches:
        client.drop(batch)
        typer.echo(f"batch {batch} is dropped")
