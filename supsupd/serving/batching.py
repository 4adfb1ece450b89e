"""Dynamic batching: questions that come while others are being answered are answered together."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from supsupd import tracing
from supsupd.config import ServingSettings
from supsupd.serving.engine import DeadlineExceeded, Engine, EngineError, Prediction, Question, TooManyQueries

Reason = Literal["idle", "full", "window"]
"""Why a pass began: there was room for it and no window is set; it is as large as may be; the window was over."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Questions that are answered together; `number` counts from 1."""

    number: int
    rows: int
    began: float  # monotonic


@dataclass(slots=True)
class _Waiting:
    question: Question
    rows: int
    deadline: float  # monotonic
    since: float
    answer: asyncio.Future[Prediction | EngineError]
    taken: Callable[[Pass], None] | None = None
    trace: Any = None
    steps: Iterator[Prediction | EngineError | None] | None = None
    """Of a large question that has been begun."""


@dataclass(slots=True)
class Passes:
    """What has been dispatched, for whoever counts it."""

    count: int = 0
    by_reason: Counter[Reason] = field(default_factory=Counter)
    requests: int = 0
    rows: int = 0
    queued_seconds: float = 0.0


class Batcher:
    """A bounded queue before `Engine.predict`. All methods belong to one event loop.

    What comes within one turn of the loop is answered in one pass; what comes while as many passes run as may, in the
    next one. A pass that waits for nothing is run at once, in the loop's own thread: handing it over would take longer.

    A large question is answered in steps, in turn with other large ones. Small ones wait for a step of it at most, and
    where several passes may run, not even for that.

    Args:
        engine: answers.
        limits: gives the settings in force.
    """

    def __init__(self, engine: Engine, limits: Callable[[], ServingSettings]) -> None:
        self._engine = engine
        self._limits = limits
        self._waiting: deque[_Waiting] = deque()
        self._large: deque[_Waiting] = deque()  # those that are answered in steps, and have none running
        self._rows = 0
        self._running = 0
        self._stepping = 0  # how many of these are steps
        self._was_step = False  # what began last
        self._wake: asyncio.Handle | None = None
        self._threads = ThreadPoolExecutor(64, thread_name_prefix="predict")
        self.passes = Passes()

    @property
    def queued(self) -> int:
        """How many questions wait."""
        return len(self._waiting) + sum(waiting.steps is None for waiting in self._large)

    @property
    def running(self) -> int:
        """How many passes run in threads of their own."""
        return self._running

    def oldest_seconds(self) -> float:
        """How long the query that waits longest has waited; 0 where none does. Any thread may ask."""
        try:
            since = [queue[0].since for queue in (self._waiting, self._large) if queue and queue[0].steps is None]
        except IndexError:  # it has just begun
            return 0.0
        return time.monotonic() - min(since) if since else 0.0

    async def ask(
        self, question: Question, timeout: float | None = None, taken: Callable[[Pass], None] | None = None
    ) -> Prediction | EngineError:
        """The answer; a refusal is one too. taken: told of the pass that answers, when it begins."""
        limits = self._limits()
        if (queued := self.queued) >= limits.queue_requests:
            return TooManyQueries(queued)
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        patience = limits.query_seconds if timeout is None else min(timeout, limits.query_seconds)
        rows, trace = len(question.x), tracing.current()
        waiting = _Waiting(question, rows, now + patience, now, loop.create_future(), taken, trace)
        if rows > limits.batch_rows and not self._engine.is_light([question]):
            self._large.append(waiting)
        else:
            self._waiting.append(waiting)
            self._rows += waiting.rows
        self._plan(loop, limits)
        return await waiting.answer

    def close(self) -> None:
        """Lets the threads go; what runs is not waited for."""
        self._threads.shutdown(wait=False)

    # -- what follows runs in the loop, between two requests --------------------------------------------------------

    def _plan(self, loop: asyncio.AbstractEventLoop, limits: ServingSettings) -> None:
        """Arranges the next pass, unless one is arranged or what runs will arrange it."""
        self._plan_steps(loop, limits)
        if not self._waiting or self._running >= limits.parallel:
            return
        window = limits.batch_window_ms / 1000
        is_full = self._rows >= limits.batch_rows
        if self._wake is not None:
            if not (is_full and window):
                return
            self._wake.cancel()
        if is_full or not window:
            # The next turn of the loop: what else has come by now is read first.
            self._wake = loop.call_soon(self._dispatch, loop, "full" if is_full and window else None)
        else:
            over = max(0.0, self._waiting[0].since + window - time.monotonic())
            self._wake = loop.call_later(over, self._dispatch, loop, "window")

    def _plan_steps(self, loop: asyncio.AbstractEventLoop, limits: ServingSettings) -> None:
        """Begins steps of large questions; they leave room for a pass of small ones, or take turns with them."""
        while self._large and self._running < limits.parallel and self._stepping < max(1, limits.parallel - 1):
            if limits.parallel == 1 and self._waiting and self._was_step:
                return
            waiting = self._large.popleft()
            if waiting.answer.done():  # who asked is gone
                continue
            if waiting.steps is None:
                if not self._begin([waiting]):
                    continue
                self.passes.by_reason["full"] += 1
            self._running += 1
            self._stepping += 1
            self._was_step = True
            step = loop.run_in_executor(self._threads, self._step, waiting)
            step.add_done_callback(lambda done, waiting=waiting: self._stepped(loop, waiting, done))  # type: ignore[misc]

    def _step(self, waiting: _Waiting) -> Prediction | EngineError | Exception | None:
        try:
            if waiting.steps is None:
                waiting.steps = self._engine.predict_in_steps(waiting.question)
            with tracing.span("pass", [waiting.trace], requests=1):
                return next(waiting.steps)
        except Exception as error:  # noqa: BLE001 - as below
            return error

    def _stepped(
        self,
        loop: asyncio.AbstractEventLoop,
        waiting: _Waiting,
        done: asyncio.Future[Prediction | EngineError | Exception | None],
    ) -> None:
        self._running -= 1
        self._stepping -= 1
        answer = done.result()
        if answer is None:
            self._large.append(waiting)
        elif isinstance(answer, Exception) and not isinstance(answer, EngineError):
            self._finish([waiting], answer)
        else:
            self._finish([waiting], [answer])
        self._plan(loop, self._limits())

    def _dispatch(self, loop: asyncio.AbstractEventLoop, reason: Reason | None) -> None:
        self._wake = None
        limits = self._limits()
        taken = self._take(limits.batch_rows)
        if taken:
            self._was_step = False
            is_full = bool(self._waiting) or sum(w.rows for w in taken) >= limits.batch_rows
            self.passes.by_reason[reason or ("full" if is_full else "idle")] += 1
            questions = [waiting.question for waiting in taken]
            traces = [waiting.trace for waiting in taken]
            if self._engine.is_light(questions):
                self._finish(taken, self._answer(questions, traces))
            else:
                self._running += 1
                running = loop.run_in_executor(self._threads, self._answer, questions, traces)
                running.add_done_callback(lambda done: self._finished(loop, taken, done))
        self._plan(loop, limits)

    def _take(self, most: int) -> list[_Waiting]:
        """The oldest questions, up to so many rows or the first alone, but for late ones."""
        rows = 0
        taken: list[_Waiting] = []
        while self._waiting and (not taken or rows + self._waiting[0].rows <= most):
            waiting = self._waiting.popleft()
            self._rows -= waiting.rows
            if not waiting.answer.done():  # else who asked is gone
                rows += waiting.rows
                taken.append(waiting)
        return self._begin(taken)

    def _begin(self, chosen: list[_Waiting]) -> list[_Waiting]:
        """Counts a pass of those who still wait, and tells them of it; late ones are answered so."""
        now = time.monotonic()
        taken: list[_Waiting] = []
        for waiting in chosen:
            if waiting.deadline < now:
                waiting.answer.set_result(DeadlineExceeded())
                continue
            taken.append(waiting)
            self.passes.queued_seconds += now - waiting.since
        rows = sum(waiting.rows for waiting in taken)
        self.passes.count += bool(taken)
        told = Pass(self.passes.count, rows, now)
        for waiting in taken:
            if waiting.taken is not None:
                waiting.taken(told)
        self.passes.requests += len(taken)
        self.passes.rows += rows
        return taken

    def _answer(self, questions: list[Question], traces: list[Any]) -> list[Prediction | EngineError] | Exception:
        try:
            with tracing.span("pass", traces, requests=len(questions)):
                return self._engine.predict(questions)
        except Exception as error:  # noqa: BLE001 - a bug: everyone who asked is told, as for one request alone
            return error

    def _finished(
        self,
        loop: asyncio.AbstractEventLoop,
        taken: list[_Waiting],
        done: asyncio.Future[list[Prediction | EngineError] | Exception],
    ) -> None:
        self._running -= 1
        self._finish(taken, done.result())
        self._plan(loop, self._limits())

    def _finish(self, taken: list[_Waiting], answers: list[Prediction | EngineError] | Exception) -> None:
        for place, waiting in enumerate(taken):
            if waiting.answer.done():
                continue
            if isinstance(answers, Exception):
                waiting.answer.set_exception(answers)
            else:
                waiting.answer.set_result(answers[place])
