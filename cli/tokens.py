"""`supsupd token`: who may come in over TCP. May run beside the daemon, which notices at once, and before its first
start."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.connection import AsJson
from cli.db import State
from cli.output import EXIT_CONFIG, EXIT_NO, fail, print_rows
from supsupd.choices import ROLES, Role
from supsupd.paths import default_state

if TYPE_CHECKING:
    from supsupd.tokens import Tokens

FIELDS = ("id", "role", "label", "created", "expires", "state")

tokens_app = typer.Typer(help="Tokens of those who come over TCP.", rich_markup_mode=None, no_args_is_help=True)


@tokens_app.command("create")
def create_token(
    role: Annotated[str, typer.Option(metavar="|".join(ROLES), help="What its holder may do.")],
    label: Annotated[str, typer.Option(metavar="TEXT", help="Whose it is, for listings and histories.")] = "",
    days: Annotated[int | None, typer.Option(metavar="N", min=1, max=36500, help="How long it is good for.")] = None,
    state: State = default_state(),
) -> None:
    """Make a token and print it, as the last line: it is shown only now, and kept nowhere."""
    from supsupd.precautions import check_state

    with _told():
        check_state(state)
        token, text = _tokens(state).create(_role(role), label, days)
    until = "" if token.expires is None else f", until {token.expires.isoformat()}"
    typer.echo(f"token {token.id} for the role {token.role}{until}:", err=True)
    typer.echo(text)


@tokens_app.command("list")
def list_tokens(state: State = default_state(), as_json: AsJson = False) -> None:
    """All tokens, without their secrets."""
    with _told():
        tokens = _tokens(state).read()
    rows = [
        {**token.model_dump(mode="json", exclude={"sha256"}), "state": "expired" if token.is_expired else "valid"}
        for token in tokens
    ]
    print_rows(rows, FIELDS, as_json)


@tokens_app.command("revoke")
def revoke_token(
    identifier: Annotated[str, typer.Argument(metavar="ID", help="A token's id, as the listing shows it.")],
    state: State = default_state(),
) -> None:
    """Make a token worthless, at once."""
    with _told():
        token = _tokens(state).revoke(identifier)
    typer.echo(f"token {token.id} is revoked")


def _tokens(state: Path) -> "Tokens":
    from supsupd.tokens import Tokens

    return Tokens(state.expanduser().absolute())


def _role(name: str) -> Role:
    for role in ROLES:
        if role == name:
            return role
    return fail(f"--role: given {name!r}; expected {', '.join(ROLES[:-1])} or {ROLES[-1]}", EXIT_CONFIG)


@contextmanager
def _told() -> Iterator[None]:
    """What can go wrong, in one line and with an exit code."""
    from supsupd.config import ConfigError
    from supsupd.tokens import TokensRefused, TokenUnknown

    try:
        yield
    except (TokensRefused, ConfigError, ValueError) as error:
        fail(str(error), EXIT_CONFIG)
    except TokenUnknown as error:
        fail(str(error.args[0]), EXIT_NO)
    except OSError as error:
        fail(f"{error.filename or 'the system'}: {error.strerror or error}", EXIT_NO)
