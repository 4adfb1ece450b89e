"""What the socket can ask, answered from the served snapshot and the store: `serving.engine.Engine`."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from storage import decisions, ledger, tasks
from storage.db import Database
from storage.models import BatchRow, DecisionRow, TaskRow
from streams.batch import BatchRejected
from supsupd import __version__
from supsupd.config import Settings
from supsupd.intake import Intake, QueueFull
from supsupd.learning.normalise import ShapeMismatch
from supsupd.learning.predictor import Predictor
from supsupd.serving.engine import BadInput, BatchRefused, EngineError, NoModelYet, Prediction, TaskUnknown
from supsupd.worker import Worker

SHOWN_DECISIONS = 100


class Service:
    """Read by many threads at once; every answer comes from one snapshot.

    Args:
        settings: the configuration.
        database: the store.
        worker: whose predictor answers.
        intake: where batches are submitted to.
    """

    def __init__(self, settings: Settings, database: Database, worker: Worker, intake: Intake) -> None:
        self._settings = settings
        self._database = database
        self._worker = worker
        self._intake = intake
        self._started = time.monotonic()
        self.draining = False

    def ready(self) -> bool:
        predictor = self._worker.predictor
        return not self.draining and predictor is not None and bool(predictor.tasks)

    def predict(self, x: np.ndarray, task: int | None, per_sample: bool) -> Prediction:
        predictor = self._predictor()
        place = None
        if task is not None and (place := predictor.place_of(task)) is None:
            raise TaskUnknown(task)
        try:
            answer = predictor.predict(x, place, per_sample)
        except ShapeMismatch as error:
            raise BadInput(f"shape_mismatch: {error}") from None
        return Prediction(
            labels=predictor.classes.decode(answer.predicted),  # type: ignore[arg-type]  # one kind throughout
            probabilities=answer.probabilities,
            task=answer.task,
            entropy=answer.entropy,
            known=answer.known,
            classes=list(predictor.classes.labels),  # type: ignore[arg-type]
        )

    def _predictor(self) -> Predictor:
        predictor = self._worker.predictor
        if predictor is None or not predictor.tasks:
            raise NoModelYet
        return predictor

    def model(self) -> dict[str, Any] | None:
        predictor = self._worker.predictor
        if predictor is None:
            return None
        return {
            "input_shape": list(predictor.normaliser.input_shape),
            "classes": list(predictor.classes.labels),
            "label_kind": predictor.classes.kind,
        }

    def status(self) -> dict[str, Any]:
        # In this order: what a pass has staged is counted, and what a counted batch sets off is waited for.
        sources = [
            {"name": p.source.name, "passes": p.passes, "pending": p.source.pending()} for p in self._intake.progress
        ]
        with self._database.read() as session:
            counts = ledger.count_by_state(session)
        busy, predictor = self._worker.busy, self._worker.predictor
        queue = counts["staged"] + counts["training"]
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "state_dir": str(self._settings.state),
            "socket": str(self._settings.socket),
            "watch": [str(folder) for folder in self._settings.watch],
            "device": str(self._worker.device),
            "network": self._network(),
            "tasks": len(predictor.tasks) if predictor is not None else 0,
            "batches": counts,
            "learned_batches": self._worker.learned,
            "sources": sources,
            "queue": queue,
            "settled": not (queue or busy) and all(source["passes"] and not source["pending"] for source in sources),
        }

    def _network(self) -> dict[str, Any] | None:
        predictor = self._worker.predictor
        if predictor is None:
            return None
        network = predictor.scorer.network
        return {
            "widths": list(network.architecture.widths),
            "seed": network.seed,
            "sha256": network.sha256,
            "normalisation": predictor.normaliser.rule,
            "classes": list(predictor.classes.labels),
            "mask_bytes": network.architecture.mask_bytes,
        }

    def tasks(self) -> list[dict[str, Any]]:
        with self._database.read() as session:
            return [_task(row) for row in tasks.list_tasks(session)]

    def task(self, task_id: int) -> dict[str, Any] | None:
        with self._database.read() as session:
            row = tasks.get_task(session, task_id)
            if row is None:
                return None
            shown = decisions.list_for_task(session, task_id, SHOWN_DECISIONS)
            batches = {d.batch_id: ledger.load_batch(session, d.batch_id) for d in shown}
            return _task(row) | {"decisions": [_decision(d, batches[d.batch_id]) for d in shown]}

    def rename(self, task_id: int, name: str) -> dict[str, Any]:
        try:
            with self._database.write() as session:
                tasks.rename(session, task_id, name)
        except tasks.TaskUnknown:
            raise TaskUnknown(task_id) from None
        except tasks.NameInvalid as error:
            raise BadInput(str(error)) from None
        except tasks.NameTaken as error:
            raise EngineError(str(error), 409) from None
        renamed = self.task(task_id)
        assert renamed is not None
        renamed.pop("decisions")
        return renamed

    def batches(self, state: str | None, limit: int | None) -> list[dict[str, Any]]:
        with self._database.read() as session:
            return [_batch(row) for row in ledger.list_batches(session, state, limit)]

    def submit(self, name: str, payload: bytes) -> dict[str, Any]:
        if self.draining:
            raise BatchRefused("shutting down", 503)
        if name.startswith("/") or ".." in name.split("/"):
            raise BadInput(f"bad_request: name {name!r} is not a relative path without '..'")
        try:
            staged, sha256 = self._intake.submit(name, payload)
        except BatchRejected as rejection:
            raise BatchRefused(str(rejection)) from None
        except QueueFull as full:
            raise BatchRefused(str(full), 503) from None
        return {"batch": staged.id, "state": "duplicate" if staged.duplicate else "staged", "sha256": sha256}

    def scan(self) -> dict[str, Any]:
        return {"pass": self._intake.request_scan()}


def _task(row: TaskRow) -> dict[str, Any]:
    return {
        "task": row.id,
        "name": row.name,
        "version": row.version,
        "batches": row.batches,
        "samples": row.samples,
        "accuracy": row.accuracy,
        "entropy": row.entropy,
        "density": row.density,
        "bytes": row.bytes,
        "created": row.created_at.isoformat(timespec="seconds"),
        "last_seen": row.last_seen_at.isoformat(timespec="seconds"),
    }


def _decision(row: DecisionRow, batch: BatchRow) -> dict[str, Any]:
    return {
        "batch": row.batch_id,
        "name": batch.name,
        "decision": row.kind,
        "at": row.created_at.isoformat(timespec="seconds"),
        "reason": batch.reason,
        "evidence": row.evidence,
    }


def _batch(row: BatchRow) -> dict[str, Any]:
    return {
        "batch": row.id,
        "name": row.name,
        "sha256": row.sha256,
        "state": row.state,
        "task": row.task_id,
        "decision": row.decision,
        "reason": row.reason,
        "samples": row.samples,
        "labelled": row.labelled,
        "source": row.source,
    }
