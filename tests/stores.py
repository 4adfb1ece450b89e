"""Both kinds of store for the tests that must hold on each: an own file, or an own schema of the shared server."""

import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest
import services
from sqlalchemy import create_engine, text

SERVER = f"postgresql://postgres@127.0.0.1:{services.PORTS['postgresql']}/test"
KINDS = ("sqlite", "postgresql")


@contextmanager
def postgresql_target():
    """The URL of a schema that goes away again."""
    services.require("postgresql")
    schema = f"test_{uuid.uuid4().hex}"
    with administrator() as run:
        run(f"CREATE SCHEMA {schema}")
    try:
        yield f"{SERVER}?options=-csearch_path%3D{schema}"
    finally:
        with administrator() as run:
            run(f"DROP SCHEMA {schema} CASCADE")


@contextmanager
def administrator():
    """Runs statements on the server, outside of all schemas, each at once."""
    engine = create_engine(SERVER.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            yield lambda statement, **values: connection.execute(text(statement), values)
    finally:
        engine.dispose()


@pytest.fixture(params=KINDS)
def store_target(request, tmp_path):
    """What `Database.open` takes: an empty place for a store, of each kind."""
    if request.param == "sqlite":
        yield tmp_path / "state" / "supsup.db"
        return
    with postgresql_target() as url:
        yield url


@contextmanager
def tampering(target):
    """A connection that changes a store behind the daemon's back; statements have :named values, commit at the end."""
    url = f"sqlite:///{target}" if isinstance(target, Path) else target.replace("postgresql:", "postgresql+psycopg:")
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            yield lambda statement, **values: connection.execute(text(statement), values)
    finally:
        engine.dispose()
