"""Files of predictions: one place makes a path of a name, below the folder whatever the name; and what fails there is
kept in the store, told, and tried again. Learning never waits for it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote
from uuid import uuid4

import structlog

from storage import predictions
from storage.db import Database
from storage.models import BatchRow
from streams.names import printable
from supsupd.health import Health

if TYPE_CHECKING:
    from storage.db import Session

SUFFIX = ".json"
LONGEST_PART = 255
"""Bytes of one component of a path, the suffix included: what file systems take."""
LONGEST_NAME, MOST_PARTS = 1000, 16
"""Bytes and components of a name that become as many folders; beyond, the name is one component."""
MAX_KEPT_BYTES = 64 << 20
"""Of predictions that wait for their folder, deflated; beyond, the oldest are given up."""
TRIED_AT_ONCE = 16
AGAIN_SECONDS = 5.0
"""How long the folder is left alone after it refused a file that had been kept."""
WHO, UNWRITTEN = "predictions", "predictions_unwritten"

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

log = structlog.get_logger("supsupd.learning")


def place_of(source: str, sender: str | None, name: str) -> tuple[str, ...]:
    """The components of a batch's path below the folder: `source`, `@sender` if there is one, then those of `name`,
    of which the last one ends in .json.

    All are percent-encoded, so that different batches have different paths, and none leads anywhere else. Where they
    are too long for a file system, they end in a hash of the whole instead.
    """
    parts = name.split("/")
    if len(parts) > MOST_PARTS or sum(len(_encoded(part)) + 1 for part in parts) > LONGEST_NAME:
        parts = [name]
    *folders, last = parts
    above = [_folder(source)] if sender is None else [_folder(source), _folder(sender, "@")]
    file = _bounded(_encoded(last), last, LONGEST_PART - len(SUFFIX)) + SUFFIX
    return (*above, *map(_folder, folders), file)


def _encoded(text: str) -> str:
    """As in a URL; none is empty, or hidden, or means a folder above. `urllib.parse.unquote` gives the text back."""
    encoded = quote(text.encode("utf-8", "surrogatepass"), safe="")
    if encoded.startswith("."):
        return f"%2E{encoded[1:]}"
    return encoded or "%"  # which nothing else becomes


def _folder(text: str, mark: str = "") -> str:
    """Only files end in .json: the folder of `a.json/b` is not the file of `a`."""
    encoded = mark + _encoded(text)
    if encoded.endswith(SUFFIX):
        encoded = f"{encoded.removesuffix(SUFFIX)}%2E{SUFFIX[1:]}"
    return _bounded(encoded, text, LONGEST_PART)


def _bounded(encoded: str, text: str, most: int) -> str:
    if len(encoded) <= most:
        return encoded
    end = f"%~{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"  # which no encoded text has
    return encoded[: most - len(end)] + end


class PredictionFolder:
    """Below `root`, which may be a link, no link is followed. Folders are 0700, files 0600."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, place: Sequence[str], data: bytes) -> None:
        """The file at `place` holds `data`, durably: all of it, or what was there before. Raises OSError."""
        *folders, name = place
        temporary = f".{uuid4().hex}.tmp"
        with self._opened(folders) as chain:
            folder = chain[-1]
            try:
                _write_synced(folder, temporary, data)
                os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                raise
            for descriptor in reversed(chain):  # those above too: who knows when theirs were made
                os.fsync(descriptor)

    @contextmanager
    def _opened(self, folders: Sequence[str]) -> Iterator[list[int]]:
        """Descriptors of the root and of each folder below it; those that are missing are made."""
        for missing in reversed([path for path in (self.root, *self.root.parents) if not path.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
            _sync_folder(missing.parent)
        chain = [os.open(self.root, _FOLDER & ~os.O_NOFOLLOW)]
        try:
            for name in folders:
                with suppress(FileExistsError):
                    os.mkdir(name, mode=0o700, dir_fd=chain[-1])
                chain.append(os.open(name, _FOLDER, dir_fd=chain[-1]))
            yield chain
        finally:
            for descriptor in chain:
                os.close(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, _FOLDER & ~os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(folder: int, name: str, data: bytes) -> None:
    descriptor = os.open(name, _NEW_FILE, 0o600, dir_fd=folder)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Predictions:
    """Writes what was predicted for a batch, or keeps it. For the learning thread.

    Args:
        root: the folder; None: nothing is written.
        database: keeps what cannot be.
        health: told of that.
    """

    def __init__(self, root: Path | None, database: Database, health: Health) -> None:
        self._folder = None if root is None else PredictionFolder(root)
        self._database = database
        self._health = health
        self._next_try = 0.0
        """In monotonic seconds."""
        self._last = 0
        """The batch that was tried last: the next ones have their turn, whatever became of it."""
        self._waiting = True
        """Whether any may be kept; at the start nobody knows."""

    @property
    def wanted(self) -> bool:
        return self._folder is not None

    def write(self, row: BatchRow, data: bytes) -> bool:
        """Whether the file of a batch is durable; if not, `keep` it. Where a later batch has the file, it is."""
        if self._folder is None:
            return True
        with self._database.read() as session:
            if predictions.is_superseded(session, row):
                return True
        return self._try(self._folder, row, data)

    def keep(self, session: Session, row: BatchRow, data: bytes) -> None:
        """In the transaction that says that the batch is scored."""
        given_up = predictions.keep(session, row.id, data, MAX_KEPT_BYTES)
        if given_up:
            log.error("predictions_given_up", batches=given_up, kept_bytes=MAX_KEPT_BYTES)
        self._waiting = True

    def write_kept(self) -> bool:
        """Tries a few of those that are kept, if it is time to; whether more have their turn now. Raises StoreError."""
        if self._folder is None or not self._waiting or time.monotonic() < self._next_try:
            return False
        with self._database.read() as session:
            rows = predictions.list_kept(session, TRIED_AT_ONCE, self._last)
            left = predictions.count(session)
        if not left:
            self._waiting = False
            self._health.clear(WHO)
        self._last = rows[-1].id if rows else 0
        for row in rows:
            if not self._write_kept(self._folder, row):
                self._last, self._next_try = row.id, time.monotonic() + AGAIN_SECONDS
                return False
        return self._waiting

    def _write_kept(self, folder: PredictionFolder, row: BatchRow) -> bool:
        """Whether it need not be kept any longer."""
        with self._database.read() as session:
            data = None if predictions.is_superseded(session, row) else _load(session, row.id)
        if data is not None and not self._try(folder, row, data):
            return False
        with self._database.write() as session:
            predictions.forget(session, row.id)
        return True

    def _try(self, folder: PredictionFolder, row: BatchRow, data: bytes) -> bool:
        place = place_of(row.source, row.sender, row.name)
        try:
            folder.write(place, data)
        except OSError as error:
            path = printable(str(folder.root.joinpath(*place)))
            reason = (error.strerror or str(error)).lower()
            text = f"{path}: {reason}; predictions are kept in the store until they can be written"
            self._health.report(WHO, UNWRITTEN, text)
            return False
        return True


def _load(session: Session, batch_id: int) -> bytes | None:
    """None for what is damaged: it will not be mended."""
    try:
        return predictions.load(session, batch_id)
    except predictions.PredictionCorrupt as error:
        log.error("predictions_given_up", batches=[batch_id], reason=str(error))
        return None
