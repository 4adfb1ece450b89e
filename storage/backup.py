"""A whole store in one file: a tar of a SQLite database, the spooled bytes that it needs, and the hashes of both."""

import errno
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from alembic import command

from storage import copying, ledger, schema
from storage.backend import Backend
from storage.backends import reading, translated
from storage.errors import SchemaMismatch, StoreError
from storage.sqlite import SqliteBackend
from storage.verification import find_problems, list_required
from storage.work_folder import work_folder

FORMAT = 1
MANIFEST, DATABASE, SPOOL = "MANIFEST.json", "supsup.db", "spool"
ATTEMPTS = 10
CHUNK = 1 << 20


class BackupInvalid(StoreError):
    """A file is no backup, or no longer the one that was written."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup holds: the schema of its database, the SHA-256 of every member, the rows of every table."""

    format: int
    created: str
    revision: str
    members: dict[str, str]
    rows: dict[str, int]


def make_backup(
    backend: Backend, spool: Path, file: Path, *, force: bool = False, everything: bool = False
) -> Manifest:
    """Write a backup of a store to `file`, 0600, beside whoever writes the store; it is verified before it is there.

    everything: take all of the spool, for a database of an older schema, whose ledger nobody reads here.
    Raises FileExistsError unless to `force`, StoreError when the store is damaged or cannot be read, OSError.
    """
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder, expected a file to write", str(file))
    if file.exists() and not force:
        raise FileExistsError(errno.EEXIST, "it is not overwritten without --force", str(file))
    if not backend.exists():
        raise SchemaMismatch(f"{backend.name} does not exist")
    with work_folder(file.parent) as folder, work_folder(spool.parent) as work:
        copy, links = work / DATABASE, work / SPOOL
        links.mkdir(mode=0o700)
        needed = _take(backend, spool, copy, links, everything)
        if problems := find_problems(SqliteBackend(copy), current=False):
            raise StoreError(f"the store is damaged, and was not backed up: {problems[0]}")
        manifest = _describe(copy, needed)
        _write_tar(folder / "backup.tar", manifest, copy, links)
        check_backup(folder / "backup.tar")
        (folder / "backup.tar").replace(file)
        _sync(file.parent)
    return manifest


def check_backup(file: Path) -> Manifest:
    """What a backup holds, once all of it was read and is as it was written. Raises BackupInvalid, OSError."""
    with _opened(file) as (manifest, members):
        for _ in members:
            pass
    return manifest


def restore_backup(file: Path, backend: Backend, spool: Path, *, force: bool = False) -> Manifest:
    """Put a store back as it was when the backup was made. The caller holds the state's lock.

    The database comes last and at once: before, the store is what it was. force: replace what is there. PostgreSQL's
    gets the newest schema, SQLite's that of the backup.
    Raises BackupInvalid, SchemaMismatch for one of a newer program, FileExistsError when something is there already,
    StoreError when the database refuses, OSError.
    """
    if not force and (found := _find_contents(backend, spool)) is not None:
        raise FileExistsError(errno.EEXIST, "is not empty; --force replaces it", found)
    spool.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with work_folder(spool.parent) as folder:
        manifest = _extract(file, folder)
        _refuse_newer(manifest)
        if problems := find_problems(SqliteBackend(folder / DATABASE), current=False):
            raise BackupInvalid(f"{file}: {problems[0]}")
        _restore_spool(folder / SPOOL, spool)
        if isinstance(backend, SqliteBackend):
            _replace_database(backend, folder / DATABASE)
        else:
            manifest = replace(manifest, revision=_refill_database(backend, folder / DATABASE))
    return manifest


def back_up_before(backend: Backend, state: Path, revision: str) -> Path | None:
    """A backup in the state's folder `backup` before its schema `revision` is changed; None of an empty store."""
    readers = backend.readers()
    try:
        with translated(backend), readers.connect() as connection:
            if not any(copying.count_rows(connection).values()):
                return None
    finally:
        readers.dispose()
    folder = state / "backup"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = folder / f"{revision}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{os.getpid()}.tar"
    make_backup(backend, state / SPOOL, file, everything=True)
    return file


def _take(backend: Backend, spool: Path, copy: Path, links: Path, everything: bool) -> set[str]:
    """A copy of the database, and links to all bytes that it needs; returns their hashes.

    A daemon may remove bytes between the copy and the links: what was there before is linked before, and if
    something came and went in between, all is done again.
    """
    for _ in range(ATTEMPTS):
        for path in spool.iterdir() if spool.is_dir() else ():
            _link(path, links)
        copy.unlink(missing_ok=True)
        _copy_database(backend, copy)
        held = {path.name for path in links.iterdir()}
        if everything:
            return held
        with reading(copy) as session:
            needed, required = ledger.list_spooled(session), list_required(session)
        for sha256 in needed - held:
            _link(spool / sha256, links)
        held = {path.name for path in links.iterdir()}
        if required <= held:
            return needed & held
    raise StoreError(f"spool: the bytes of {min(required - held)} are missing")


def _link(path: Path, links: Path) -> None:
    with suppress(FileNotFoundError, FileExistsError):
        if len(path.name) == 64 and path.is_file():
            (links / path.name).hardlink_to(path)


def _copy_database(backend: Backend, copy: Path) -> None:
    if isinstance(backend, SqliteBackend):
        backend.copy_to(copy)
        return
    readers = backend.readers()
    ours = SqliteBackend(copy)
    ours.create()
    try:
        with translated(backend), readers.connect() as source:
            revision = schema.current_revision(source)
            with ours.migrating() as connection:
                if revision is not None:
                    command.upgrade(schema.migration_config(connection), revision)
                copying.copy_rows(source, connection)
    finally:
        readers.dispose()


