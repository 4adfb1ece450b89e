"""Which schema a database has, which one the models want, and the difference in words. Any dialect."""

from collections.abc import Iterator

from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Inspector, inspect

from storage.errors import SchemaMismatch

MIGRATIONS = "storage:migrations"


def migration_config(connection: Connection | None = None, location: str = MIGRATIONS) -> Config:
    """Alembic's configuration, made in code: no ini file is installed with the package."""
    config = Config()
    config.set_main_option("script_location", location)
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def pending_revisions(connection: Connection, config: Config) -> list[str]:
    """The revisions still to apply, oldest first. Raises SchemaMismatch for a newer database."""
    known = known_revisions(config)
    current = current_revision(connection)
    if current is not None and current not in known:
        raise SchemaMismatch(f"schema {current} is newer than this program, which knows up to {known[-1]}")
    return known[known.index(current) + 1 if current else 0 :]


def known_revisions(config: Config | None = None) -> list[str]:
    """All revisions that this program knows, oldest first."""
    scripts = ScriptDirectory.from_config(config or migration_config())
    return [script.revision for script in scripts.walk_revisions()][::-1]


def current_revision(connection: Connection) -> str | None:
    """The revision of the database; None where nothing was applied."""
    return MigrationContext.configure(connection).get_current_revision()


def describe(connection: Connection) -> set[str]:
    """Every column, key, constraint and index of the tables, one fact a line (Alembic's own left out)."""
    inspector = inspect(connection)
    # Temporary ones are those of a backend's scratch connection.
    names = [*inspector.get_table_names(), *inspector.get_temp_table_names()]
    tables = [name for name in names if name != "alembic_version"]
    return {f"{table}: {fact}" for table in tables for fact in _facts(inspector, table)}


def _facts(inspector: Inspector, table: str) -> Iterator[str]:
    for column in inspector.get_columns(table):
        null = "null" if column["nullable"] else "not null"
        yield f"column {column['name']} {column['type']} {null} default {column['default']}"
    key = inspector.get_pk_constraint(table)
    yield f"primary key {key['name']} {key['constrained_columns']}"
    for foreign in inspector.get_foreign_keys(table):
        target = f"{foreign['referred_table']} {foreign['referred_columns']} {foreign['options']}"
        yield f"foreign key {foreign['name']} {foreign['constrained_columns']} to {target}"
    for unique in inspector.get_unique_constraints(table):
        yield f"unique {unique['name']} {unique['column_names']}"
    for check in inspector.get_check_constraints(table):
        yield f"check {check['name']} {check['sqltext']}"
    for index in inspector.get_indexes(table):
        yield f"index {index['name']} {index['column_names']} unique {bool(index['unique'])}"
