"""Who turns bytes into batches: this process, or worker processes of its own."""

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

from streams.arrays import summary
from streams.batch import Batch, BatchRejected, Summary
from streams.budget import working_bytes
from streams.decode_process import DecodeProcess, DecoderUnavailable, ProcessLimits, WorkerLost
from streams.formats import read
from streams.reading import Reading
from streams.turns import Turns

__all__ = ["Decoder", "DecoderUnavailable", "InlineDecoder", "ProcessDecoder", "ProcessLimits"]

_ATTEMPTS = 3
_TOGETHER = 2  # times what one worker may take, for all: the largest batch of one asker keeps nobody else waiting
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
T = TypeVar("T")


class Decoder(Protocol):
    """For any thread; both verbs raise only BatchRejected, and DecoderUnavailable.

    who: asks; where there is a wait, it is for what the same one has asked before.
    """

    def inspect(self, payload: bytes, form: str, who: str = "") -> Summary:
        """What the bytes hold as `form`, a name of `formats.FORMATS`; all of them were read for it."""

    def decode(self, payload: bytes, form: str, who: str = "") -> Batch:
        """The batch itself."""

    def close(self) -> None:
        """Ends what was started; may be called twice."""


class InlineDecoder:
    """The plain reference: decodes in this very process, which takes all the risk of hostile bytes."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def inspect(self, payload: bytes, form: str, who: str = "") -> Summary:
        return summary(self.decode(payload, form))

    def decode(self, payload: bytes, form: str, who: str = "") -> Batch:
        return read(payload, form, self._reading)

    def close(self) -> None:
        pass


class ProcessDecoder:
    """Decodes in worker processes with limits: each asker has one to itself, as long as `limits` has enough.

    Workers are started when they are needed, and end when they are idle for some time, all but one. What requests may
    need of memory is set aside before they begin, at most twice `limits.memory_bytes` for all. A request that loses
    three workers is refused with worker_died, oom or timeout. Raises DecoderUnavailable where no worker can be started.
    """

    def __init__(self, reading: Reading, limits: ProcessLimits | None = None) -> None:
        self._reading = reading
        self._limits = limits or ProcessLimits()
        self._turns = Turns(self._limits.processes, _TOGETHER * self._limits.memory_bytes)
        self._starting = threading.Lock()
        self._lock = threading.Lock()
        self._workers: set[DecodeProcess] = set()
        self._idle: list[tuple[float, DecodeProcess]] = []  # since when (monotonic), the longest first
        self._timer: threading.Timer | None = None
        self._closed = False

    @property
    def pids(self) -> set[int]:
        """Of the workers."""
        with self._lock:
            return {worker.pid for worker in self._workers}

    def start(self) -> None:
        """Starts a worker before it is needed; who asks meanwhile waits for that one."""
        with self._starting, suppress(DecoderUnavailable):
            self._give_back(self._new())

    def inspect(self, payload: bytes, form: str, who: str = "") -> Summary:
        return self._ask(payload, who, lambda worker, descriptor: worker.inspect(descriptor, len(payload), form))

    def decode(self, payload: bytes, form: str, who: str = "") -> Batch:
        return self._ask(payload, who, lambda worker, descriptor: worker.decode(descriptor, len(payload), form))

    def close(self) -> None:
        """Ends the workers; one that is busy, once it has answered."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            if self._timer is not None:
                self._timer.cancel()
        for _, worker in idle:
            self._end(worker)

    def _ask(self, payload: bytes, who: str, question: Callable[[DecodeProcess, int], T]) -> T:
        needed = min(working_bytes(len(payload), self._reading.limits), self._limits.memory_bytes)
        with self._turns.taken(who, needed), _sealed(payload) as descriptor:
            lost = ("", "")
            for attempt in range(_ATTEMPTS):
                worker = self._take(fresh=attempt > 0)
                try:
                    answer = question(worker, descriptor)
                except WorkerLost as error:
                    lost = error.code, error.text  # not itself: it would hold this frame, and so the bytes
                    self._end(worker)
                except BatchRejected:
                    self._give_back(worker)
                    raise
                except BaseException:
                    self._end(worker)  # it may be in the middle of an answer
                    raise
                else:
                    self._give_back(worker)
                    return answer
            code, text = lost
            raise BatchRejected(code, f"{text}, {_ATTEMPTS} times")

    def _take(self, fresh: bool = False) -> DecodeProcess:
        """An idle worker or a new one; `fresh`: only that, as the others may be dying of the same."""
        with self._starting:
            pass
        while not fresh:
            with self._lock:
                worker = self._idle.pop()[1] if self._idle else None
            if worker is None:
                break
            if worker.is_usable:
                return worker
            self._end(worker)
        return self._new()

    def _new(self) -> DecodeProcess:
        if self._closed:
            raise DecoderUnavailable("the decoder is closed")
        worker = DecodeProcess(self._reading, self._limits)
        with self._lock:
            self._workers.add(worker)
        return worker

    def _give_back(self, worker: DecodeProcess) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append((time.monotonic(), worker))
                self._watch_idle()
                return
        self._end(worker)

    def _end(self, worker: DecodeProcess) -> None:
        worker.end()
        with self._lock:
            self._workers.discard(worker)

    def _watch_idle(self) -> None:
        """Has those ended that will not be needed; the lock is held."""
        if self._timer is None and len(self._idle) > 1:
            self._timer = threading.Timer(self._limits.idle_seconds, self._end_idle)
            self._timer.daemon = True
            self._timer.start()

    def _end_idle(self) -> None:
        due = time.monotonic() - self._limits.idle_seconds
        with self._lock:
            self._timer = None
            ended = [worker for since, worker in self._idle[:-1] if since <= due]
            self._idle = self._idle[len(ended) :]
            if not self._closed:
                self._watch_idle()
        for worker in ended:
            self._end(worker)


@contextmanager
def _sealed(payload: bytes) -> Iterator[int]:
    """A descriptor of a file in memory with these bytes, which nobody can change any more."""
    try:
        descriptor = os.memfd_create("batch", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise DecoderUnavailable(f"no memory file: {error.strerror}") from error
    try:
        _write(descriptor, payload)
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, payload: bytes) -> None:
    view = memoryview(payload)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        raise DecoderUnavailable(f"no memory for {len(payload)} bytes: {error.strerror}") from error
