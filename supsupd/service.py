"""What the socket can ask, answered from the served snapshot and the store: `serving.engine.Engine`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from storage import decisions, ledger, masks, tasks
from storage.db import Database, StoreError
from storage.ledger import LedgerConflict
from storage.masks import MaskCorrupt
from storage.models import TaskRow
from streams.batch import BatchRejected
from supsupd import __version__, attractors, operations
from supsupd.choices import Method, Objective
from supsupd.commands import CommandRefused
from supsupd.config import Settings
from supsupd.intake import Intake, QueueFull
from supsupd.learning.inference import MethodUnavailable, ObjectiveUnavailable
from supsupd.learning.normalise import ShapeMismatch
from supsupd.learning.predictor import Predictor
from supsupd.serving.engine import BadInput, BatchRefused, EngineError, NoModelYet, Prediction, TaskUnknown
from supsupd.story import tell
from supsupd.views import show_batch, show_decision, show_task, show_version
from supsupd.worker import Worker

if TYPE_CHECKING:
    from storage.db import Session

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

    def predict(
        self,
        x: np.ndarray,
        task: int | str | None,
        per_sample: bool,
        method: Method | None = None,
        objective: Objective | None = None,
    ) -> Prediction:
        predictor = self._worker.predictor
        if predictor is None:
            raise NoModelYet
        place = None if task is None else self._place(predictor, task)
        if not predictor.tasks:
            raise self._nothing_to_predict_with()
        if place is None and self._settings.recognition.scenario == "GG":
            raise BadInput("no_task: in scenario GG every query names its task: its key, name or id")
        try:
            answer = predictor.predict(x, place, per_sample, method, objective)
        except ShapeMismatch as error:
            raise BadInput(f"shape_mismatch: {error}") from None
        except MethodUnavailable as error:
            raise BadInput(f"bad_method: {error}") from None
        except ObjectiveUnavailable as error:
            raise BadInput(f"bad_objective: {error}") from None
        return Prediction(
            labels=predictor.classes.decode(answer.predicted),  # type: ignore[arg-type]  # one kind throughout
            probabilities=answer.probabilities,
            task=answer.task,
            entropy=answer.entropy,
            known=answer.known,
            classes=list(predictor.classes.labels),  # type: ignore[arg-type]
        )

    def is_light(self, rows: int, task: int | str | None) -> bool:
        predictor = self._worker.predictor
        if predictor is None or not isinstance(task, int):  # a key or a name is looked up in the store
            return False
        place = predictor.place_of(task)
        return place is not None and predictor.scorer.is_light(rows, predictor.tasks[place].mask)

    def _place(self, predictor: Predictor, task: int | str) -> int:
        """Where the mask of a given task is; the store is only asked about what is not a served task's id."""
        if isinstance(task, int) and (place := predictor.place_of(task)) is not None:
            return place
        with self._database.read() as session:
            row = _resolve(session, task)
        if row.retired_at is not None:
            raise EngineError(f"task {row.id} is retired", 404)
        if (place := predictor.place_of(row.id)) is None:  # found this moment
            raise TaskUnknown(task)
        return place

    def _nothing_to_predict_with(self) -> NoModelYet:
        with self._database.read() as session:
            retired = tasks.count_retired(session)
        return NoModelYet("every task is retired") if retired else NoModelYet()

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
            "scenario": self._settings.recognition.scenario,
            "network": self._network(),
            "tasks": len(predictor.tasks) if predictor is not None else 0,
            "masks_in_memory": self._worker.masks_in_memory,
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

    def tasks(self, retired: bool = False) -> list[dict[str, Any]]:
        with self._database.read() as session:
            return [show_task(row) for row in tasks.list_tasks(session, retired)]

    def task(self, reference: int | str) -> dict[str, Any]:
        with self._database.read() as session:
            row = _resolve(session, reference)
            merged = tasks.list_merged(session, row.id)
            shown = decisions.list_for_task(session, [row.id, *(other.id for other in merged)], SHOWN_DECISIONS)
            batches = {d.batch_id: ledger.load_batch(session, d.batch_id) for d in shown}
            return show_task(row) | {
                "merged": [show_task(other) for other in merged],
                "decisions": [show_decision(d, batches[d.batch_id]) for d in shown],
            }

    def rename(self, reference: int | str, name: str) -> dict[str, Any]:
        with _translated(), self._database.write() as session:
            row = tasks.resolve(session, reference, follow=False)
            tasks.rename(session, row.id, name)
            return show_task(row)

    def retire(self, reference: int | str) -> dict[str, Any]:
        return self._operate(reference, operations.retire)

    def reopen(self, reference: int | str) -> dict[str, Any]:
        return self._operate(reference, operations.reopen)

    def merge(self, reference: int | str, other: int | str) -> dict[str, Any]:
        with self._database.read() as session:
            other_id = _resolve(session, other, follow=False).id
        return self._operate(reference, operations.merge, other_id)

    def split(self, reference: int | str, batch_id: int) -> dict[str, Any]:
        return self._operate(reference, operations.split, batch_id)

    def _operate(self, reference: int | str, operation: Callable[..., int | None], *given: int) -> dict[str, Any]:
        """Runs an operation on a task in the learning thread; the task that it gives, or was about, afterwards."""
        with self._database.read() as session:
            task_id = _resolve(session, reference, follow=False).id
        with _translated():
            made = self._worker.call(partial(operation, self._worker, task_id, *given))
        with self._database.read() as session:
            return show_task(tasks.load_task(session, made or task_id))

    def why(self, batch_id: int) -> dict[str, Any]:
        with self._database.read() as session:
            try:
                row = ledger.load_batch(session, batch_id)
            except ledger.BatchUnknown as error:
                raise EngineError(str(error), 404) from None
            found = [show_decision(d, row) for d in decisions.list_for_batch(session, batch_id)]
            makers = {batch_id, *(d["evidence"].get("decided_with", batch_id) for d in found)}
            made = [show_version(version) for version in masks.list_made_by(session, makers)]
        story = {"batch": show_batch(row), "decisions": found, "versions": made}
        return story | {"words": tell(story)}

    def batches(self, state: str | None, limit: int | None) -> list[dict[str, Any]]:
        with self._database.read() as session:
            return [show_batch(row) for row in ledger.list_batches(session, state, limit)]

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

    def reservoir(self) -> dict[str, Any]:
        predictor = self._worker.predictor
        if predictor is None:
            raise NoModelYet
        return attractors.describe(predictor)

    def scan(self) -> dict[str, Any]:
        return {"pass": self._intake.request_scan()}


def _resolve(session: Session, reference: int | str, follow: bool = True) -> TaskRow:
    """Raises EngineError."""
    with _translated():
        return tasks.resolve(session, reference, follow)


@contextmanager
def _translated() -> Iterator[None]:
    """What the store and the learning thread refuse, in the socket's words."""
    try:
        yield
    except tasks.TaskUnknown as error:
        raise EngineError(str(error), 404) from None
    except tasks.NameInvalid as error:
        raise BadInput(str(error)) from None
    except (tasks.NameTaken, tasks.TaskAmbiguous, tasks.TaskConflict, LedgerConflict) as error:
        raise EngineError(str(error), 409) from None
    except (CommandRefused, StoreError) as error:
        raise EngineError(str(error), 503) from None
    except MaskCorrupt as error:
        raise EngineError(str(error), 500) from None
