"""What requests may hold together, in bytes: taken before they are there, given back once the answer is written."""

from __future__ import annotations

import asyncio
import ctypes
import traceback
from collections import deque
from collections.abc import Callable
from typing import Literal

from supsupd.config import ServingSettings
from supsupd.serving.engine import EngineError

Stage = Literal["received", "decoded", "answered", "posted"]
"""Bodies of queries; what they unpack to, and tensors made of text; answers; bodies of batches, until they are durable.
In this order: who holds at one stage waits for later ones only, so that nobody waits for whom he holds up."""
STAGES: tuple[Stage, ...] = ("received", "decoded", "answered", "posted")
TINY_BYTES = 1 << 16
"""What is not counted: it is bounded by the number of connections, which hold about as much of a body anyway."""
SMALL_BYTES = 1 << 20
"""Up to this size a request passes those that are larger, and has room that they cannot take."""
MIB = 1 << 20
TRIM_SECONDS = 0.25
"""How soon what a large request held goes back to the system, where the allocator keeps it."""


class TooLarge(EngineError):
    """A request that would never fit."""

    status = 413

    def __init__(self, what: str, size: int, most: int) -> None:
        super().__init__(
            f"too_large: {what} would take {_mib(size)} MiB of memory, serving.memory_bytes leaves {_mib(most)} to one "
            "request; send fewer rows at a time, or raw tensors instead of JSON"
        )


class MemoryFull(EngineError):
    """A request that does not fit now, and did not in its time."""

    status = 503

    def __init__(self, what: str) -> None:
        super().__init__(f"overloaded: other requests hold the memory that {what} would take (serving.memory_bytes)")


class Memory:
    """The room of all requests, a quarter of it for each stage. Used in the thread of the event loop.

    Args:
        limits: gives the settings in force.
    """

    def __init__(self, limits: Callable[[], ServingSettings]) -> None:
        self.lanes = {stage: Lane(lambda: limits().memory_bytes // len(STAGES)) for stage in STAGES}
        self._limits = limits
        self._trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        self._is_trimming = False

    def holding(self) -> Holding:
        """What one request holds: nothing yet."""
        return Holding(self)

    def patience(self) -> float:
        """Seconds for which a request may wait for room."""
        return self._limits().query_seconds

    def given_back(self, size: int) -> None:
        """So much is free again: what is large is the system's soon, whichever thread's heap it was in."""
        if size > SMALL_BYTES and self._trim is not None and not self._is_trimming:
            self._is_trimming = True
            asyncio.get_running_loop().call_later(TRIM_SECONDS, self._begin_trim, self._trim)

    def _begin_trim(self, trim: Callable[[int], int]) -> None:
        done = asyncio.get_running_loop().run_in_executor(None, trim, 0)
        done.add_done_callback(self._trimmed)

    def _trimmed(self, _: object) -> None:
        self._is_trimming = False


class Holding:
    """What one request holds, at most one piece of each stage; a context manager, which gives all of it back."""

    __slots__ = ("_memory", "_sizes")

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._sizes: dict[Stage, int] = {}

    def __enter__(self) -> Holding:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Gives back all that it holds."""
        for stage in tuple(self._sizes):
            self.give(stage)

    async def take(self, stage: Stage, size: int, what: str, seconds: float | None = None) -> None:
        """Holds so many bytes of a stage instead of what it held of it; `what`: they are for, in an error.

        seconds: that it may wait for them; None: as long as for its turn. Raises TooLarge, MemoryFull.
        """
        self.give(stage)
        if size <= TINY_BYTES:
            return
        lane, patience = self._memory.lanes[stage], self._memory.patience()
        if size > lane.most:
            raise TooLarge(what, size, lane.most)
        try:
            async with asyncio.timeout(patience if seconds is None else min(seconds, patience)):
                await lane.take(size)
        except TimeoutError:
            raise MemoryFull(what) from None
        self._sizes[stage] = size

    def keep(self, stage: Stage, size: int) -> None:
        """Holds no more than this of a stage: it has turned out that this is all."""
        held = self._sizes.get(stage, 0)
        if size < held:
            self._memory.lanes[stage].give(held, size)
            self._sizes[stage] = size

    def give(self, stage: Stage) -> None:
        """Holds nothing of a stage any more."""
        if size := self._sizes.pop(stage, 0):
            self._memory.lanes[stage].give(size)
            self._memory.given_back(size)


class Lane:
    """The room of one stage: small pieces may fill it, large ones three quarters of it, each in their order.

    Args:
        room: gives the bytes that there may be.
    """

    def __init__(self, room: Callable[[], int]) -> None:
        self._room = room
        self.used = 0
        """Bytes that are held."""
        self._large = 0
        self._waiting: tuple[deque[_Waiting], deque[_Waiting]] = (deque(), deque())  # small ones, large ones

    @property
    def most(self) -> int:
        """The largest piece that there may be."""
        return self._room() * 3 // 4

    async def take(self, size: int) -> None:
        """Returns once there is room, which is taken then."""
        queue = self._waiting[size > SMALL_BYTES]
        if not queue and self._fits(size):
            self._count(size, 1)
            return
        waiting = _Waiting(size, asyncio.get_running_loop().create_future())
        queue.append(waiting)
        try:
            await waiting.turn
        except BaseException:
            if not waiting.turn.cancelled():  # it came too late
                self.give(size)
            self._let_in()
            raise

    def give(self, size: int, kept: int = 0) -> None:
        """Gives back what was taken, but for `kept` bytes."""
        self._count(size, -1)
        if kept:
            self._count(kept, 1)
        self._let_in()

    def _count(self, size: int, sign: int) -> None:
        self.used += sign * size
        if size > SMALL_BYTES:
            self._large += sign * size

    def _fits(self, size: int) -> bool:
        is_room = self.used + size <= self._room()
        return is_room and (size <= SMALL_BYTES or self._large + size <= self.most)

    def _let_in(self) -> None:
        for queue in self._waiting:
            while queue and (queue[0].turn.done() or self._fits(queue[0].size)):
                waiting = queue.popleft()
                if not waiting.turn.done():  # else who waited is gone
                    self._count(waiting.size, 1)
                    waiting.turn.set_result(None)


class _Waiting:
    """A piece that waits for room."""

    __slots__ = ("size", "turn")

    def __init__(self, size: int, turn: asyncio.Future[None]) -> None:
        self.size = size
        self.turn = turn


def let_go(error: BaseException) -> None:
    """Empties the frames that an error has come through, and those behind it.

    What they hold, bodies among it, would stay until the next full collection where an error and a frame hold each
    other, as everywhere where a future hands errors on.
    """
    seen: set[int] = set()
    behind: BaseException | None = error
    while behind is not None and id(behind) not in seen:
        seen.add(id(behind))
        traceback.clear_frames(behind.__traceback__)
        behind = behind.__cause__ or behind.__context__


def _mib(size: int) -> int:
    return -(-size // MIB)
