"""What the socket can ask, answered from the served snapshot and the store: `serving.engine.Engine`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from storage import decisions, ledger, masks, tasks
from storage.db import Database
from storage.models import TaskRow
from streams.batch import BatchRejected
from streams.formats import form_of_media_type, form_of_name, sniff
from streams.names import printable
from supsupd import __version__, attractors, logs, operations
from supsupd.config import Settings
from supsupd.health import Health
from supsupd.intake import Intake
from supsupd.measuring import Measuring
from supsupd.predicting import Predicting
from supsupd.serving.engine import (
    BatchRefused,
    EngineError,
    Measures,
    Prediction,
    Question,
    TaskModel,
    TaskUnknown,
)
from supsupd.staging import KeyReused, QueueFull
from supsupd.story import tell
from supsupd.translation import resolve, translated
from supsupd.views import (
    show_batch,
    show_damage,
    show_decision,
    show_gap,
    show_origin,
    show_rejected,
    show_stalled_log,
    show_suspended,
    show_task,
    show_version,
)
from supsupd.worker import Worker

if TYPE_CHECKING:
    pass

SHOWN_DECISIONS = 100

T = TypeVar("T")


class Service:
    """Read by many threads at once; every answer comes from one snapshot.

    Args:
        settings: the configuration.
        database: the store.
        worker: whose predictor answers.
        intake: where batches are submitted to.
        health: what keeps the daemon from working as it should.
    """

    def __init__(
        self, settings: Settings, database: Database, worker: Worker, intake: Intake, health: Health | None = None
    ) -> None:
        self._settings = settings
        self._database = database
        self._worker = worker
        self._intake = intake
        self._health = health or Health()
        self._predicting = Predicting(settings.recognition.scenario, database, worker)
        self._measuring = Measuring(database, worker.spool, worker)
        self._started = time.monotonic()
        self.draining = False

    def ready(self) -> bool:
        return self._predicting.ready()

    def predict(self, questions: Sequence[Question]) -> list[Prediction | EngineError]:
        return self._predicting.predict(questions)

    def predict_in_steps(self, question: Question) -> Iterator[Prediction | EngineError | None]:
        return self._predicting.predict_in_steps(question)

    def is_light(self, questions: Sequence[Question]) -> bool:
        return self._predicting.is_light(questions)

    def model(self) -> dict[str, Any] | None:
        return self._predicting.model()

    def served_version(self, task: int) -> int | None:
        return self._predicting.served_version(task)

    def task_models(self, task: int | None = None) -> list[TaskModel]:
        with self._database.read() as session:
            if task is None:
                rows, versions = tasks.list_tasks(session, retired=True), masks.list_all_versions(session)
            elif (row := tasks.get_task(session, task)) is None:
                raise TaskUnknown(task)
            else:
                rows, versions = [row], {task: masks.list_versions(session, task)}
        damaged = self._predicting.damaged()
        return [self._task_model(row, versions[row.id], damaged.get(row.id)) for row in rows]

    def _task_model(self, row: TaskRow, versions: list[int], problem: str | None) -> TaskModel:
        retired = row.retired_at is not None and row.merged_into is None
        if retired:
            problem = f"task {row.id} is retired"
        elif row.merged_into is not None:
            problem = f"task {row.id} was merged into task {row.merged_into}"
        served = None if problem else self.served_version(row.id)
        return TaskModel(row.id, tuple(versions), served, retired, problem)

    def measures(self) -> Measures:
        problems = len(self._problems(suspended=0))
        return self._measuring.look(self.ready() and not self.draining, problems)

    def status(self) -> dict[str, Any]:
        # In this order: what a pass has staged is counted, and what a counted batch sets off is waited for.
        sources = self.sources()
        with self._database.read() as session:
            counts = ledger.count_by_state(session)
        busy, predictor = self._worker.busy, self._worker.predictor
        queue = counts["staged"] + counts["training"]
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "state_dir": printable(str(self._settings.state)),
            "socket": printable(str(self._settings.socket)),
            "watch": [printable(str(folder)) for folder in self._settings.watch],
            "device": str(self._worker.device),
            "scenario": self._settings.recognition.scenario,
            "network": self._network(),
            "tasks": len(predictor.tasks) if predictor is not None else 0,
            "masks_in_memory": self._worker.masks_in_memory,
            "batches": counts,
            "learned_batches": self._worker.learned,
            "sources": sources,
            "problems": self._problems(counts["suspended"]),
            "queue": queue,
            "settled": not (queue or busy) and all(source["passes"] and not source["pending"] for source in sources),
        }

    def _problems(self, suspended: int) -> list[dict[str, Any]]:
        found = self._health.show() + [show_damage(*damaged) for damaged in self._predicting.damaged().items()]
        found += [show_suspended(suspended)] if suspended else []
        stalled = logs.problem()
        return found + ([show_stalled_log(stalled)] if stalled is not None else [])

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
            rows = tasks.list_tasks(session, retired)
        damaged = self._predicting.damaged()
        return [show_task(row, damaged.get(row.id)) for row in rows]

    def task(self, reference: int | str) -> dict[str, Any]:
        with self._database.read() as session:
            row = resolve(session, reference)
            merged = tasks.list_merged(session, row.id)
            shown = decisions.list_for_task(session, [row.id, *(other.id for other in merged)], SHOWN_DECISIONS)
            batches = {d.batch_id: ledger.load_batch(session, d.batch_id) for d in shown}
            return show_task(row, self._predicting.damaged().get(row.id)) | {
                "merged": [show_task(other) for other in merged],
                "decisions": [show_decision(d, batches[d.batch_id]) for d in shown],
            }

    def rename(self, reference: int | str, name: str) -> dict[str, Any]:
        with translated(), self._database.write() as session:
            row = tasks.resolve(session, reference, follow=False)
            tasks.rename(session, row.id, name)
            return show_task(row)

    def history(self, reference: int | str) -> list[dict[str, Any]]:
        with self._database.read() as session:
            origins = masks.list_history(session, resolve(session, reference, follow=False).id)
        predictor = self._worker.predictor
        served = {task.task_id: task.version for task in predictor.tasks} if predictor is not None else {}
        return [show_origin(origin, served.get(origin.task_id) == origin.version) for origin in origins]

    def retire(self, reference: int | str, by: str | None = None) -> dict[str, Any]:
        return self._operate(reference, operations.retire, by=by)

    def reopen(self, reference: int | str, by: str | None = None) -> dict[str, Any]:
        return self._operate(reference, operations.reopen, by=by)

    def merge(self, reference: int | str, other: int | str, by: str | None = None) -> dict[str, Any]:
        with self._database.read() as session:
            other_id = resolve(session, other, follow=False).id
        return self._operate(reference, operations.merge, other_id, by=by)

    def split(self, reference: int | str, batch_id: int, by: str | None = None) -> dict[str, Any]:
        return self._operate(reference, operations.split, batch_id, by=by)

    def rollback(self, reference: int | str, version: int, by: str | None = None) -> dict[str, Any]:
        return self._operate(reference, operations.rollback, version, by=by)

    def _operate(
        self, reference: int | str, operation: Callable[..., int | None], *given: int, by: str | None
    ) -> dict[str, Any]:
        """Runs an operation on a task in the learning thread; the task that it gives, or was about, afterwards."""
        with self._database.read() as session:
            task_id = resolve(session, reference, follow=False).id
        with translated():
            made = self._worker.call(partial(operation, self._worker, task_id, *given, by=by))
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

    def batches(self, state: str | None, limit: int | None, after: int | None = None) -> list[dict[str, Any]]:
        with self._database.read() as session:
            states = () if state is None else (state,)
            return [show_batch(row) for row in ledger.list_batches(session, *states, limit=limit, after=after)]

    def batch(self, reference: int | str) -> dict[str, Any]:
        with translated(), self._database.read() as session:
            return show_batch(ledger.find_batch(session, reference))

    def rejected(self, limit: int | None, after: int | None = None) -> list[dict[str, Any]]:
        with self._database.read() as session:
            rows = ledger.list_batches(session, *ledger.REJECTED, limit=limit, after=after)
            return [show_rejected(row) for row in rows]

    def retry(self, batch_id: int) -> dict[str, Any]:
        try:
            with translated():
                new = self._intake.staging.retry(batch_id)
        except BatchRejected as rejection:
            raise BatchRefused(str(rejection), 409) from None
        self._worker.notify()
        return self.batch(new)

    def drop(self, batch_id: int) -> dict[str, Any]:
        with translated():
            if not self._intake.staging.drop(batch_id):
                self._worker.drop(batch_id)
        return self.batch(batch_id)

    def sources(self) -> list[dict[str, Any]]:
        problems = {problem["who"]: problem["text"] for problem in self._health.show()}
        return [
            {"name": name, "passes": p.passes, "pending": p.source.pending(), "problem": problems.get(name)}
            for p in self._intake.progress
            for name in [p.source.name]
        ]

    def accept_gap(self, source: str) -> dict[str, Any]:
        with translated():
            return show_gap(self._intake.accept_gap(source))

    def submit(self, name: str, payload: bytes, media_type: str | None, key: str | None, sender: str) -> dict[str, Any]:
        if self.draining:
            raise BatchRefused("shutting down", 503)
        form = form_of_media_type(media_type or "") or form_of_name(name) or sniff(payload) or "npz"
        try:
            with translated():
                staged, sha256 = self._intake.staging.submit(name, form, payload, key, sender)
        except BatchRejected as rejection:
            raise BatchRefused(str(rejection)) from None
        except KeyReused as reused:
            raise BatchRefused(str(reused), 409) from None
        except (QueueFull, OSError) as error:
            raise BatchRefused(str(error), 503) from None
        self._worker.notify()
        state = "duplicate" if staged.duplicate else self.batch(staged.id)["state"]
        return {"batch": staged.first or staged.id, "state": state, "sha256": sha256}

    def reservoir(self) -> dict[str, Any]:
        return self._predicting.answered(attractors.describe)

    def scan(self) -> dict[str, Any]:
        return {"pass": self._intake.request_scan()}
