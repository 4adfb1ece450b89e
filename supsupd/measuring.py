"""The daemon in figures, for whoever watches it: `serving.engine.Measures`."""

from __future__ import annotations

import threading
from collections import Counter

import structlog

from storage import decisions, ledger
from storage.db import Database, StoreError
from storage.models import KINDS
from storage.spool import Spool
from supsupd.serving.engine import Measures, Stored
from supsupd.worker import Worker

log = structlog.get_logger("supsupd.service")


class Measuring:
    """Looks at memory and the store. Any thread may ask.

    Args:
        database, spool: the store.
        worker: what was learned.
    """

    def __init__(self, database: Database, spool: Spool, worker: Worker) -> None:
        self._database = database
        self._spool = spool
        self._worker = worker
        self._lock = threading.Lock()
        self._decided: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        with database.read() as session:
            self._seen = decisions.newest(session)

    def look(self, ready: bool, problems: int) -> Measures:
        """All figures."""
        predictor, memory = self._worker.predictor, self._worker.masks_in_memory
        return Measures(
            ready=ready,
            tasks=len(predictor.tasks) if predictor is not None else 0,
            masks_in_memory=memory["count"],
            masks_in_memory_bytes=memory["bytes"],
            learned=self._worker.learned,
            training=self._worker.training,
            problems=problems,
            stored=self._look_into_store(),
        )

    def _look_into_store(self) -> Stored | None:
        try:
            with self._lock, self._database.read() as session:
                # Rows are written once and numbered as they come: only new ones have to be counted.
                new, self._seen = decisions.count_since(session, self._seen)
                self._decided.update(new)
                return Stored(
                    batches=ledger.count_by_state(session),
                    decisions=dict(self._decided),
                    store_bytes=self._database.size(session),
                    spool_bytes=self._spool.size(),
                )
        except (StoreError, OSError) as error:  # the figures that there are matter most now
            log.warning("store_not_measured", reason=str(error))
            return None
