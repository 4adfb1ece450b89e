"""The batch ledger: every batch ever seen, its state, and the few ways from one state to the next.

                      ┌──────────────→ committed | scored | quarantined ┐
    staged → training ┤                 ↓   ↑                            ├→ retried | dropped
       ↑         │    └──────→ unsure ──┴───┘              suspended ────┘      ↑
       └─────────┴ (restart) ────┘                                              │
                                       staged | training | unsure (an operator) ┘

`duplicate` and `quarantined` also come straight from the door, and are final like `scored`. Only `recall` takes a
committed batch back, and only `reassign` gives it to another task. A rejected batch that is sent in again becomes a new
row, so that ids are always the order of learning. Whatever still has its bytes can be dropped too.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal, cast

from sqlalchemy import ColumnElement, CursorResult, case, delete, func, or_, select, update
from sqlalchemy.orm import Session

from storage.bounds import storable
from storage.models import STATES, BatchRow, Kind, SightingRow, digest_key, utc_now

Result = Literal["unsure", "scored", "committed", "quarantined"]
OPEN = ("training", "unsure")  # what can still be finished: the learning thread may have it in hand
REJECTED = ("quarantined", "suspended")  # what an operator may send in again
SPOOLED = ("staged", "training", "unsure", *REJECTED)  # whose bytes are kept
FORGOTTEN = 64
"""Expired deliveries that are removed whenever a new one is recorded: more than come."""
MAX_CRASHES = 10
"""So often the process may die with the same batch in training before it is suspended."""


class LedgerConflict(RuntimeError):
    """A batch is not in a state that allows this step: someone else took it, or it is finished."""


class BatchUnknown(LookupError):
    """There is no such batch."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A batch at the door, its bytes already in the spool.

    size: bytes; samples: rows of x; given_task: the task that came with it, as the user named it; dedupe_key: 64 hex
    digits, the same for what counts as the same batch, by default `sha256`; form: the format, None for .npz; sender:
    who posted it, None where a source delivered it.
    """

    source: str
    name: str
    sha256: str
    size: int
    samples: int
    labelled: bool
    given_task: str | None = None
    dedupe_key: str | None = None
    form: str | None = None
    retry_of: int | None = None
    sender: str | None = None

    @property
    def key(self) -> str:
        """What counts as the same batch."""
        return self.dedupe_key or self.sha256


@dataclass(frozen=True, slots=True)
class Staged:
    """`first`: the batch of the same content that came before, if this one is a duplicate. `known`: this very delivery
    came before, as the batch `id`."""

    id: int
    duplicate: bool
    first: int | None = None
    known: bool = False


@dataclass(frozen=True, slots=True)
class Rejected:
    """Something that never got in. sha256: of its bytes where they were read and kept; reason: "code: text"."""

    source: str
    name: str
    code: str
    reason: str
    sha256: str | None = None
    size: int = 0
    form: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a batch. `committed` needs a task, `quarantined` a reason."""

    state: Result
    task_id: int | None = None
    provisional: int | None = None
    decision: Kind | None = None
    reason: str | None = None


def stage(session: Session, entry: Entry) -> Staged:
    """Record a batch: `staged`, or `duplicate` when its content is already in the ledger."""
    (staged,) = take(session, [entry])
    return staged


def take(session: Session, entries: Sequence[Entry | Rejected]) -> list[Staged]:
    """`stage` of each, in order; what never got in is recorded as rejected.

    Such a one does not count as the first of its content: under other limits the same bytes may come in.
    """
    keys = {entry.key for entry in entries if isinstance(entry, Entry)}
    found = session.scalars(select(BatchRow).where(BatchRow.dedupe_key.in_(keys)))
    firsts: dict[str | None, BatchRow] = {row.dedupe_key: row for row in found}
    taken = []
    for entry in entries:
        first = firsts.get(entry.key) if isinstance(entry, Entry) else None
        if first in session.new:  # it came with this very call
            session.flush()
        row = _staged_row(entry, first) if isinstance(entry, Entry) else _rejected_row(entry)
        session.add(row)
        if row.dedupe_key is not None:
            firsts[row.dedupe_key] = row
        taken.append((row, first))
    session.flush()
    return [Staged(row.id, duplicate=first is not None, first=first.id if first else None) for row, first in taken]


