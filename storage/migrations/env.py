"""What Alembic runs: on the connection of `storage.db.upgrade`, or for `alembic -x database=FILE|URL …`."""

from pathlib import Path

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection

from storage import db
from storage.models import Base


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        # Alembic takes SQLite's DDL for non-transactional; with BEGIN IMMEDIATE around it, it is not.
        transactional_ddl=True,
        render_as_batch=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_from_command_line() -> None:
    database = context.get_x_argument(as_dictionary=True).get("database")
    if context.is_offline_mode() or not database:
        raise CommandError("say which database: alembic -x database=FILE|URL … (there is no offline mode)")
    with db.migrating(database if "://" in database else Path(database)) as connection:
        run(connection)


given = context.config.attributes.get("connection")
if given is None:
    run_from_command_line()
else:
    run(given)
