"""`supsup-cli`: talks to a running daemon. Whatever is slow to import is imported inside the commands."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import supsupd
from cli.batches import batches_app
from cli.connection import ENVIRONMENT, Address, AsJson, addressed, asking
from cli.output import EXIT_BAD_DATA, fail, print_pairs, print_rows
from cli.reservoir import reservoir_app
from cli.sources import sources_app
from cli.tasks import tasks_app

if TYPE_CHECKING:
    import numpy as np

    from supsupd.client import Client

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
app.add_typer(tasks_app, name="tasks")
app.add_typer(batches_app, name="batches")
app.add_typer(sources_app, name="sources")
app.add_typer(reservoir_app, name="reservoir")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"supsup-cli {supsupd.__version__}")
        raise typer.Exit


@app.callback(epilog=ENVIRONMENT)
@addressed
def main(
    context: typer.Context,
    address: Address,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Talk to a running supsupd."""
    context.obj = address


@app.command()
@asking
def status(client: "Client", as_json: AsJson = False) -> None:
    """What the daemon is doing."""
    values = client.status()
    if as_json:
        print_rows([values], values, as_json)
    else:
        print_pairs(values)


@app.command()
@asking
def predict(
    client: "Client",
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="An .npz with the member x, or an .npy."),
    ],
    task: Annotated[str | None, typer.Option(metavar="N", help="Use this task's mask: its key, name or id.")] = None,
    per_sample: Annotated[bool, typer.Option("--per-sample", help="Infer each row's task by itself.")] = False,
    method: Annotated[
        str | None, typer.Option(metavar="M", help="How to infer the task: exact, one-shot, binary or recover.")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(metavar="O", help="By what: entropy (H), g (G), energy or max-logit.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The labels of a file's rows; the task is inferred, by default from all rows together."""
    x = _read_rows(file)
    try:
        rows = client.predict(x, task, per_sample, method, objective)
    except ValueError as error:
        fail(f"{file}: {error}", EXIT_BAD_DATA)
    print_rows(rows, PREDICT_FIELDS, as_json)


@app.command()
@asking
def wait(
    client: "Client",
    timeout: Annotated[float | None, typer.Option(metavar="S", min=0, help="Give up after S seconds.")] = None,
) -> None:
    """Return once all that the sources have now has its state and nothing is queued."""
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