def _staged_row(entry: Entry, first: BatchRow | None) -> BatchRow:
    return _new_row(
        source=entry.source,
        name=entry.name,
        sha256=entry.sha256,
        dedupe_key=None if first else entry.key,
        size=entry.size,
        samples=entry.samples,
        labelled=entry.labelled,
        given_task=entry.given_task,
        form=entry.form,
        retry_of=entry.retry_of,
        sender=entry.sender,
        state="duplicate" if first else "staged",
        reason=_why_duplicate(first) if first else None,
    )


def _rejected_row(rejected: Rejected) -> BatchRow:
    return _new_row(
        source=rejected.source,
        name=rejected.name,
        sha256=rejected.sha256,
        size=rejected.size,
        form=rejected.form,
        state="quarantined",
        code=rejected.code,
        reason=rejected.reason,
    )


def sight(session: Session, source: str, batches: Mapping[str, int], expires_at: datetime | None = None) -> None:
    """Record which batches the deliveries of these identities became, until they expire if ever.

    The database refuses an identity twice. Some that expired are removed, and these if they did.
    """
    rows = {digest_key(source, identity): (identity, id_) for identity, id_ in batches.items()}
    if expires_at is not None:
        _forget_expired(session, rows)
    session.add_all(
        SightingRow(digest=digest, source=source, identity=storable(identity), batch_id=id_, expires_at=expires_at)
        for digest, (identity, id_) in rows.items()
    )
    session.flush()


def _forget_expired(session: Session, digests: Collection[str]) -> None:
    """Those of these digests, and so many others that it takes no time. The oldest go first."""
    expired = SightingRow.expires_at <= utc_now()
    oldest = select(SightingRow.digest).where(expired).order_by(SightingRow.expires_at).limit(FORGOTTEN)
    session.execute(delete(SightingRow).where(expired, SightingRow.digest.in_(digests)))
    session.execute(delete(SightingRow).where(SightingRow.digest.in_(session.scalars(oldest).all())))


def find_sightings(session: Session, source: str, identities: Collection[str]) -> dict[str, int]:
    """The batches that deliveries of these identities became; what is new, or expired, is not among them."""
    wanted = {digest_key(source, identity): identity for identity in identities}
    valid = or_(SightingRow.expires_at.is_(None), SightingRow.expires_at > utc_now())
    query = select(SightingRow.digest, SightingRow.batch_id).where(SightingRow.digest.in_(wanted), valid)
    return {wanted[found.digest]: found.batch_id for found in session.execute(query)}


def retry(session: Session, batch_id: int, entry: Entry) -> int:
    """Send a rejected batch in again: a new row at the end of the queue, which takes over its content's key.

    Raises BatchUnknown, LedgerConflict.
    """
    old = load_batch(session, batch_id)
    if old.state not in REJECTED:
        raise LedgerConflict(f"batch {batch_id} is {old.state}: only a rejected batch can be retried")
    _close(session, old, "retried")
    key, old.dedupe_key = old.dedupe_key or entry.key, None
    session.flush()
    if (first := find_content(session, key)) is not None:
        raise LedgerConflict(f"batch {batch_id} has the same content as batch {first.id}, which is {first.state}")
    return stage(session, replace(entry, dedupe_key=key, retry_of=batch_id)).id


