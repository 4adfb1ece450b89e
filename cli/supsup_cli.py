"""`supsup-cli`: talks to a running daemon. Whatever is slow to import is imported inside the commands."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import supsupd
from cli.output import EXIT_BAD_DATA, EXIT_NO, EXIT_UNAVAILABLE, fail, print_pairs, print_rows, printable

if TYPE_CHECKING:
    import numpy as np

    from supsupd.client import Client

TASK_FIELDS = (
    "task",
    "name",
    "version",
    "batches",
    "samples",
    "accuracy",
    "entropy",
    "density",
    "bytes",
    "created",
    "last_seen",
)
DECISION_FIELDS = ("batch", "name", "decision", "at", "reason")
BATCH_FIELDS = ("batch", "name", "sha256", "state", "task", "decision", "reason")
PREDICT_FIELDS = ("label", "task", "entropy", "known")

# rich's help would cost another 0.1 s at every call.
app = typer.Typer(
    help="Talk to a running supsupd.",
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tasks_app = typer.Typer(help="The tasks that the daemon has found.", rich_markup_mode=None, no_args_is_help=True)
batches_app = typer.Typer(help="The batches that the daemon has seen.", rich_markup_mode=None, no_args_is_help=True)
app.add_typer(tasks_app, name="tasks")
app.add_typer(batches_app, name="batches")

Socket = Annotated[Path | None, typer.Option("--socket", metavar="PATH", help="The daemon's Unix socket.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON array of objects.")]
TaskId = Annotated[int, typer.Argument(metavar="N", min=0, help="The task's id.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"supsup-cli {supsupd.__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    socket: Annotated[
        Path | None,
        typer.Option("--socket", envvar="SUPSUPD_SOCKET", metavar="PATH", help="The daemon's Unix socket."),
    ] = None,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Talk to a running supsupd."""
    context.obj = socket


@contextlib.contextmanager
def _daemon(context: typer.Context, socket: Path | None) -> Iterator["Client"]:
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


@app.command()
def status(context: typer.Context, socket: Socket = None, as_json: AsJson = False) -> None:
    """What the daemon is doing."""
    with _daemon(context, socket) as client:
        values = client.status()
    if as_json:
        print_rows([values], values, as_json)
    else:
        print_pairs(values)


@tasks_app.command("list")
def list_tasks(context: typer.Context, socket: Socket = None, as_json: AsJson = False) -> None:
    """All tasks."""
    with _daemon(context, socket) as client:
        rows = client.tasks()
    print_rows(rows, TASK_FIELDS, as_json)


@tasks_app.command("show")
def show_task(context: typer.Context, task: TaskId, socket: Socket = None, as_json: AsJson = False) -> None:
    """One task, with the decisions that led batches to it."""
    with _daemon(context, socket) as client:
        row = client.task(task)
    if as_json:
        print_rows([row], row, as_json)
        return
    decisions = row.pop("decisions", [])
    print_pairs(row)
    typer.echo()
    print_rows(decisions, DECISION_FIELDS, as_json)


@tasks_app.command("rename")
def rename_task(
    context: typer.Context,
    task: TaskId,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits, '_', '.' and '-'.")],
    socket: Socket = None,
) -> None:
    """Give a task a name."""
    with _daemon(context, socket) as client:
        row = client.rename(task, name)
    typer.echo(f"task {row['task']} is now {printable(row['name'])}")


@batches_app.command("list")
def list_batches(
    context: typer.Context,
    state: Annotated[str | None, typer.Option(metavar="S", help="Only batches in this state.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="At most this many.")] = None,
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """What became of every batch."""
    with _daemon(context, socket) as client:
        rows = client.batches(state, limit)
    print_rows(rows, BATCH_FIELDS, as_json)


@app.command()
def predict(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="An .npz with the member x, or an .npy."),
    ],
    task: Annotated[int | None, typer.Option(metavar="N", min=0, help="Use this task's mask.")] = None,
    per_sample: Annotated[bool, typer.Option("--per-sample", help="Infer each row's task by itself.")] = False,
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """The labels of a file's rows; the task is inferred, by default from all rows together."""
    x = _read_rows(file)
    with _daemon(context, socket) as client:
        try:
            rows = client.predict(x, task, per_sample)
        except ValueError as error:
            fail(f"{file}: {error}", EXIT_BAD_DATA)
    print_rows(rows, PREDICT_FIELDS, as_json)


@app.command()
def wait(
    context: typer.Context,
    timeout: Annotated[float | None, typer.Option(metavar="S", min=0, help="Give up after S seconds.")] = None,
    socket: Socket = None,
) -> None:
    """Return once every file that is in the watched folders now has its state and nothing is queued."""
    with _daemon(context, socket) as client:
        client.wait(timeout)


def _read_rows(file: Path) -> "np.ndarray":
    """The rows x (n, ...) of an .npz or .npy file; ends the command with one line if it holds none."""
    import zipfile

    import numpy as np

    try:
        loaded = np.load(file, allow_pickle=False)
        return loaded["x"] if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
    except KeyError:
        fail(f"{file}: no member x in it", EXIT_BAD_DATA)
    except (OSError, ValueError, EOFError, MemoryError, OverflowError, zipfile.BadZipFile) as error:
        fail(f"{file}: not an .npz or .npy that can be read: {error}", EXIT_BAD_DATA)
