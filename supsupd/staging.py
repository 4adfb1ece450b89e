"""How a batch becomes ours: a look into its bytes, the bytes made durable, then its row in one transaction.

Items are taken in groups: one round of fsync for all their bytes, one transaction for all rows, sightings and cursors.
A crash before the transaction leaves only stray files in the spool, and the source is asked again; after it the batches
are ours, and a delivery that comes again is known by its identity or its content.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import structlog

from storage import cursors, ledger
from storage.bounds import storable
from storage.db import Database, StoreError, ValueRefused
from storage.failpoints import hit
from storage.ledger import LedgerConflict
from storage.models import BatchRow, utc_now
from storage.packing import sha256 as hash_of
from storage.spool import Spool
from streams.batch import Arrival, BatchRejected, Refusal, digest_of
from streams.decoder import Decoder
from streams.formats import FORMATS
from streams.tasks import TaskRule, told_task
from supsupd.health import Health
from supsupd.sections import IntakeSettings

if TYPE_CHECKING:
    from storage.db import Session

SOCKET_SOURCE = "socket"
MAX_REASON = 500
"""Characters that are kept of why something cannot be stored."""
DISK_FULL, KEPT_FULL = "disk_full", "kept_full"
RETRIED = "retried"
"""Who asks for the decoding of what an operator sends in again."""

log = structlog.get_logger("supsupd.intake")


class QueueFull(Exception):
    """As many batches as are allowed wait to be learned, or were rejected, or the disk has no room."""


class KeyReused(Exception):
    """The same idempotency key came with other bytes."""


@dataclass(frozen=True, slots=True)
class Room:
    """How many batches may come in now; `kind` and `text`: why none may, if that will not pass by itself."""

    batches: int
    kind: str = ""
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """An item that was looked into: what the ledger will say of it. `is_cut`: it may yet get its rest."""

    item: Arrival | Refusal
    entry: ledger.Entry | ledger.Rejected
    is_cut: bool = False


class Staging:
    """Makes batches durable, from whatever source they come. For any thread.

    Args:
        database, spool: the store.
        settings: sizes, and what counts as the same batch.
        decoder: looks into the bytes.
        tasks: which batches must say what task they belong to.
        health: ends the daemon where the socket's batches meet a failed disk; those of sources are `Intake`'s to judge.
    """

    def __init__(
        self,
        database: Database,
        spool: Spool,
        settings: IntakeSettings,
        decoder: Decoder,
        tasks: TaskRule = "ignored",
        health: Health | None = None,
    ) -> None:
        self.database = database
        self._spool = spool
        self._settings = settings
        self._decoder = decoder
        self._tasks = tasks
        self._health = health or Health()

    def room(self, source: str, sender: str | None = None) -> Room:
        """What this source or sender may hand over: it may hold as much of the room as it leaves free for the others.

        Raises StoreError, OSError.
        """
        system = os.statvfs(self._spool.root)
        free, least = system.f_bavail * system.f_frsize, self._settings.min_free_bytes
        if free < least:
            return Room(0, DISK_FULL, f"{free} bytes are free on the disk of the state; intake goes on from {least}")
        with self.database.read() as session:
            waiting = ledger.waiting(session, source, sender)
            kept = ledger.kept_size(session, source, sender)
        if kept >= (most := self._settings.max_kept_bytes):
            what = "of its batches that were rejected, or wait for a first task, are kept"
            return Room(0, KEPT_FULL, f"{kept} bytes {what}, at most {most} may be: retry or drop some")
        if waiting.own_size >= self._settings.max_spool_bytes - waiting.size:
            return Room(0)
        spare = self._settings.max_queue - waiting.count - waiting.own_count
        return Room(max(0, (spare + 1) // 2))  # each that comes in takes from what is free, and adds to its own

    def look_into(self, item: Arrival | Refusal) -> Taken:
        """Decodes it once, so that what the ledger accepts can be read."""
        if isinstance(item, Refusal):
            return Taken(item, _rejected(item, item.code, item.reason))
        try:
            return Taken(item, self._entry(item, who=item.origin))
        except BatchRejected as rejection:
            rejected = _rejected(item, rejection.code, str(rejection))
            return Taken(item, rejected, is_cut=rejection.code == "truncated" and item.may_grow)

    def _entry(self, item: Arrival, who: str) -> ledger.Entry:
        """Raises BatchRejected. `who` waits while it is decoded, and nobody else."""
        summary = self._decoder.inspect(item.payload, item.form, who)
        task = told_task(summary.task, summary.labelled, item.name, self._tasks)
        return ledger.Entry(
            source=item.source,
            name=item.name,
            sha256=item.sha256,
            size=len(item.payload),
            samples=summary.samples,
            labelled=summary.labelled,
            given_task=task,
            dedupe_key=self._dedupe_key(item, task if summary.task is None else None),
            form=item.form,
            sender=item.sender,
        )

    def _dedupe_key(self, item: Arrival, folder: str | None) -> str:
        """By content: the bytes, and the task where the folder says it. By identity: the delivery too."""
        parts = [item.sha256]
        if folder is not None:
            parts.append(f"task {folder}")
        if self._settings.dedupe == "identity":
            parts += ["delivery", item.source, item.identity or f"{item.key} {item.position}"]
            if item.sender is not None and item.identity is not None:
                parts.append(uuid4().hex)  # once its key has expired, it is another delivery
        return item.sha256 if len(parts) == 1 else hash_of("\0".join(parts).encode())

    def make_durable(self, group: Sequence[Taken], expires_at: datetime | None = None) -> list[ledger.Staged]:
        """What became of each item of one source, in order: a delivery that is known already is the batch that it was.

        An item that no store can hold is recorded as rejected, and keeps none of the others out. expires_at: how long
        the deliveries are known.
        Raises StoreError, OSError: then nothing is promised, and all may be given again.
        """
        with self._spool.guard:
            with self.database.read() as session:
                wanted = _new_payloads(session, group)
            self._spool.store(wanted)
            hit("stage.begun")
            staged = self._recorded(group, expires_at)
        hit("stage.committed")
        for taken, became in zip(group, staged, strict=True):
            _log(taken, became)
        self._warn_of_reuse(group, staged)
        return staged

    def _recorded(self, group: Sequence[Taken], expires_at: datetime | None) -> list[ledger.Staged]:
        """All in one transaction; each in its own where one of them cannot be stored."""
        try:
            return self._write(group, expires_at)
        except ValueRefused as refused:
            if len(group) > 1:
                return [staged for taken in group for staged in self._recorded([taken], expires_at)]
            if group[0].item.source == SOCKET_SOURCE:
                raise  # whoever sent it is told
            return self._write([_unstorable(group[0], refused)], expires_at)

    def _write(self, group: Sequence[Taken], expires_at: datetime | None) -> list[ledger.Staged]:
        with self.database.write() as session:
            staged = _record(session, group, expires_at)
            hit("stage.commit")
        return staged

    def _warn_of_reuse(self, group: Sequence[Taken], staged: Sequence[ledger.Staged]) -> None:
        """An identity that came before with other bytes is the batch that it was: these are not learned."""
        again = [(t.item, became.id) for t, became in zip(group, staged, strict=True) if became.known]
        sent = [(item, id_) for item, id_ in again if isinstance(item, Arrival) and item.identity is not None]
        if not sent:
            return
        with self.database.read() as session:
            hashes = {id_: ledger.load_batch(session, id_).sha256 for _, id_ in sent}
        for item, id_ in sent:
            if hashes[id_] not in (None, item.sha256):
                log.warning("id_reused", batch=id_, source=item.source, name=item.name)

    def submit(
        self, name: str, form: str, payload: bytes, key: str | None = None, sender: str | None = None
    ) -> tuple[ledger.Staged, str]:
        """Stages a batch that came over the socket; its SHA-256 too. `key`: the sender's same key again is the same
        batch, until it expires.

        A batch that is refused leaves nothing behind: whoever sent it is told, and has its bytes.
        Raises BatchRejected, QueueFull, KeyReused.
        """
        room = self.room(SOCKET_SOURCE, sender)
        if room.batches <= 0:
            raise QueueFull(room.text or "as many batches of this sender are waiting as may; try again later")
        identity = None if key is None else f"key {sender} {key}"
        sha256 = digest_of(payload)
        taken = self.look_into(Arrival(SOCKET_SOURCE, name, form, sha256, payload, "", "", identity, sender=sender))
        if isinstance(taken.entry, ledger.Rejected):
            raise BatchRejected(taken.entry.code, taken.entry.reason.removeprefix(f"{taken.entry.code}: "))
        if not taken.entry.labelled and self._waiting_for_a_task(sender) >= self._settings.max_queue // 2:
            raise QueueFull("as many unlabelled batches of this sender wait for a first task as may")
        expires_at = utc_now() + timedelta(hours=self._settings.key_hours)
        try:
            with self._judged():
                (staged,) = self.make_durable([taken], expires_at)
        except ValueRefused as refused:
            raise BatchRejected("unstorable", str(refused)) from None
        if staged.known:
            staged = self._as_before(staged, taken.entry)
        return staged, taken.entry.sha256

    def _waiting_for_a_task(self, sender: str | None) -> int:
        """They all have their turn once there is one, before what others hand in then."""
        with self.database.read() as session:
            return ledger.count_waiting_for_a_task(session, SOCKET_SOURCE, sender)

    def _as_before(self, staged: ledger.Staged, entry: ledger.Entry) -> ledger.Staged:
        """The same answer as the first time that this key came. Raises KeyReused."""
        with self.database.read() as session:
            row = ledger.load_batch(session, staged.id)
            first = ledger.find_content(session, entry.key) if row.state == "duplicate" else None
        if row.sha256 != entry.sha256:
            raise KeyReused(f"batch {row.id} came with this idempotency key and other bytes")
        return staged if first is None else replace(staged, duplicate=True, first=first.id)

    # -- rejected batches --------------------------------------------------------------------------------------------

    def retry(self, batch_id: int) -> int:
        """Sends a rejected batch in again, and returns its new id: its bytes are looked into as if they came today.

        Raises BatchUnknown, LedgerConflict, BatchRejected (it is still none), SpoolCorrupt, StoreError.
        """
        with self._spool.guard:
            with self.database.read() as session:
                row = ledger.load_batch(session, batch_id)
            if row.state not in ledger.REJECTED:
                raise LedgerConflict(f"batch {batch_id} is {row.state}: only a rejected batch can be retried")
            if row.sha256 is None:
                raise LedgerConflict(f"batch {batch_id} was refused unread: there are no bytes of it to retry")
            form, payload = "npz" if row.form is None else row.form, self._spool.load(row.sha256)
        item = Arrival(row.source, row.name, form, row.sha256, payload, "", "", f"retry {batch_id}", sender=row.sender)
        entry = self._entry(item, RETRIED)
        # Its bytes stay as long as it is rejected, and if it no longer is, that is said now.
        with self._spool.guard, self._judged(), self.database.write() as session:
            new = ledger.retry(session, batch_id, entry)
            hit("retry.commit")
        log.info("batch_retried", batch=new, retry_of=batch_id)
        return new

    def drop(self, batch_id: int) -> bool:
        """Gives a batch up that is staged or rejected: its bytes go, its row stays. False: it is the learning thread's.

        Raises BatchUnknown, LedgerConflict, StoreError, OSError.
        """
        with self._judged():
            return drop(self.database, self._spool, batch_id, held=ledger.OPEN) is not None

    @contextmanager
    def _judged(self) -> Iterator[None]:
        """Says so where only a new start can tell what is durable."""
        try:
            yield
        except (StoreError, OSError) as error:
            self._health.judge(SOCKET_SOURCE, error)
            raise


def drop(database: Database, spool: Spool, batch_id: int, held: Collection[str] = ()) -> BatchRow | None:
    """Gives a batch up that waits or was rejected: its bytes go, its row stays. None: its state is one of `held`.

    Raises BatchUnknown, LedgerConflict, StoreError, OSError.
    """
    with database.write() as session:
        if ledger.load_batch(session, batch_id).state in held:
            return None
        row = ledger.drop(session, batch_id)
        hit("drop.commit")
    discard(database, spool, [row.sha256] if row.sha256 is not None else [])
    log.info("batch_dropped", batch=batch_id)
    return row


def discard(database: Database, spool: Spool, hashes: Iterable[str]) -> None:
    """Removes payloads that no batch needs any more. Raises StoreError, OSError."""
    with spool.guard:
        with database.read() as session:
            unneeded = [sha256 for sha256 in hashes if not ledger.is_needed(session, sha256)]
        for sha256 in unneeded:
            spool.remove(sha256)


def _new_payloads(session: Session, group: Sequence[Taken]) -> dict[str, bytes]:
    """The bytes that are not ours yet, and wanted, by their hashes."""
    known = _known(session, group)
    new = [taken for taken, before in zip(group, known, strict=True) if before is None]
    seen = ledger.find_contents(session, {t.entry.key for t in new if isinstance(t.entry, ledger.Entry)})
    return {
        taken.item.sha256: taken.item.payload
        for taken in new
        if isinstance(taken.item, Arrival) and (isinstance(taken.entry, ledger.Rejected) or taken.entry.key not in seen)
    }


def _known(session: Session, group: Sequence[Taken]) -> list[int | None]:
    """The batch that each delivery is already: one comes again where its source could not be told."""
    items = [taken.item for taken in group]
    source = items[0].source
    sighted = ledger.find_sightings(session, source, {item.identity for item in items if item.identity is not None})
    by_cursor = {item.key for item in items if item.identity is None and item.key}
    positions = cursors.find_positions(session, source, by_cursor)
    known: list[int | None] = []
    for item in items:
        if item.identity is not None:
            known.append(sighted.get(item.identity))
        elif item.key and positions.get(item.key) == storable(item.position):
            known.append(ledger.newest_named(session, source, storable(item.name)))
        else:
            known.append(None)
    return known


def _unstorable(taken: Taken, refused: ValueRefused) -> Taken:
    """The same delivery as a rejected one, of which only what can be stored is told. Its bytes are kept."""
    item = replace(taken.item, name=storable(taken.item.name), position=storable(taken.item.position))
    return Taken(item, _rejected(item, "unstorable", f"unstorable: {storable(str(refused), MAX_REASON)}"))


def _rejected(item: Arrival | Refusal, code: str, reason: str) -> ledger.Rejected:
    if isinstance(item, Refusal):
        return ledger.Rejected(item.source, item.name, code, reason)
    form = item.form if item.form in FORMATS else None  # any other word is in the reason
    return ledger.Rejected(item.source, item.name, code, reason, item.sha256, len(item.payload), form)


def _record(session: Session, group: Sequence[Taken], expires_at: datetime | None) -> list[ledger.Staged]:
    """A row for each new delivery, what it is called, and how far the source is read."""
    known = _known(session, group)
    first: dict[object, int] = {}  # a delivery may come twice in one group
    for number, (taken, before) in enumerate(zip(group, known, strict=True)):
        if before is None:
            first.setdefault(taken.item.identity or number, number)
    new = list(first.values())
    rows = dict(zip(new, ledger.take(session, [group[number].entry for number in new]), strict=True))
    source = group[0].item.source
    identities = {i: rows[n].id for n in new if (i := group[n].item.identity) is not None}
    ledger.sight(session, source, identities, expires_at)
    cursors.advance_all(session, source, {group[n].item.key: group[n].item.position for n in new if group[n].item.key})
    return [
        ledger.Staged(before, duplicate=False, known=True)
        if before is not None
        else rows.get(number) or replace(rows[first[taken.item.identity]], known=True)
        for number, (taken, before) in enumerate(zip(group, known, strict=True))
    ]


def _log(taken: Taken, staged: ledger.Staged) -> None:
    name, source = taken.item.name, taken.item.source
    sender = {"sender": taken.item.sender} if isinstance(taken.item, Arrival) and taken.item.sender else {}
    if staged.known:
        log.debug("delivered_again", batch=staged.id, source=source, name=name, **sender)
    elif isinstance(taken.entry, ledger.Rejected):
        log.warning("batch_rejected", batch=staged.id, source=source, name=name, reason=taken.entry.reason)
    else:
        log.info("batch_staged", batch=staged.id, name=name, duplicate=staged.duplicate, **sender)