def drop(session: Session, batch_id: int) -> BatchRow:
    """A batch that waits or was rejected is given up: only its row stays, and the same content is its duplicate.

    Who may have it in hand, where its state is open, has to agree. Raises BatchUnknown, LedgerConflict.
    """
    row = load_batch(session, batch_id)
    if row.state not in SPOOLED:
        raise LedgerConflict(f"batch {batch_id} is {row.state}: only what waits or was rejected can be dropped")
    return _close(session, row, "dropped")


def _close(session: Session, row: BatchRow, state: Literal["retried", "dropped"]) -> BatchRow:
    row.state, row.updated_at = state, utc_now()
    session.flush()
    return row


def forget_content(session: Session, batch_id: int) -> None:
    """The same content may come in again: what was kept of this batch is damaged, or nothing was decided about it."""
    session.execute(update(BatchRow).where(BatchRow.id == batch_id).values(dedupe_key=None))


def claim(session: Session) -> BatchRow | None:
    """Move the oldest staged batch to `training` and return it; None when nothing is staged."""
    row = session.scalar(select(BatchRow).where(BatchRow.state == "staged").order_by(BatchRow.id).limit(1))
    if row is not None:
        row.state, row.attempts, row.updated_at = "training", row.attempts + 1, utc_now()
        session.flush()
    return row


def release_claims(session: Session, crashed: bool = False) -> int:
    """Put every batch in `training` back to `staged`; returns how many.

    `crashed`: the process died with it. A batch that was in training each of MAX_CRASHES times is suspended instead:
    it may be what kills the process.
    """
    change = update(BatchRow).where(BatchRow.state == "training")
    if crashed:
        _changed(session, change.values(crashes=BatchRow.crashes + 1))
        reason = f"crashed: the daemon ended {MAX_CRASHES} times with this batch in training"
        hopeless = {"state": "suspended", "code": "crashed", "reason": reason, "updated_at": utc_now()}
        _changed(session, change.where(BatchRow.crashes >= MAX_CRASHES).values(**hopeless))
    return _changed(session, change.values(state="staged", updated_at=utc_now()))


def release_waiting(session: Session, labelled: bool) -> int:
    """Put every unsure batch that no provisional task holds back to `staged`; returns how many.

    The labelled ones waited for a network, the others for a task. Once there is one, only a crash can have kept
    them from being taken up.
    """
    waiting = (BatchRow.state == "unsure", BatchRow.provisional.is_(None), BatchRow.labelled.is_(labelled))
    return _changed(session, update(BatchRow).where(*waiting).values(state="staged", updated_at=utc_now()))


def release(session: Session, batch_id: int) -> None:
    """Give an open batch another turn. Raises LedgerConflict when it is in any other state."""
    change = update(BatchRow).where(BatchRow.id == batch_id, BatchRow.state.in_(OPEN))
    if _changed(session, change.values(state="staged", provisional=None, updated_at=utc_now())) != 1:
        raise LedgerConflict(f"batch {batch_id} is {load_batch(session, batch_id).state}: it cannot have another turn")


def newest_learned(session: Session) -> BatchRow | None:
    """The labelled batch that was recognised last, decided or not; None when there is none."""
    query = select(BatchRow).where(BatchRow.labelled.is_(True), BatchRow.state.in_(("committed", "unsure")))
    return session.scalar(query.order_by(BatchRow.id.desc()).limit(1))


def finish(session: Session, batch_id: int, outcome: Outcome) -> None:
    """Record what became of a claimed or unsure batch.

    Raises LedgerConflict when the batch is in any other state; then nothing is changed.
    """
    change = (
        update(BatchRow)
        .where(BatchRow.id == batch_id, BatchRow.state.in_(OPEN))
        .values(
            state=outcome.state,
            task_id=outcome.task_id,
            provisional=outcome.provisional,
            decision=outcome.decision,
            reason=outcome.reason,
            code=_code(outcome),
            crashes=0,
            updated_at=utc_now(),
        )
    )
    if _changed(session, change) != 1:
        row = session.get(BatchRow, batch_id)
        state = "missing" if row is None else row.state
        raise LedgerConflict(f"batch {batch_id} is {state}: it cannot become {outcome.state}")


