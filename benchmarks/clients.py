"""Many clients at once, in a process of their own (`clients_runner.py`), and what they found."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from common import StreamTask
from serve_load import iter_questions

RUNNER = Path(__file__).resolve().with_name("clients_runner.py")
QUESTIONS = 60
"""Different ones, asked in turn."""
LOOK_SECONDS = 0.05


class ClientsFailed(Exception):
    """The clients stopped; what they said is on standard error."""


@dataclass(frozen=True)
class Order:
    """What to ask for some seconds.

    Args:
        address: HOST:PORT, or for raw clients the path of a Unix socket.
        questions: a file of `write_questions`.
        connections: each with one question after the other.
        binary: tensors as bytes, both ways; else as JSON.
        given: each question names its task.
        raw: requests made beforehand over bare connections, instead of tritonclient.
    """

    address: str
    questions: Path
    connections: int
    seconds: float
    binary: bool = True
    given: bool = False
    raw: bool = False
    headers: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"questions": str(self.questions)}


@dataclass
class Found:
    """What came back, of one order or of several; `milliseconds` of those that were answered.

    right: those with the right task and the right label of the first row; raw clients do not look.
    retry_after: those that were told when to come back; raw clients come back then.
    cpu_seconds: that the server took meanwhile, where it was looked at.
    """

    seconds: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    milliseconds: list[float] = field(default_factory=list)
    right: int = 0
    retry_after: int = 0
    cpu_seconds: float = 0.0

    def add(self, other: Found) -> None:
        self.seconds += other.seconds
        self.statuses += other.statuses
        self.milliseconds += other.milliseconds
        self.right += other.right
        self.retry_after += other.retry_after
        self.cpu_seconds += other.cpu_seconds

    @property
    def answered(self) -> int:
        return len(self.milliseconds)

    @property
    def per_second(self) -> float:
        return self.answered / self.seconds

    @property
    def p50_ms(self) -> float:
        return float(np.percentile(self.milliseconds, 50))

    @property
    def p99_ms(self) -> float:
        return float(np.percentile(self.milliseconds, 99))

    def to_json(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in ("per_second", "p50_ms", "p99_ms", "answered")}
        about = {"right": self.right / self.answered, "cpu_ms": 1000 * self.cpu_seconds / self.answered}
        return found | about | {"statuses": dict(self.statuses)}

    def errors(self, allowed: Iterable[str] = ()) -> int:
        """Requests without an answer and with another status than 200 or the allowed ones."""
        return sum(count for status, count in self.statuses.items() if status not in {"200", *allowed})


class Clients:
    """The running process, used with `with`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="supsupd-clients-")
        self._times = Path(self._folder.name) / "times.npy"
        self._process = subprocess.Popen(
            [sys.executable, RUNNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, order: Order, meanwhile: Callable[[], None] | None = None) -> Found:
        """Carries an order out; `meanwhile` is called again and again until it has been. Raises ClientsFailed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order.to_dict() | {"times": str(self._times)}) + "\n")
        self._process.stdin.flush()
        if meanwhile is not None:
            end = time.monotonic() + order.seconds
            while time.monotonic() < end:
                meanwhile()
                time.sleep(LOOK_SECONDS)
        if not (line := self._process.stdout.readline()):
            raise ClientsFailed(f"the clients stopped with exit status {self._process.wait()}")
        answer = json.loads(line)
        milliseconds = np.load(self._times).tolist()
        return Found(**answer | {"statuses": Counter(answer["statuses"]), "milliseconds": milliseconds})

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()  # closes its input, which ends it
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def write_questions(path: Path, tests: list[StreamTask], rows: int) -> Path:
    """Questions of so many rows about the tasks in turn, with what is right for each one's first row.

    Pixels are numbers from 0 to 1 in FP32, the datatype that the model names.
    """
    questions = list(islice(iter_questions(tests, rows), QUESTIONS))
    x, task, label = (np.array([getattr(q, name) for q in questions]) for name in ("x", "task", "label"))
    np.savez(path, x=(x / 255).astype(np.float32), task=task, label=label)
    return path
