"""`supsupd`: runs the daemon and looks after its database and configuration."""

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import supsupd
from cli.db import db_app
from cli.masks import masks_app
from cli.output import EXIT_CONFIG, flatten, printable
from cli.stored_batches import stored_batches_app
from cli.tokens import tokens_app

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
config_app = typer.Typer(help="The daemon's configuration.", rich_markup_mode=None, no_args_is_help=True)
app.add_typer(db_app, name="db")
app.add_typer(config_app, name="config")
app.add_typer(masks_app, name="masks")
app.add_typer(stored_batches_app, name="batches")
app.add_typer(tokens_app, name="token")

Watch = Annotated[list[Path] | None, typer.Option(metavar="DIR", help="A folder to learn from; may be repeated.")]
State = Annotated[Path | None, typer.Option(metavar="DIR", help="Where everything learned is kept.")]
Socket = Annotated[Path | None, typer.Option(metavar="PATH", help="The Unix socket to listen on.")]
Http = Annotated[
    str | None, typer.Option("--http", metavar="HOST:PORT", help="Serve HTTP over TCP, too; it takes tokens.")
]
Grpc = Annotated[
    str | None, typer.Option("--grpc", metavar="HOST:PORT", help="Serve gRPC over TCP, too; it takes tokens.")
]
GrpcSocket = Annotated[Path | None, typer.Option("--grpc-socket", metavar="PATH", help="A Unix socket for gRPC.")]
Config = Annotated[Path | None, typer.Option(metavar="FILE", help="Settings in TOML.")]
Predictions = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write a file of predictions for each unlabelled batch.")
]
Stdin = Annotated[bool | None, typer.Option("--stdin", help="Learn from batches on the standard input, too.")]
StoreUrl = Annotated[
    str | None, typer.Option("--database", metavar="URL", help="Keep what is learned in PostgreSQL: postgresql://…")
]
Device = Annotated[str | None, typer.Option(metavar="auto|cpu|cuda", help="Where to train.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"supsupd {supsupd.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """A daemon for continual learning without task labels."""
    os.umask(0o077)  # what supsupd makes is its user's alone, whatever the user's habits
    _open_standard_streams()


def _open_standard_streams() -> None:
    """Those that whoever started us closed: what is opened next would be read, or written to, in their place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode)  # noqa: SIM115 - for good; it gets the number that is free
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def _leave(*_: object) -> None:
    raise SystemExit(0)


@app.command()
def start(
    watch: Watch = None,
    state: State = None,
    socket: Socket = None,
    http: Http = None,
    grpc: Grpc = None,
    grpc_socket: GrpcSocket = None,
    config: Config = None,
    stdin: Stdin = None,
    database: StoreUrl = None,
    predictions: Predictions = None,
    device: Device = None,
) -> None:
    """Run the daemon in the foreground until SIGTERM or SIGINT."""
    flags = _flags(locals())
    settings = _load(flags, config)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # there is nothing to reload yet
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)  # until the daemon takes them over: nothing is open yet
    # Only now: torch takes seconds to import, a wrong setting should not.
    from supsupd import daemon, logs

    logs.configure(settings.log_format, settings.log_level, logs.PatientHandler(sys.stderr.fileno()))
    raise typer.Exit(daemon.run(settings, lambda: _checked(flags, config)))


@config_app.command("check")
def check_config(
    watch: Watch = None,
    state: State = None,
    socket: Socket = None,
    http: Http = None,
    grpc: Grpc = None,
    grpc_socket: GrpcSocket = None,
    config: Config = None,
    stdin: Stdin = None,
    database: StoreUrl = None,
    predictions: Predictions = None,
    device: Device = None,
) -> None:
    """Check the settings that `start` would use with the same options, and print them; creates nothing."""
    settings = _load(_flags(locals()), config)
    typer.echo("ok")
    for key, value in flatten(settings.model_dump(mode="json")):
        # Each line is TOML too, which has no null.
        typer.echo(f"# {key} is not set" if value is None else f"{key} = {json.dumps(value)}")


def _flags(options: Mapping[str, object]) -> dict[str, object]:
    """The settings among a command's options."""
    return {name: value for name, value in options.items() if name != "config"}


def _checked(flags: Mapping[str, object], file: Path | None) -> "Settings":
    """Raises ConfigError."""
    from supsupd import precautions
    from supsupd.config import load_settings

    settings = load_settings(flags, file)
    precautions.check(settings)
    return settings


def _load(flags: Mapping[str, object], file: Path | None) -> "Settings":
    from supsupd.config import ConfigError

    try:
        return _checked(flags, file)
    except ConfigError as error:
        for problem in error.problems:
            typer.echo(printable(problem), err=True)
        raise typer.Exit(EXIT_CONFIG) from None
