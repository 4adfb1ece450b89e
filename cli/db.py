"""`supsupd db`: looks after the daemon's database, and after the spooled bytes that belong to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.output import EXIT_BAD_DATA, EXIT_CONFIG, EXIT_IO, EXIT_NO, EXIT_NO_INPUT, fail, printable
from supsupd.paths import DATABASE_NAME, default_state

if TYPE_CHECKING:
    from storage.backend import Backend, Target

db_app = typer.Typer(help="The daemon's database.", rich_markup_mode=None, no_args_is_help=True)

State = Annotated[
    Path, typer.Option("--state", metavar="DIR", envvar="SUPSUPD_STATE", help="The daemon's state directory.")
]
Database = Annotated[
    str | None,
    typer.Option("--database", metavar="URL", envvar="SUPSUPD_DATABASE", help="Its database, if it is not in there."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


@db_app.command("upgrade")
def upgrade_database(state: State = default_state(), database: Database = None) -> None:
    """Bring the database to this version's schema, after a backup. The daemon must not be running."""
    from storage.db import upgrade

    with told(), alone(state):
        applied = upgrade(target_of(state, database), state=state)
    typer.echo("upgraded: " + ", ".join(applied) if applied else "already up to date")


@db_app.command("downgrade")
def downgrade_database(state: State = default_state(), database: Database = None) -> None:
    """Take the newest change of the schema back, after a backup. The daemon must not be running."""
    from storage.db import downgrade

    with told(), alone(state):
        existing(state, database)
        before, after = downgrade(target_of(state, database), state=state)
    typer.echo(f"downgraded: {before} to {after or 'nothing'}")


@db_app.command("verify")
def verify_database(state: State = default_state(), database: Database = None) -> None:
    """Verify all that is stored: integrity, schema, every hash, the network, the spool. Changes nothing."""
    from storage.db import verify
    from storage.verification import list_strays

    with told():
        existing(state, database)
        target = target_of(state, database)
        problems = verify(target, state / "spool") or _network_problems(target)
        strays = [] if problems else list_strays(target, state / "spool")
    for problem in problems:
        typer.echo(printable(problem), err=True)
    if problems:
        raise typer.Exit(EXIT_BAD_DATA)
    for stray in strays:
        typer.echo(f"stray: spool/{stray}")
    typer.echo("ok")


@db_app.command("backup")
def back_up_database(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The backup to make, a tar.")],
    state: State = default_state(),
    database: Database = None,
    force: Force = False,
) -> None:
    """Write all that is stored to one verified file. May run beside the daemon."""
    from storage.backup import make_backup

    with told():
        manifest = make_backup(existing(state, database), state / "spool", file, force=force)
    waiting = len(manifest.members) - 1
    typer.echo(f"backed up schema {manifest.revision}, {manifest.rows['task']} tasks,"
               f" {manifest.rows['mask_version']} mask versions, the bytes of {waiting} batches to {file}")  # fmt: skip


@db_app.command("restore")
def restore_database(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A backup.")],
    state: State = default_state(),
    database: Database = None,
    force: Force = False,
) -> None:
    """Put everything back as it was when a backup was made. The daemon must not be running."""
    from storage.backends import backend_of
    from storage.backup import restore_backup

    with told(), alone(state):
        backend = backend_of(target_of(state, database))
        manifest = restore_backup(file, backend, state / "spool", force=force)
    typer.echo(f"restored schema {manifest.revision}, {manifest.rows['task']} tasks,"
               f" {manifest.rows['mask_version']} mask versions, as of {manifest.created}")  # fmt: skip


@db_app.command("prune")
def prune_database(
    keep: Annotated[int, typer.Option(metavar="N", min=1, help="How many versions of each task's mask stay.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    state: State = default_state(),
    database: Database = None,
) -> None:
    """Remove old mask versions, and spooled bytes that no batch needs. The daemon must not be running.

    Never the newest version of a task, one in the reservoir, or one that a training state belongs to.
    """
    from storage.pruning import prune

    with told(), alone(state):
        existing(state, database)
        pruned = prune(target_of(state, database), state / "spool", keep, dry=dry_run)
    for (task_id, version), size in pruned.versions.items():
        typer.echo(f"task {task_id}, version {version}: {size} bytes")
    for sha256 in pruned.payloads:
        typer.echo(f"spool/{sha256}")
    what = "would remove" if dry_run else "removed"
    typer.echo(f"{what} {len(pruned.versions)} mask versions, {len(pruned.payloads)} spooled files")


def target_of(state: Path, database: str | None) -> "Target":
    return database or state / DATABASE_NAME


def existing(state: Path, database: str | None) -> "Backend":
    from storage.backends import backend_of

    backend = backend_of(target_of(state, database))
    if not backend.exists():
        fail(f"there is no database at {backend.name}", EXIT_NO_INPUT)
    return backend


def _network_problems(target: "Target") -> list[str]:
    """Whether the weights that the masks belong to can be made again, bit for bit, and all numbers are fit for them."""
    from storage.db import reading
    from storage.networks import get_network

    with reading(target) as session:
        row = get_network(session)
    if row is None:
        return []
    # Only now: torch takes seconds to import.
    from supsupd.learning.device import pick_device
    from supsupd.learning.network import NetworkMismatch
    from supsupd.learning.pretrained import PretrainedMismatch
    from supsupd.persistence import load_network
    from supsupd.soundness import list_unfit

    try:
        load_network(row, pick_device("cpu"))
    except (NetworkMismatch, PretrainedMismatch) as error:
        return [str(error)]
    except (KeyError, LookupError, TypeError, ValueError) as error:
        return [f"network: the stored description cannot be read: {error}"]
    with reading(target) as session:
        return list_unfit(session)


@contextmanager
def alone(state: Path) -> Iterator[None]:
    from storage.lock import StateLock

    with StateLock.acquire(state):
        yield


@contextmanager
def told(level: str = "info") -> Iterator[None]:
    """What can go wrong, in one line and with an exit code."""
    from storage.db import DiskFull, SchemaMismatch, StoreError, StoreFailed, StoreTaken, StoreUnavailable
    from storage.lock import StateLocked
    from supsupd import logs

    logs.configure(level=level)
    try:
        yield
    except StoreFailed as error:
        fail(str(error), EXIT_IO)
    except (StateLocked, StoreTaken, StoreUnavailable, DiskFull) as error:
        fail(str(error), EXIT_NO)
    except (SchemaMismatch, StoreError) as error:
        fail(str(error), EXIT_BAD_DATA)
    except FileNotFoundError as error:
        fail(f"{error.filename}: {error.strerror}", EXIT_NO_INPUT)
    except OSError as error:
        fail(f"{error.filename or 'the system'}: {error.strerror or error}", EXIT_NO)
    except ValueError as error:  # a URL of neither kind
        fail(str(error), EXIT_CONFIG)
