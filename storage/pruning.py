"""Old mask versions and bytes that nothing needs any more, removed on an operator's order alone."""

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import delete, func, select, tuple_
from sqlalchemy.orm import Session

from storage import ledger, masks
from storage.backend import Target
from storage.db import PATIENCE, Database
from storage.models import PRUNING, MaskVersionRow, ReservoirPatternRow, TrainingStateRow
from storage.spool import Spool
from storage.sqlite import SqliteBackend

AT_A_TIME = 200


@dataclass(frozen=True, slots=True)
class Pruned:
    """What went, or would go: (task, version) with the stored bytes of each, and the hashes of spooled bytes."""

    versions: dict[tuple[int, int], int]
    payloads: list[str]


def prune(target: Target, spool: Path, keep: int, *, dry: bool = False, patience: float = PATIENCE) -> Pruned:
    """Remove all but the newest `keep` versions of each task's mask, and bytes in the spool that no batch needs.

    Never one that is a task's newest, that the reservoir holds, or that a training state belongs to, and none of a
    task whose newest is damaged: an older one may be the last that is sound. The caller holds
    the state's lock: a running daemon reads old versions whenever it likes. `dry`: only say what would go.
    Raises ValueError for a `keep` below 1, SchemaMismatch, StoreError, OSError.
    """
    if keep < 1:
        raise ValueError("a task keeps one version at least")
    store = Database.open(target, patience)
    try:
        with store.read() as session:
            versions = find_old(session, keep)
            damaged = {task_id for task_id, _ in versions if masks.is_corrupt(session, task_id)}
            versions = {place: size for place, size in versions.items() if place[0] not in damaged}
            needed = ledger.list_spooled(session)
        folder = Spool(spool) if spool.is_dir() else None
        payloads = sorted(folder.names() - needed) if folder is not None else []
        if not dry:
            with store.write() as session:
                _remove(session, list(versions))
            for sha256 in payloads if folder is not None else ():
                folder.remove(sha256)  # type: ignore[union-attr]  # there are none without a folder
    finally:
        store.close()
    if versions and not dry and isinstance(store.backend, SqliteBackend):
        store.backend.settle(compact=True)  # PostgreSQL does so by itself
    return Pruned(versions, payloads)


def find_old(session: Session, keep: int) -> dict[tuple[int, int], int]:
    """The versions that are older than the newest `keep` of their task and that nothing holds, with their bytes."""
    row = MaskVersionRow
    age = func.row_number().over(partition_by=row.task_id, order_by=row.version.desc()).label("age")
    size = (func.length(row.bits) + func.coalesce(func.length(row.statistics), 0)).label("size")
    ranked = select(row.task_id, row.version, age, size).subquery()
    held = {(pattern.task_id, pattern.version) for pattern in session.scalars(select(ReservoirPatternRow))}
    states = select(TrainingStateRow.task_id, TrainingStateRow.version)
    held |= {(task_id, version) for task_id, version in session.execute(states)}
    query = select(ranked.c.task_id, ranked.c.version, ranked.c.size).where(ranked.c.age > keep)
    found = session.execute(query.order_by(ranked.c.task_id, ranked.c.version))
    return {(task_id, version): size for task_id, version, size in found if (task_id, version) not in held}


def _remove(session: Session, places: list[tuple[int, int]]) -> None:
    for start in range(0, len(places), AT_A_TIME):
        part = tuple_(MaskVersionRow.task_id, MaskVersionRow.version).in_(places[start : start + AT_A_TIME])
        session.execute(delete(MaskVersionRow).where(part), execution_options={PRUNING: True})
