"""`supsupd`: runs the daemon and looks after its database and configuration."""

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import supsupd
from cli.output import EXIT_BAD_DATA, EXIT_CONFIG, EXIT_NO, EXIT_NO_INPUT, fail, flatten, printable
from supsupd.paths import DATABASE_NAME, default_state

if TYPE_CHECKING:
    from supsupd.config import Settings

app = typer.Typer(
    help="A daemon for continual learning without task labels.",
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
db_app = typer.Typer(help="The daemon's database.", rich_markup_mode=None, no_args_is_help=True)
config_app = typer.Typer(help="The daemon's configuration.", rich_markup_mode=None, no_args_is_help=True)
app.add_typer(db_app, name="db")
app.add_typer(config_app, name="config")

Watch = Annotated[list[Path] | None, typer.Option(metavar="DIR", help="A folder to learn from; may be repeated.")]
State = Annotated[Path | None, typer.Option(metavar="DIR", help="Where everything learned is kept.")]
Socket = Annotated[Path | None, typer.Option(metavar="PATH", help="The Unix socket to listen on.")]
Config = Annotated[Path | None, typer.Option(metavar="FILE", help="Settings in TOML.")]
Predictions = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write a file of predictions for each unlabelled batch.")
]
Device = Annotated[str | None, typer.Option(metavar="auto|cpu|cuda", help="Where to train.")]
StateOfDatabase = Annotated[
    Path, typer.Option("--state", metavar="DIR", envvar="SUPSUPD_STATE", help="The daemon's state directory.")
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"supsupd {supsupd.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """A daemon for continual learning without task labels."""


def _leave(*_: object) -> None:
    raise SystemExit(0)


@app.command()
def start(
    watch: Watch = None,
    state: State = None,
    socket: Socket = None,
    config: Config = None,
    predictions: Predictions = None,
    device: Device = None,
) -> None:
    """Run the daemon in the foreground until SIGTERM or SIGINT."""
    flags = {"watch": watch, "state": state, "socket": socket, "predictions": predictions, "device": device}
    settings = _load(flags, config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)  # until the daemon takes them over: nothing is open yet
    # Only now: torch takes seconds to import, a wrong setting should not.
    from supsupd import daemon, logs

    logs.configure(settings.log_format, settings.log_level)
    raise typer.Exit(daemon.run(settings))


@config_app.command("check")
def check_config(
    watch: Watch = None,
    state: State = None,
    socket: Socket = None,
    config: Config = None,
    predictions: Predictions = None,
    device: Device = None,
) -> None:
    """Check the settings that `start` would use with the same options, and print them; opens nothing."""
    flags = {"watch": watch, "state": state, "socket": socket, "predictions": predictions, "device": device}
    settings = _load(flags, config)
    typer.echo("ok")
    for key, value in flatten(settings.model_dump(mode="json")):
        # Each line is TOML too, which has no null.
        typer.echo(f"# {key} is not set" if value is None else f"{key} = {json.dumps(value)}")


@db_app.command("upgrade")
def upgrade_database(state: StateOfDatabase = default_state()) -> None:
    """Bring the database to this version's schema. The daemon must not be running."""
    from storage.db import StoreError, upgrade
    from storage.lock import StateLock, StateLocked
    from storage.schema import SchemaMismatch
    from supsupd import logs

    logs.configure()
    try:
        with StateLock.acquire(state):
            applied = upgrade(state / DATABASE_NAME)
    except (StateLocked, OSError) as error:
        fail(str(error), EXIT_NO)
    except (SchemaMismatch, StoreError) as error:
        fail(str(error), EXIT_BAD_DATA)
    typer.echo("upgraded: " + ", ".join(applied) if applied else "already up to date")


@db_app.command("check")
def check_database(state: StateOfDatabase = default_state()) -> None:
    """Check the database: integrity, schema, and the hash of every mask. Changes nothing."""
    from storage.db import check
    from supsupd import logs

    logs.configure()
    path = state / DATABASE_NAME
    if not path.is_file():
        fail(f"there is no database at {path}", EXIT_NO_INPUT)
    problems = check(path)
    for problem in problems:
        typer.echo(printable(problem), err=True)
    if problems:
        raise typer.Exit(EXIT_BAD_DATA)
    typer.echo("ok")


def _load(flags: Mapping[str, object], file: Path | None) -> "Settings":
    from supsupd.config import ConfigError, load_settings

    try:
        return load_settings(flags, file)
    except ConfigError as error:
        for problem in error.problems:
            typer.echo(printable(problem), err=True)
        raise typer.Exit(EXIT_CONFIG) from None
