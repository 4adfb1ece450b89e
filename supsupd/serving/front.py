"""What HTTP and gRPC share: the engine, the limits, the way of a question through the queue, and what is counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

from supsupd.config import ServingSettings
from supsupd.serving.batching import Batcher, Pass
from supsupd.serving.engine import Engine, EngineError, NoModelYet, Prediction, Question, ShuttingDown
from supsupd.serving.memory import Memory
from supsupd.serving.metrics import Metrics
from supsupd.serving.oip.statistics import Statistics

PATIENT = 32
"""How many may wait at a time for what is slow."""
HEAVY = 2
"""How many large bodies are worked on at a time: unpacked, decoded, or written."""
T = TypeVar("T")


class Front:
    """One for a daemon; used in the thread of its event loop unless said otherwise.

    Args:
        engine: answers.
        limits: replaced whole when the configuration is read again.
    """

    def __init__(self, engine: Engine, limits: ServingSettings) -> None:
        self.engine = engine
        self.limits = limits
        self.draining = False
        self.memory = Memory(lambda: self.limits)
        self.batcher = Batcher(engine, lambda: self.limits)
        self.statistics = Statistics()
        self.metrics = Metrics(self)
        self._patient = anyio.CapacityLimiter(PATIENT)
        self._heavy = anyio.CapacityLimiter(HEAVY)

    def problem(self) -> EngineError | None:
        """Why no more queries should be sent here; None: they may be."""
        if self.draining:
            return ShuttingDown()
        return None if self.engine.ready() else NoModelYet()

    async def patiently(self, work: Callable[..., T], *given: object) -> T:
        """What comes of work that waits for the decoder, the disk or the learning thread. It has threads of its own:
        however many wait so, those that queries need are free."""
        return await anyio.to_thread.run_sync(work, *given, limiter=self._patient)

    async def heavily(self, work: Callable[..., T], *given: object) -> T:
        """What comes of work that would hold up the loop; a few at a time, so that they leave it room as well."""
        return await anyio.to_thread.run_sync(work, *given, limiter=self._heavy)

    async def infer(
        self, question: Question, timeout: float | None = None, taken: Callable[[Pass], None] | None = None
    ) -> Prediction:
        """The answer to a question, after those that came before it.

        timeout: seconds that it may wait for its turn; None: as configured, which is also the most.
        taken: told of the pass that answers, when it begins.
        Raises EngineError: 429 where too many wait, 503 when its time is over, and what the engine says.
        """
        answer: Prediction | EngineError | None = None
        began = time.perf_counter()
        try:
            answer = await self.batcher.ask(question, timeout, taken)
        finally:
            self.metrics.count_query(question, answer, time.perf_counter() - began)
        if isinstance(answer, EngineError):
            raise answer
        return answer
