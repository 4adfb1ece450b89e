"""What every command of `supsup-cli` shares: the daemon that it asks, and the options that say where that is."""

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, NamedTuple, ParamSpec, get_type_hints

import typer

from cli.output import EXIT_NO, EXIT_NO_INPUT, EXIT_UNAVAILABLE, fail

if TYPE_CHECKING:
    from supsupd.client import Client

P = ParamSpec("P")
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON array of objects.")]
ENVIRONMENT = (
    "Where the daemon is may also stand in SUPSUPD_SOCKET, or SUPSUPD_URL with SUPSUPD_TOKEN_FILE or SUPSUPD_TOKEN, "
    "SUPSUPD_CA and SUPSUPD_CERTIFICATE."
)


class Address(NamedTuple):
    """Where the daemon is and how it is reached, as far as one place says so."""

    socket: Annotated[Path | None, typer.Option(metavar="PATH", help="The daemon's Unix socket.")] = None
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="In place of it http://HOST:PORT or https://HOST:PORT.")
    ] = None
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For a URL: a file whose last line is the token.")
    ] = None
    ca: Annotated[Path | None, typer.Option(metavar="FILE", help="PEM: whose certificates to trust.")] = None
    certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM: this client's own certificate and its key.")
    ] = None


def addressed(function: Callable[Concatenate[typer.Context, Address, P], None]) -> Callable[..., None]:
    """The function with the options of `Address` in place of its second parameter."""

    @functools.wraps(function)
    def called(context: typer.Context, **values: Any) -> None:
        address = Address(*(values.pop(field) for field in Address._fields))
        _refuse_two(address)
        function(context, address, **values)  # type: ignore[call-arg]  # typer has checked them

    context, _, *own = inspect.signature(function).parameters.values()
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in get_type_hints(Address, include_extras=True).items()
    ]
    parameters = [context, *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own), *options]
    # What typer makes the command line from.
    vars(called)["__signature__"] = inspect.Signature(parameters)
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def asking(command: Callable[Concatenate["Client", P], None]) -> Callable[..., None]:
    """A command that is handed a client of the daemon, whose address stands after it, before it or in the
    environment; the errors that the client can raise become one line and an exit code."""

    def asked(context: typer.Context, address: Address, *args: P.args, **kwargs: P.kwargs) -> None:
        with _daemon(address, context.obj) as client:
            command(client, *args, **kwargs)

    _, *own = inspect.signature(command).parameters.values()
    context, address, *_ = inspect.signature(asked).parameters.values()
    vars(asked)["__signature__"] = inspect.Signature([context, address, *own])
    functools.update_wrapper(asked, command)
    return addressed(asked)


def _refuse_two(address: Address) -> None:
    if address.socket is not None and address.url is not None:
        raise typer.BadParameter("--socket and --url name two daemons: give one of them")
    if address.url is not None and not address.url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"--url {address.url}: expected http://HOST:PORT or https://HOST:PORT")


@contextlib.contextmanager
def _daemon(*said: Address) -> Iterator["Client"]:
    from supsupd.client import Client, DaemonError, DaemonUnavailable

    address = _resolve(*said)
    try:
        client = Client(
            address.url or str(address.socket),
            token=_token(address),
            verify=address.ca,
            certificate=address.certificate,
        )
    except (OSError, ValueError) as error:
        fail(f"{address.url}: {error}", EXIT_NO_INPUT)
    try:
        with client:
            yield client
    except DaemonUnavailable as error:
        fail(str(error), EXIT_UNAVAILABLE)
    except (DaemonError, TimeoutError) as error:
        fail(str(error), EXIT_NO)


def _resolve(*said: Address) -> Address:
    """One address from several places; what an earlier one says counts more, and either kind of address excludes the
    other of later places."""
    from supsupd.paths import default_socket

    places = [*said, _environment(), Address(default_socket())]
    first = next(place for place in places if place.socket is not None or place.url is not None)
    others = {
        field: next((value for place in places if (value := getattr(place, field)) is not None), None)
        for field in ("token_file", "ca", "certificate")
    }
    return Address(None if first.url else first.socket, first.url, **others)


def _environment() -> Address:
    def path(name: str) -> Path | None:
        value = os.environ.get(name)
        return Path(value) if value else None

    return Address(
        path("SUPSUPD_SOCKET"),
        os.environ.get("SUPSUPD_URL") or None,
        path("SUPSUPD_TOKEN_FILE"),
        path("SUPSUPD_CA"),
        path("SUPSUPD_CERTIFICATE"),
    )


def _token(address: Address) -> str | None:
    """Never an argument of the command, which every user of the machine can read. Over the socket, the kernel says
    who asks."""
    if address.url is None:
        return None
    if address.token_file is None:
        return os.environ.get("SUPSUPD_TOKEN") or None
    try:
        *_, token = address.token_file.read_text("ascii").split()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no token in it"
        fail(f"{address.token_file}: {reason}; expected a file whose last line is a token", EXIT_NO_INPUT)
    return token
