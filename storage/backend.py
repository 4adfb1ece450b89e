"""What a database system is to the store. `storage.sqlite` and `storage.postgresql` are the two there are."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from storage.bounds import check_statement, check_text
from storage.errors import StoreError, TransactionLost, ValueRefused
from storage.models import StoreSession

REFUSALS = (SQLAlchemyError, UnicodeError)
"""What a statement may raise: where a database is damaged, even the words in which SQLite refuses may be no text."""

Target: TypeAlias = Path | str
"""A file of SQLite, or a URL: postgresql://user:password@host/database, sqlite:///FILE."""


class Backend(Protocol):
    """One database. `name`: it, for people, without secrets. `patience`: seconds to wait for a lock or a connection."""

    name: str
    patience: float

    def exists(self) -> bool:
        """Whether there is a database, migrated or not. Raises StoreUnavailable where that cannot be known."""

    def create(self) -> None:
        """Make what has to be there before the first table. Raises OSError."""

    def refuse_unsafe(self) -> None:
        """Raise StoreError where the promises of a commit cannot be kept, or the database is damaged at first sight."""

    def writer(self) -> Engine:
        """Whose connections write; they come with a claim to be the only one. Connecting raises StoreTaken."""

    def readers(self) -> Engine:
        """Whose connections read one snapshot in each transaction, and cannot write."""

    def migrating(self) -> AbstractContextManager[Connection]:
        """A writing connection inside one transaction, for what changes tables."""

    def scratch(self) -> AbstractContextManager[Connection]:
        """A connection with no tables, on which nothing stays."""

    def find_damage(self, connection: Connection) -> list[str]:
        """What the database system itself finds wrong, and rows that refer to missing ones, in words."""

    def size(self, connection: Connection) -> int:
        """What the database takes, in bytes."""

    def explain(self, error: Exception, committing: bool) -> StoreError:
        """What an error means; `committing`: it came from COMMIT."""

    def fold(self, connection: Connection) -> None:
        """Tidy up before the writing connection is closed."""


def guard(engine: Engine, begin: str, in_transaction: Callable[[Any], bool]) -> Engine:
    """Let transactions be begun by `begin` alone, and no statement take effect outside of one, nor with what only one
    kind of store can hold.

    in_transaction: whether a driver's connection is inside one that can still be committed.
    """

    def require_transaction(connection: Connection) -> None:
        if not in_transaction(connection.connection.driver_connection):
            raise TransactionLost("the database ended the transaction by itself; nothing of it was stored")

    def check(connection: Connection, _cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if not statement.startswith("BEGIN"):
            require_transaction(connection)
            check_statement(context, parameters, many)

    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
    event.listen(engine, "before_cursor_execute", check)
    event.listen(engine, "commit", require_transaction)
    return engine


def dump_json(value: Any) -> str:
    """Strict JSON. Raises ValueRefused for what it cannot hold, as a NaN."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueRefused(f"this cannot be stored: {error}") from error
    check_text(text)
    return text


def load_json(data: str | bytes) -> Any:
    """What `dump_json` was given. Raises StoreError for anything else, which only damage can have put there."""
    try:
        return json.loads(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"a stored value is damaged: it is not JSON: {error}") from error


def new_session(bind: Engine | Connection) -> Session:
    """Rows stay readable when their session is gone."""
    return StoreSession(bind, expire_on_commit=False)


def one_line(error: object) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())
