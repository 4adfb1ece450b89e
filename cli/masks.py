"""`supsupd masks`: moves masks between state directories, as one file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cli.db import Database, State
from cli.output import EXIT_BAD_DATA, EXIT_CONFIG, EXIT_IO, EXIT_NO, EXIT_NO_INPUT, EXIT_USAGE, fail
from supsupd.paths import DATABASE_NAME, default_state

masks_app = typer.Typer(help="Masks as a file, to move them.", rich_markup_mode=None, no_args_is_help=True)

File = Annotated[Path, typer.Argument(metavar="FILE", help="A file of masks, safetensors.")]


@masks_app.command("export")
def export_file(
    file: File,
    tasks: Annotated[
        str | None, typer.Option(metavar="N,M", help="Only these tasks, by id; otherwise all in use.")
    ] = None,
    state: State = default_state(),
    database: Database = None,
) -> None:
    """Write the newest masks, their records and the network's identity to a file. May run beside the daemon."""
    from storage.db import reading
    from supsupd.moving import export_masks

    wanted = _ids(tasks)
    target = database or state / DATABASE_NAME
    if isinstance(target, Path) and not target.is_file():
        fail(f"there is no database at {target}", EXIT_NO_INPUT)
    with _told(file), reading(target) as session:
        exported = export_masks(session, file, wanted)
    typer.echo(f"exported {_count(len(exported))} to {file}")


@masks_app.command("import")
def import_file(
    file: File,
    again: Annotated[bool, typer.Option("--again", help="Also masks that are there already.")] = False,
    pretrained: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The weights of a network that was made with such.")
    ] = None,
    state: State = default_state(),
    database: Database = None,
) -> None:
    """Make a new task of each mask in a file. The daemon must not be running."""
    from storage import db
    from storage.lock import StateLock
    from supsupd import logs
    from supsupd.moving import import_masks
    from supsupd.portable import open_masks

    logs.configure(level="error")
    target = database or state / DATABASE_NAME
    with _told(file), open_masks(file) as found, StateLock.acquire(state):
        db.upgrade(target, state=state)
        store = db.Database.open(target)
        try:
            with store.write() as session:
                moved = import_masks(session, found, _user(), again, pretrained)
        finally:
            store.close()
    places = ", ".join(f"{theirs} as {ours}" for theirs, ours in moved.items())
    typer.echo(f"imported {_count(len(moved))}: {places}")


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """What can go wrong, in one line and with an exit code."""
    from storage.db import DiskFull, SchemaMismatch, StoreError, StoreFailed, StoreTaken, StoreUnavailable
    from storage.lock import StateLocked
    from storage.masks import MaskCorrupt, MaskUnknown
    from storage.tasks import TaskUnknown
    from supsupd.admission import NetworkDiffers
    from supsupd.learning.network import NetworkMismatch
    from supsupd.learning.pretrained import PretrainedMismatch
    from supsupd.moving import AlreadyThere, NothingToMove
    from supsupd.portable import FileRefused

    try:
        yield
    except (FileRefused, NetworkDiffers, NetworkMismatch) as error:
        fail(f"{file}: {error}", EXIT_BAD_DATA)
    except PretrainedMismatch as error:
        fail(str(error), EXIT_CONFIG)
    except StoreFailed as error:
        fail(str(error), EXIT_IO)
    except (StateLocked, StoreTaken, StoreUnavailable, DiskFull, TaskUnknown, NothingToMove, AlreadyThere) as error:
        fail(str(error), EXIT_NO)
    except (MaskCorrupt, MaskUnknown, SchemaMismatch, StoreError) as error:
        fail(str(error), EXIT_BAD_DATA)
    except FileNotFoundError as error:
        fail(f"{error.filename}: {error.strerror}", EXIT_NO_INPUT)
    except OSError as error:
        fail(f"{error.filename or file}: {error.strerror or error}", EXIT_NO)
    except ValueError as error:  # a URL of neither kind
        fail(str(error), EXIT_CONFIG)


def _ids(listed: str | None) -> list[int]:
    if listed is None:
        return []
    parts = listed.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) <= 18 for part in parts):
        fail(f"--tasks: given {listed!r}; expected ids as 1,2", EXIT_USAGE)
    return [int(part) for part in parts]


def _count(number: int) -> str:
    return f"{number} task" + ("" if number == 1 else "s")


def _user() -> str:
    import os

    from supsupd.serving.peer import show_user

    return show_user(os.getuid())
