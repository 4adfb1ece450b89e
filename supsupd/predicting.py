"""Queries, answered from the served snapshot: the part of the service that learns nothing and rarely asks the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from storage import tasks
from storage.db import Database
from storage.masks import MaskCorrupt
from supsupd.choices import Scenario
from supsupd.learning.inference import MethodUnavailable, ObjectiveUnavailable
from supsupd.learning.joint import Refused, answer_in_slices, answer_together
from supsupd.learning.normalise import ShapeMismatch
from supsupd.learning.predictor import Predictor
from supsupd.learning.queries import Answer, Query
from supsupd.serving.engine import BadInput, EngineError, NoModelYet, Prediction, Question, TaskUnknown
from supsupd.translation import resolve
from supsupd.worker import Worker

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")


class Predicting:
    """Used by many threads at once; every answer comes from one snapshot.

    Args:
        scenario: whether queries have to name their task.
        database: the store, where keys and names of tasks are looked up.
        worker: whose predictor answers.
    """

    def __init__(self, scenario: Scenario, database: Database, worker: Worker) -> None:
        self._scenario = scenario
        self._database = database
        self._worker = worker

    def ready(self) -> bool:
        predictor = self._worker.predictor
        return predictor is not None and bool(predictor.tasks)

    def predict(self, questions: Sequence[Question]) -> list[Prediction | EngineError]:
        try:
            return self.answered(lambda predictor: self._predict(predictor, questions))
        except NoModelYet as error:
            return [error] * len(questions)

    def predict_in_steps(self, question: Question) -> Iterator[Prediction | EngineError | None]:
        predictor = self._worker.predictor
        while predictor is not None:
            try:
                yield from self._steps(predictor, question)
                return
            except MaskCorrupt as error:
                predictor = self._worker.predictor_without(error, predictor)
        yield NoModelYet()

    def _steps(self, predictor: Predictor, question: Question) -> Iterator[Prediction | EngineError | None]:
        """The answer from this snapshot. Raises MaskCorrupt."""
        try:
            query = self._query(predictor, question)
        except EngineError as error:
            yield error
            return
        for answer in answer_in_slices(predictor, question.x, query):
            if isinstance(answer, Answer):
                yield _prediction(predictor, answer)
            else:
                yield None if answer is None else _refusal(answer)

    def answered(self, ask: Callable[[Predictor], T]) -> T:
        """What the predictor says; where it comes upon a damaged mask, what it says without that. Raises NoModelYet."""
        predictor = self._worker.predictor
        while predictor is not None:
            try:
                return ask(predictor)
            except MaskCorrupt as error:
                predictor = self._worker.predictor_without(error, predictor)
        raise NoModelYet

    def _predict(self, predictor: Predictor, questions: Sequence[Question]) -> list[Prediction | EngineError]:
        """The answers from this snapshot. Raises MaskCorrupt."""
        asked: dict[int, tuple[np.ndarray, Query]] = {}
        answers: dict[int, Prediction | EngineError] = {}
        for index, question in enumerate(questions):
            try:
                asked[index] = (question.x, self._query(predictor, question))
            except EngineError as error:
                answers[index] = error
        for index, answer in zip(asked, answer_together(predictor, list(asked.values())), strict=True):
            answers[index] = _prediction(predictor, answer) if isinstance(answer, Answer) else _refusal(answer)
        return [answers[index] for index in range(len(questions))]

    def _query(self, predictor: Predictor, question: Question) -> Query:
        """Raises EngineError."""
        place = None if question.task is None else self._place(predictor, question.task)
        if not predictor.tasks:
            raise self._nothing_to_predict_with()
        if place is None and self._scenario == "GG":
            raise BadInput("no_task: in scenario GG every query names its task: its key, name or id")
        try:
            return predictor.query(place, question.per_sample, question.method, question.objective)
        except ObjectiveUnavailable as error:
            raise _refusal(error) from None

    def is_light(self, questions: Sequence[Question]) -> bool:
        predictor = self._worker.predictor
        if predictor is None:
            return False
        asked = []
        for question in questions:
            place = None
            if question.task is not None:  # what is no id of a served task is looked up in the store
                place = predictor.place_of(question.task) if isinstance(question.task, int) else None
                if place is None:
                    return False
            method, objective = question.method or predictor.method, question.objective or predictor.objective
            asked.append((len(question.x), Query(place, question.per_sample, method, objective)))
        return predictor.is_light(asked)

    def _place(self, predictor: Predictor, task: int | str) -> int:
        """Where the mask of a given task is; the store is only asked about what is not a served task's id."""
        if isinstance(task, int) and (place := predictor.place_of(task)) is not None:
            return place
        with self._database.read() as session:
            row = resolve(session, task)
        if row.retired_at is not None:
            raise EngineError(f"task {row.id} is retired", 404)
        if (problem := self.damaged().get(row.id)) is not None:
            raise EngineError(f"mask_corrupt: {problem}", 503)
        if (place := predictor.place_of(row.id)) is None:  # found this moment
            raise TaskUnknown(task)
        return place

    def damaged(self) -> dict[int, str]:
        """What is wrong with the tasks that are out of service, by id."""
        engine = self._worker.engine
        return {} if engine is None else dict(engine.out_of_service)

    def _nothing_to_predict_with(self) -> EngineError:
        if damaged := self.damaged():
            return EngineError(f"mask_corrupt: {next(iter(damaged.values()))}", 503)
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

    def served_version(self, task: int) -> int | None:
        predictor = self._worker.predictor
        return None if predictor is None else predictor.version_of(task)


def _prediction(predictor: Predictor, answer: Answer) -> Prediction:
    return Prediction(
        labels=predictor.classes.decode(answer.predicted),  # type: ignore[arg-type]  # one kind throughout
        probabilities=answer.probabilities,
        task=answer.task,
        entropy=answer.entropy,
        known=answer.known,
        classes=list(predictor.classes.labels),  # type: ignore[arg-type]
        version=predictor.version_of(int(answer.task[0])) or 0,
    )


def _refusal(error: Refused) -> BadInput:
    """Why a query cannot be answered, in the socket's words."""
    codes = {MethodUnavailable: "bad_method", ShapeMismatch: "shape_mismatch"}
    code = next((code for kind, code in codes.items() if isinstance(error, kind)), "bad_objective")
    return BadInput(f"{code}: {error}")
