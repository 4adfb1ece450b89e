"""`supsupd batches`: the batches of a store whose daemon does not run, or cannot."""

from typing import Annotated

import typer

from cli.batches import BATCH_FIELDS, DropIds, Limit
from cli.connection import AsJson
from cli.db import Database, State, alone, existing, target_of, told
from cli.output import EXIT_NO, fail, print_rows
from supsupd.paths import default_state

stored_batches_app = typer.Typer(help="The batches in a store.", rich_markup_mode=None, no_args_is_help=True)


@stored_batches_app.command("list")
def list_batches(
    only: Annotated[str | None, typer.Option("--in", metavar="S", help="Only batches in this state.")] = None,
    state: State = default_state(),
    database: Database = None,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """What became of every batch. May run beside the daemon."""
    from storage import ledger
    from storage.db import reading, refuse_older
    from supsupd.views import show_batch

    with told():
        existing(state, database)
        refuse_older(target_of(state, database))
        with reading(target_of(state, database)) as session:
            states = () if only is None else (only,)
            rows = [show_batch(row) for row in ledger.list_batches(session, *states, limit=limit)]
    print_rows(rows, BATCH_FIELDS, as_json)


@stored_batches_app.command("drop")
def drop_batches(batches: DropIds, state: State = default_state(), database: Database = None) -> None:
    """Give up batches that wait or were rejected: their bytes are removed. The daemon must not be running."""
    from storage.db import Database as Store
    from storage.ledger import BatchUnknown, LedgerConflict
    from storage.spool import Spool
    from supsupd.staging import drop

    with told("error"), alone(state):
        existing(state, database)
        store = Store.open(target_of(state, database))
        try:
            for batch in batches:
                drop(store, Spool(state / "spool"), batch)
                typer.echo(f"batch {batch} is dropped")
        except (BatchUnknown, LedgerConflict) as error:
            fail(str(error), EXIT_NO)
        finally:
            store.close()