def _describe(copy: Path, needed: set[str]) -> Manifest:
    readers = SqliteBackend(copy).readers()
    try:
        with readers.connect() as connection:
            revision, rows = schema.current_revision(connection), copying.count_rows(connection)
    finally:
        readers.dispose()
    if revision is None:
        raise SchemaMismatch("the database has no schema yet: there is nothing to back up")
    members = {DATABASE: _hash(copy)} | {f"{SPOOL}/{sha256}": sha256 for sha256 in sorted(needed)}
    return Manifest(FORMAT, datetime.now(UTC).isoformat(timespec="seconds"), revision, members, rows)


def _write_tar(file: Path, manifest: Manifest, copy: Path, links: Path) -> None:
    with file.open("xb") as raw:
        file.chmod(0o600)
        with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
            text = json.dumps(asdict(manifest), indent=1).encode()
            tar.addfile(_member(MANIFEST, len(text)), io.BytesIO(text))
            for name in manifest.members:
                path = copy if name == DATABASE else links / name.removeprefix(f"{SPOOL}/")
                with path.open("rb") as content:
                    tar.addfile(_member(name, path.stat().st_size), content)
        raw.flush()
        os.fsync(raw.fileno())


def _member(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o600, int(datetime.now(UTC).timestamp())
    return info


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Manifest, Iterator[tuple[str, bytes]]]]:
    """The manifest, and the members' bytes in parts as (name, part); running through to the end checks everything."""
    try:
        with tarfile.open(file, "r:") as tar:
            manifest = _read_manifest(tar, file)
            yield manifest, _iter_members(tar, manifest, file)
    except (tarfile.TarError, EOFError) as error:
        raise BackupInvalid(f"{file} is no backup: {error}") from error


def _read_manifest(tar: tarfile.TarFile, file: Path) -> Manifest:
    first = tar.next()
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > 1 << 30:
        raise BackupInvalid(f"{file} is no backup: it does not begin with {MANIFEST}")
    content = tar.extractfile(first)
    try:
        manifest = Manifest(**json.loads(content.read() if content is not None else b""))
        members = [DATABASE, *(f"{SPOOL}/{sha256}" for name, sha256 in manifest.members.items() if name != DATABASE)]
        if manifest.format == FORMAT and list(manifest.members) == members:
            return manifest
    except (TypeError, ValueError, AttributeError, RecursionError):
        pass
    raise BackupInvalid(f"{file}: {MANIFEST} is not one of format {FORMAT}")


def _iter_members(tar: tarfile.TarFile, manifest: Manifest, file: Path) -> Iterator[tuple[str, bytes]]:
    for name, sha256 in manifest.members.items():
        info = tar.next()
        content = tar.extractfile(info) if info is not None and info.name == name and info.isreg() else None
        if content is None:
            raise BackupInvalid(f"{file}: {name} is missing")
        digest = hashlib.sha256()
        while part := content.read(CHUNK):
            digest.update(part)
            yield name, part
        if digest.hexdigest() != sha256:
            raise BackupInvalid(f"{file}: {name} has another SHA-256 than when it was written")
    if tar.next() is not None:
        raise BackupInvalid(f"{file}: there is more in it than {MANIFEST} says")


def _extract(file: Path, folder: Path) -> Manifest:
    (folder / SPOOL).mkdir(mode=0o700)
    with _opened(file) as (manifest, members):
        for name, part in members:
            with (folder / name).open("ab") as out:
                out.write(part)
        for name in manifest.members:  # an empty one has no part
            (folder / name).touch()
            (folder / name).chmod(0o600)
            _sync(folder / name)
    return manifest


def _refuse_newer(manifest: Manifest) -> None:
    if manifest.revision not in (known := schema.known_revisions()):
        raise SchemaMismatch(f"schema {manifest.revision} is newer than this program, which knows up to {known[-1]}")


def _find_contents(backend: Backend, spool: Path) -> str | None:
    """Where there is something that a restore would replace."""
    if spool.is_dir() and any(spool.iterdir()):
        return str(spool)
    if not backend.exists():
        return None
    readers = backend.readers()
    try:
        with translated(backend), readers.connect() as connection:
            return backend.name if any(copying.count_rows(connection).values()) else None
    finally:
        readers.dispose()


def _restore_spool(source: Path, spool: Path) -> None:
    """Bytes that no row needs yet do no harm."""
    spool.mkdir(mode=0o700, exist_ok=True)
    for path in source.iterdir():
        path.replace(spool / path.name)
    _sync(spool)


def _replace_database(backend: SqliteBackend, copy: Path) -> None:
    """The log of the old database must not be taken for that of the new one."""
    backend.create()
    with suppress(StoreError):  # a damaged one is replaced all the same
        backend.settle()
    for suffix in ("-wal", "-shm"):
        backend.path.with_name(backend.path.name + suffix).unlink(missing_ok=True)
    copy.replace(backend.path)
    _sync(backend.path.parent)


def _refill_database(backend: Backend, copy: Path) -> str:
    """Brings the copy to the newest schema before: in older ones SQLite took what PostgreSQL cannot. Returns it."""
    revision = schema.known_revisions()[-1]
    with SqliteBackend(copy).migrating() as connection:
        command.upgrade(schema.migration_config(connection), revision)
    readers = SqliteBackend(copy).readers()
    try:
        with translated(backend), readers.connect() as source, backend.migrating() as connection:
            schema.pending_revisions(connection, schema.migration_config())  # nobody else's, nor a newer one
            for table in reversed(copying.reflect(connection).sorted_tables):
                table.drop(connection)
            connection.exec_driver_sql("DROP TABLE IF EXISTS alembic_version")
            command.upgrade(schema.migration_config(connection), revision)
            copying.copy_rows(source, connection)
    finally:
        readers.dispose()
    return revision


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