def suspend(session: Session, batch_id: int, code: str, reason: str) -> None:
    """Set an open batch aside, whose bytes stay. Raises LedgerConflict when it is in any other state."""
    values = {"state": "suspended", "provisional": None, "code": code, "reason": f"{code}: {reason}"}
    change = update(BatchRow).where(BatchRow.id == batch_id, BatchRow.state.in_(OPEN))
    if _changed(session, change.values(**values, updated_at=utc_now())) != 1:
        raise LedgerConflict(f"batch {batch_id} is {load_batch(session, batch_id).state}: it cannot be suspended")


def recall(session: Session, batch_id: int, provisional: int | None, reason: str | None = None) -> None:
    """Take a committed batch back: it is unsure again, in a provisional task or in none. Record a decision too.

    Raises LedgerConflict when the batch is not committed; then nothing is changed.
    """
    values = {"state": "unsure", "task_id": None, "provisional": provisional, "decision": "unsure", "reason": reason}
    _change_committed(session, batch_id, values, "be recalled")


def reassign(session: Session, batch_id: int, task_id: int, reason: str | None = None) -> None:
    """Give a committed batch to another task. Record a decision too. `reason`: None keeps the one it has.

    Raises LedgerConflict when the batch is not committed; then nothing is changed.
    """
    values: dict[str, Any] = {"task_id": task_id}
    _change_committed(session, batch_id, values if reason is None else values | {"reason": reason}, "be reassigned")


def list_committed(session: Session, task_id: int, start: int = 0) -> list[BatchRow]:
    """The batches that a task has learned, in order of arrival, from the id `start` on."""
    query = select(BatchRow).where(BatchRow.task_id == task_id, BatchRow.state == "committed", BatchRow.id >= start)
    return list(session.scalars(query.order_by(BatchRow.id)))


def find_content(session: Session, dedupe_key: str) -> BatchRow | None:
    """The first batch with this content, in whatever state; None when it is new."""
    return session.scalar(select(BatchRow).where(BatchRow.dedupe_key == dedupe_key))


def find_contents(session: Session, dedupe_keys: Collection[str]) -> set[str]:
    """Those of the keys that have a first batch already."""
    found = session.scalars(select(BatchRow.dedupe_key).where(BatchRow.dedupe_key.in_(dedupe_keys)))
    return {key for key in found if key is not None}


def load_batch(session: Session, batch_id: int) -> BatchRow:
    """One batch. Raises BatchUnknown."""
    row = session.get(BatchRow, batch_id)
    if row is None:
        raise BatchUnknown(f"there is no batch {batch_id}")
    return row


def find_batch(session: Session, reference: int | str) -> BatchRow:
    """By its id, or the first batch of this SHA-256. Raises BatchUnknown."""
    if isinstance(reference, int):
        return load_batch(session, reference)
    query = select(BatchRow).where(BatchRow.sha256 == reference).order_by(BatchRow.id).limit(1)
    if (row := session.scalar(query)) is None:
        raise BatchUnknown(f"there is no batch {reference}")
    return row


def newest_named(session: Session, source: str, name: str) -> int | None:
    """The last batch that came from `source` under this name; None when there is none."""
    return session.scalar(select(func.max(BatchRow.id)).where(BatchRow.source == source, BatchRow.name == name))


def list_batches(session: Session, *states: str, limit: int | None = None, after: int | None = None) -> list[BatchRow]:
    """Batches in order of arrival: those in one of `states` if any, with an id above `after`, at most `limit`."""
    query = select(BatchRow).order_by(BatchRow.id).limit(limit)
    if states:
        query = query.where(BatchRow.state.in_(states))
    if after is not None:
        query = query.where(BatchRow.id > after)
    return list(session.scalars(query))


