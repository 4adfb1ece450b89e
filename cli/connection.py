"""What every command of `supsup-cli` shares: its options, and the daemon that it talks to."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.output import EXIT_NO, EXIT_UNAVAILABLE, fail

if TYPE_CHECKING:
    from supsupd.client import Client

Socket = Annotated[Path | None, typer.Option("--socket", metavar="PATH", help="The daemon's Unix socket.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON array of objects.")]


@contextlib.contextmanager
def daemon(context: typer.Context, socket: Path | None) -> Iterator["Client"]:
    """A client of the daemon; the errors that it can raise become one line and an exit code."""
    from supsupd.client import Client, DaemonError, DaemonUnavailable
    from supsupd.paths import default_socket

    try:
        with Client(socket or context.obj or default_socket()) as client:
            yield client
    except DaemonUnavailable as error:
        fail(str(error), EXIT_UNAVAILABLE)
    except (DaemonError, TimeoutError) as error:
        fail(str(error), EXIT_NO)
