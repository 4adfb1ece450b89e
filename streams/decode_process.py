"""One decoding worker as its parent sees it: started, asked, and ended when it breaks a rule."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

from streams.batch import Batch, BatchRejected, Summary
from streams.budget import Budget
from streams.reading import Reading
from streams.wire import Malformed, check_reply, message, receive, receive_batch

_KEPT_VARIABLES = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "PYTHONUSERBASE")
# One thread, and an allocator that takes no more address space than it needs.
_VARIABLES = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
_START_SECONDS = 60.0
_END_SECONDS = 1.0  # in which a worker that closed its socket is gone


class DecoderUnavailable(Exception):
    """No worker can be started now: no batch is to blame, try again later."""


class WorkerLost(Exception):
    """The worker has ended, or was ended, over a request; `code` is worker_died, oom or timeout."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


@dataclass(frozen=True, slots=True)
class ProcessLimits:
    """memory_bytes: what a worker may take beyond its own code. seconds: for one request. descriptors: open at once.

    requests: after so many a worker is replaced, as libraries may leak. processes: workers at a time. idle_seconds: all
    but one end when they were not needed for so long.
    """

    memory_bytes: int = 1 << 30
    seconds: float = 30.0
    descriptors: int = 16
    requests: int = 5000
    processes: int = 1
    idle_seconds: float = 60.0


class DecodeProcess:
    """A running worker; for one thread at a time. Raises DecoderUnavailable where it cannot start."""

    def __init__(self, reading: Reading, limits: ProcessLimits) -> None:
        self._reading = reading
        self._limits = limits
        self.requests = 0
        self._socket, theirs = socket.socketpair()
        try:
            self._process = _start(theirs)
        except OSError as error:
            self._socket.close()
            raise DecoderUnavailable(f"no decoding worker: {error.strerror}") from error
        finally:
            theirs.close()
        self._greet()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_usable(self) -> bool:
        """Whether it still runs, and has not answered as much as one may."""
        return self._process.poll() is None and self.requests < self._limits.requests

    def inspect(self, descriptor: int, size: int, form: str) -> Summary:
        """What the first `size` bytes of the file behind `descriptor` hold; raises BatchRejected, WorkerLost."""
        answer = self._ask("inspect", descriptor, size, form)
        assert isinstance(answer, Summary)
        return answer

    def decode(self, descriptor: int, size: int, form: str) -> Batch:
        """The batch in them; raises BatchRejected, WorkerLost."""
        answer = self._ask("decode", descriptor, size, form)
        assert isinstance(answer, Batch)
        return answer

    def end(self) -> None:
        """Ends the process, whatever it does; may be called twice."""
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def _greet(self) -> None:
        reading, limits = self._reading, self._limits
        settings = {
            "limits": asdict(reading.limits),
            "columns": asdict(reading.columns),
            "with_task": reading.with_task,
            "memory_bytes": limits.memory_bytes,
            "descriptors": limits.descriptors,
            "seconds": limits.seconds,
        }
        try:
            self._socket.settimeout(_START_SECONDS)
            self._socket.sendall(message(settings))
            if receive(self._socket) != ({"ready": True}, 0):
                raise Malformed("not ready")
        except (OSError, EOFError, Malformed) as error:
            self.end()
            command = f"{sys.executable} -m streams.decode_worker"
            raise DecoderUnavailable(f"the decoding worker did not start; `{command}` says why") from error

    def _ask(self, verb: str, descriptor: int, size: int, form: str) -> Summary | Batch:
        self.requests += 1
        try:
            answer = self._converse(verb, descriptor, size, form)
        except TimeoutError as error:
            self.end()
            raise WorkerLost("timeout", f"not decoded in {self._limits.seconds:g} s") from error
        except (OSError, EOFError) as error:
            raise self._lost() from error
        except Malformed as error:
            self.end()
            raise WorkerLost("worker_died", f"it gave a malformed answer ({error})") from error
        if not isinstance(answer, BatchRejected):
            return answer
        if answer.code == "oom":  # a fresh worker may have more memory
            self.end()
            raise WorkerLost(answer.code, answer.text)
        # A new one: raised where a frame has it, it would hold that frame, and so the bytes, until the next collection.
        raise BatchRejected(answer.code, answer.text)

    def _converse(self, verb: str, descriptor: int, size: int, form: str) -> Summary | Batch | BatchRejected:
        connection, budget = _Timed(self._socket, self._limits.seconds), Budget(size, self._reading.limits)
        socket.send_fds(self._socket, [message({"verb": verb, "form": form}, size)], [descriptor])
        reply, rest = receive(connection)
        answer = check_reply(reply, rest, budget)
        if isinstance(answer, BatchRejected):
            return answer
        if isinstance(answer, Summary) != (verb == "inspect"):
            raise Malformed("the answer to another question")
        return answer if isinstance(answer, Summary) else receive_batch(connection, answer, budget)

    def _lost(self) -> WorkerLost:
        """Why the worker closed its socket."""
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            status = 0
        self.end()
        if status == -signal.SIGKILL:
            return WorkerLost("oom", "SIGKILL; only a system out of memory, or an operator, ends a worker so")
        if status < 0:
            name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
            return WorkerLost("worker_died", name)
        return WorkerLost("worker_died", f"exit status {status}")


class _Timed:
    """A socket whose reads all end `seconds` after now, however slowly bytes come; then they raise TimeoutError."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self._end = time.monotonic() + seconds

    def recv_into(self, view: memoryview) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        return self._connection.recv_into(view)


def _start(connection: socket.socket) -> subprocess.Popen[bytes]:
    """A fresh interpreter, no copy of this process: it has one socket, none of our secrets, and no terminal."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return subprocess.Popen(  # noqa: S603  # our own interpreter and module
        [sys.executable, "-P", "-m", "streams.decode_worker", str(connection.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(connection.fileno(),),
        env=kept | _VARIABLES,
        start_new_session=True,  # a Ctrl-C at the terminal is for the daemon alone
    )