def list_unsure(session: Session) -> list[BatchRow]:
    """The batches that wait for more data to decide them, in order of arrival."""
    return list_batches(session, "unsure")


def list_spooled(session: Session) -> set[str]:
    """The hashes of all content whose bytes are still needed."""
    query = select(BatchRow.sha256).where(_keeps_bytes())
    return {sha256 for sha256 in session.scalars(query) if sha256 is not None}


def is_needed(session: Session, sha256: str) -> bool:
    """Whether some batch still needs the bytes of this hash."""
    return session.scalar(select(BatchRow.id).where(BatchRow.sha256 == sha256, _keeps_bytes()).limit(1)) is not None


def _keeps_bytes() -> ColumnElement[bool]:
    return BatchRow.state.in_(SPOOLED) & BatchRow.sha256.is_not(None)


@dataclass(frozen=True, slots=True)
class Waiting:
    """How many batches wait to be claimed, and their bytes: of all, and `own` of one source or sender."""

    count: int
    size: int
    own_count: int
    own_size: int


def waiting(session: Session, source: str, sender: str | None = None) -> Waiting:
    """What waits to be claimed."""
    own = _own(source, sender)
    sizes = (BatchRow.size, case((own, 1), else_=0), case((own, BatchRow.size), else_=0))
    sums = (func.coalesce(func.sum(size), 0) for size in sizes)
    found = session.execute(select(func.count(), *sums).where(BatchRow.state == "staged")).one()
    count, size, own_count, own_size = map(int, found)
    return Waiting(count, size, own_count, own_size)


def kept_size(session: Session, source: str, sender: str | None = None) -> int:
    """The bytes that are kept of one source or sender's batches that were rejected, or wait for a first task."""
    kept = (BatchRow.state.in_(REJECTED) | _waits_for_a_task()) & BatchRow.sha256.is_not(None)
    query = select(func.coalesce(func.sum(BatchRow.size), 0)).where(kept, _own(source, sender))
    return int(session.scalar(query) or 0)


def count_waiting_for_a_task(session: Session, source: str, sender: str | None = None) -> int:
    """The unlabelled batches of one source or sender that came before there was a task to score them with."""
    return session.scalar(select(func.count()).where(_waits_for_a_task(), _own(source, sender))) or 0


def _waits_for_a_task() -> ColumnElement[bool]:
    return (BatchRow.state == "unsure") & BatchRow.labelled.is_(False)


def _own(source: str, sender: str | None) -> ColumnElement[bool]:
    return (BatchRow.source == source) & BatchRow.sender.is_not_distinct_from(sender)


def count_by_state(session: Session) -> dict[str, int]:
    """The number of batches in each state, the empty states too."""
    query = select(BatchRow.state, func.count().label("total")).group_by(BatchRow.state)
    return dict.fromkeys(STATES, 0) | {row.state: row.total for row in session.execute(query)}


def _new_row(**columns: Any) -> BatchRow:
    now = utc_now()
    return BatchRow(**columns, created_at=now, updated_at=now)


def _change_committed(session: Session, batch_id: int, values: dict[str, Any], step: str) -> None:
    change = update(BatchRow).where(BatchRow.id == batch_id, BatchRow.state == "committed")
    if _changed(session, change.values(**values, updated_at=utc_now())) != 1:
        row = session.get(BatchRow, batch_id)
        raise LedgerConflict(f"batch {batch_id} is {'missing' if row is None else row.state}: it cannot {step}")


def _changed(session: Session, change: Any) -> int:
    return cast(CursorResult[Any], session.execute(change)).rowcount


def _code(outcome: Outcome) -> str | None:
    """A rejection's reason begins with its code."""
    return (outcome.reason or "").partition(":")[0][:32] if outcome.state == "quarantined" else None


def _why_duplicate(first: BatchRow) -> str:
    tail = f" (quarantined: {first.reason})" if first.state == "quarantined" else ""
    return f"duplicate of batch {first.id}{tail}"
