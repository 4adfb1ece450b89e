"""All rows from one database to another of the same schema, whatever that is and whichever system holds either."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, Connection, DateTime, MetaData, Table, event, func, inspect, select, text

from storage.models import Base

AT_A_TIME = 100


def reflect(connection: Connection) -> MetaData:
    """Our tables as they are, with types whose values mean the same in every system; nobody else's."""
    metadata = MetaData()
    event.listen(metadata, "column_reflect", _normalise)
    names = inspect(connection).get_table_names()
    metadata.reflect(connection, only=[name for name in names if name in Base.metadata.tables])
    return metadata


def copy_rows(source: Connection, target: Connection) -> dict[str, int]:
    """Copy every row of every table, and what the next ids are; returns the rows of each table.

    The target has the same tables, without rows. Raises SQLAlchemyError.
    """
    counts = {}
    ours, theirs = reflect(target), reflect(source)
    for table in ours.sorted_tables:
        counts[table.name] = _copy_table(source, target, theirs.tables[table.name], table)
        _set_next_id(source, target, table)
    return counts


def count_rows(connection: Connection) -> dict[str, int]:
    """The rows of each table."""
    tables = reflect(connection).sorted_tables
    return {table.name: connection.scalar(select(func.count()).select_from(table)) or 0 for table in tables}


def iter_rows(connection: Connection, table: Table) -> Iterator[dict[str, Any]]:
    """Every row in order of the key, a few in memory at a time; times are aware."""
    query = select(table).order_by(*table.primary_key.columns)
    for row in connection.execute(query.execution_options(yield_per=AT_A_TIME)):
        yield {key: _aware(value) for key, value in row._mapping.items()}


def _copy_table(source: Connection, target: Connection, theirs: Table, ours: Table) -> int:
    """References to rows of the same table, which may come later, are set once all are there."""
    late = [column for column in ours.columns if any(key.column.table is ours for key in column.foreign_keys)]
    count = 0
    part: list[dict[str, Any]] = []
    links: list[dict[str, Any]] = []
    for row in iter_rows(source, theirs):
        links += [{"id": row["id"], "column": column, "value": row[column.name]}
                  for column in late if row[column.name] is not None]  # fmt: skip
        part.append(row | {column.name: None for column in late})
        if len(part) == AT_A_TIME:
            count += _insert(target, ours, part)
            part = []
    count += _insert(target, ours, part)
    for link in links:
        target.execute(ours.update().where(ours.c.id == link["id"]).values({link["column"]: link["value"]}))
    return count


def _insert(target: Connection, table: Table, rows: list[dict[str, Any]]) -> int:
    if rows:
        target.execute(table.insert(), rows)
    return len(rows)


def _set_next_id(source: Connection, target: Connection, table: Table) -> None:
    """An id is never given again, not even that of a row that is gone."""
    last = _last_id(source, table)
    if not last:
        return
    if target.dialect.name == "sqlite":
        target.execute(text("DELETE FROM sqlite_sequence WHERE name = :name"), {"name": table.name})
        target.execute(text("INSERT INTO sqlite_sequence VALUES (:name, :last)"), {"name": table.name, "last": last})
    else:
        sequence = f"{table.name}_id_seq"
        target.execute(text("SELECT setval(CAST(:name AS regclass), :last)"), {"name": sequence, "last": last})


def _last_id(connection: Connection, table: Table) -> int | None:
    """The highest id that the table ever gave; None where it never gave one, or gives none."""
    if connection.dialect.name == "sqlite":
        return connection.scalar(text("SELECT seq FROM sqlite_sequence WHERE name = :name"), {"name": table.name})
    sequence = connection.scalar(text("SELECT to_regclass(:name)"), {"name": f"{table.name}_id_seq"})
    if sequence is None:
        return None
    return connection.scalar(text(f"SELECT CASE WHEN is_called THEN last_value END FROM {table.name}_id_seq"))  # noqa: S608 - our own names


def _normalise(_inspector: Any, _table: Any, column: dict[str, Any]) -> None:
    if isinstance(column["type"], JSON):
        column["type"] = JSON(none_as_null=True)
    elif isinstance(column["type"], DateTime):
        column["type"] = DateTime(timezone=True)


def _aware(value: Any) -> Any:
    return value.replace(tzinfo=value.tzinfo or UTC).astimezone(UTC) if isinstance(value, datetime) else value
