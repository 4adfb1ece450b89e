"""Who turns bytes into batches: this process, or a worker process of its own."""

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

from streams.arrays import summary
from streams.batch import Batch, BatchRejected, Summary
from streams.decode_process import DecodeProcess, DecoderUnavailable, ProcessLimits, WorkerLost
from streams.formats import read
from streams.reading import Reading

__all__ = ["Decoder", "DecoderUnavailable", "InlineDecoder", "ProcessDecoder", "ProcessLimits"]

_ATTEMPTS = 3
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
T = TypeVar("T")


class Decoder(Protocol):
    """For any thread; both verbs raise only BatchRejected, and DecoderUnavailable."""

    def inspect(self, payload: bytes, form: str) -> Summary:
        """What the bytes hold as `form`, a name of `formats.FORMATS`; all of them were read for it."""

    def decode(self, payload: bytes, form: str) -> Batch:
        """The batch itself."""

    def close(self) -> None:
        """Ends what was started; may be called twice."""


class InlineDecoder:
    """The plain reference: decodes in this very process, which takes all the risk of hostile bytes."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def inspect(self, payload: bytes, form: str) -> Summary:
        return summary(self.decode(payload, form))

    def decode(self, payload: bytes, form: str) -> Batch:
        return read(payload, form, self._reading)

    def close(self) -> None:
        pass


class ProcessDecoder:
    """Decodes in a worker process with limits; one at a time, whichever thread asks.

    The worker is started at the first request, and anew whenever it was lost. A request that loses three workers is
    refused with worker_died, oom or timeout. Raises DecoderUnavailable where no worker can be started.
    """

    def __init__(self, reading: Reading, limits: ProcessLimits | None = None) -> None:
        self._reading = reading
        self._limits = limits or ProcessLimits()
        self._lock = threading.Lock()
        self._worker: DecodeProcess | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the worker; None while there is none."""
        worker = self._worker
        return None if worker is None else worker.pid

    def start(self) -> None:
        """Starts the worker, so that the first request need not wait for it."""
        with self._lock, suppress(DecoderUnavailable):
            self._ready()

    def inspect(self, payload: bytes, form: str) -> Summary:
        return self._ask(payload, lambda worker, descriptor: worker.inspect(descriptor, len(payload), form))

    def decode(self, payload: bytes, form: str) -> Batch:
        return self._ask(payload, lambda worker, descriptor: worker.decode(descriptor, len(payload), form))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._drop()

    def _ask(self, payload: bytes, question: Callable[[DecodeProcess, int], T]) -> T:
        with self._lock, _sealed(payload) as descriptor:
            lost = None
            for _ in range(_ATTEMPTS):
                try:
                    return question(self._ready(), descriptor)
                except BatchRejected:
                    raise
                except WorkerLost as error:
                    lost = error
                    self._drop()
                except BaseException:
                    self._drop()  # it may be in the middle of an answer
                    raise
            assert lost is not None
            raise BatchRejected(lost.code, f"{lost.text}, {_ATTEMPTS} times") from lost

    def _ready(self) -> DecodeProcess:
        if self._closed:
            raise DecoderUnavailable("the decoder is closed")
        if self._worker is not None and self._worker.requests >= self._limits.requests:
            self._drop()
        if self._worker is None:
            self._worker = DecodeProcess(self._reading, self._limits)
        return self._worker

    def _drop(self) -> None:
        if self._worker is not None:
            self._worker.end()
        self._worker = None


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
