"""Whether a store is sound: everything that was stored is still there and still the same. Changes nothing."""

from pathlib import Path

from sqlalchemy import Connection, LargeBinary, select
from sqlalchemy.orm import Session

from storage import features, ledger, masks, predictions, reservoir, schema
from storage.backend import REFUSALS, Backend, Target, new_session
from storage.backends import backend_of, reading
from storage.errors import SchemaMismatch, StoreError
from storage.models import Base, BatchRow
from storage.spool import Spool, SpoolCorrupt

AT_A_TIME = 500


def verify(target: Target, spool: Path | None = None) -> list[str]:
    """What is wrong with a store, in words; an empty list: it is sound. May run beside a daemon.

    The database's own checks, the foreign keys, the schema against the models, every value, the hash and the popcount
    of every mask, the hashes of the reservoir and the features, the kept predictions, and in the folder `spool` the
    bytes of every batch that still needs them. Raises StoreUnavailable when the database is locked or away.
    """
    backend = backend_of(target)
    if not backend.exists():
        return [f"{backend.name} does not exist"]
    problems = find_problems(backend)
    if not problems and spool is not None:
        problems = list_missing(target, spool)
    return problems


def find_problems(backend: Backend, current: bool = True) -> list[str]:
    """`verify` without the spool. `current`: an older schema is a problem too; of such a one, little can be checked."""
    readers = backend.readers()
    try:
        with new_session(readers) as session:
            if problems := backend.find_damage(session.connection()):
                return problems
            if not current and schema.pending_revisions(session.connection(), schema.migration_config()):
                return []
            return find_differences(backend, session.connection()) or _unreadable(session) or _corrupt(session)
    except REFUSALS as error:
        found = backend.explain(error, committing=False)
        if type(found) is not StoreError:
            raise found from error
        return [f"{backend.name}: {found}"]
    except SchemaMismatch as error:
        return [str(error)]
    except StoreError as error:
        return [f"{backend.name}: {error}"]
    finally:
        readers.dispose()


def list_missing(target: Target, spool: Path) -> list[str]:
    """The batches that are not finished whose bytes are not in the spool as they were, in words."""
    with reading(target) as session:
        needed = list_required(session)
    problems = {sha256: found for sha256 in sorted(needed) if (found := _spool_problem(spool, sha256)) is not None}
    if problems:  # a daemon may have finished with them since
        with reading(target) as session:
            needed = list_required(session)
    return [found for sha256, found in problems.items() if sha256 in needed]


def list_required(session: Session) -> set[str]:
    """The hashes of the bytes without which the daemon could not go on. Those of rejected batches are not among them:
    before schema 0005 they were not kept."""
    query = select(BatchRow.sha256).where(BatchRow.state.in_(("staged", *ledger.OPEN)))
    return {sha256 for sha256 in session.scalars(query) if sha256 is not None}


def list_strays(target: Target, spool: Path) -> list[str]:
    """The payloads in the spool that no batch needs: what a running daemon still holds, or a crash left."""
    names = Spool(spool).names() if spool.is_dir() else set()
    with reading(target) as session:
        return sorted(names - ledger.list_spooled(session))


def _spool_problem(spool: Path, sha256: str) -> str | None:
    try:
        if not spool.is_dir():
            return f"spool: {sha256} is missing"
        Spool(spool).load(sha256)
    except (SpoolCorrupt, ValueError, OSError) as error:
        return str(error)
    return None


def find_differences(backend: Backend, connection: Connection) -> list[str]:
    """How the tables differ from the models, in words. Raises SchemaMismatch for a newer schema."""
    if pending := schema.pending_revisions(connection, schema.migration_config()):
        return [f"revision {revision} is not applied: run `supsupd db upgrade`" for revision in pending]
    actual = schema.describe(connection)
    with backend.scratch() as empty:
        Base.metadata.create_all(empty)
        wanted = schema.describe(empty)
    missing = [f"missing: {fact}" for fact in sorted(wanted - actual)]
    return missing + [f"unexpected: {fact}" for fact in sorted(actual - wanted)]


def _unreadable(session: Session) -> list[str]:
    """Tables with a value that is not of its column's type: SQLite stores anything anywhere. Blobs have hashes."""
    problems = []
    for table in Base.metadata.sorted_tables:
        columns = [column for column in table.columns if not isinstance(column.type, LargeBinary)]
        try:
            rows = session.execute(select(*columns).execution_options(yield_per=AT_A_TIME))
            for _ in rows:
                pass
        except (ValueError, TypeError, StoreError) as error:
            problems.append(f"{table.name}: a value cannot be read: {error}")
    return problems


def _corrupt(session: Session) -> list[str]:
    parts = (masks, reservoir, features, predictions)
    return [problem for part in parts for problem in part.list_corrupt(session)]
