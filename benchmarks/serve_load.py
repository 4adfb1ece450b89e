"""What `serve.py` loads a daemon with: its tasks, questions, the clients that ask them, and a stream that it learns."""

from __future__ import annotations

import itertools
import json
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
from common import DaemonProcess, StreamTask
from filled import TRAINING_ROWS, Trained, write_state

from supsupd.client import Client

TEST_IMAGES = 2000
BATCH_ROWS, BATCHES_AHEAD, LOOK_SECONDS = 128, 48, 0.5

Ask = Callable[[np.ndarray, int | None], tuple[int, int]]
"""Rows uint8 (n, 784) and their task, None to infer it, to the label and the task of the first row."""


@dataclass(frozen=True)
class Question:
    """Rows uint8 (n, 784) of one task, and what is right for the first of them."""

    x: np.ndarray
    label: int
    task: int


def iter_questions(tests: list[StreamTask], rows: int) -> Iterator[Question]:
    """About the tasks in turn, without end."""
    images = [(task.transform(task.x[:TEST_IMAGES]).reshape(TEST_IMAGES, -1), task.y) for task in tests]
    for number in itertools.count():
        x, y = images[number % len(images)]
        start = number * rows % (TEST_IMAGES - rows)
        yield Question(x[start : start + rows], int(y[start]), number % len(images) + 1)


class UnixConnection(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def plain_ask(connection: HTTPConnection) -> Ask:
    """The protocol with nothing between it and the socket."""

    def ask(x: np.ndarray, task: int | None) -> tuple[int, int]:
        tensor = {"name": "x", "shape": x.shape, "datatype": "UINT8", "data": x.ravel().tolist()}
        body = json.dumps({"inputs": [tensor], "parameters": {} if task is None else {"task": task}})
        connection.request("POST", "/v2/models/supsup/infer", body)
        answer = json.loads(connection.getresponse().read())
        first = {output["name"]: output["data"][0] for output in answer["outputs"]}
        return first["label"], first["task"]

    return ask


def own_ask(client: Client) -> Ask:
    """The same through the project's client."""

    def ask(x: np.ndarray, task: int | None) -> tuple[int, int]:
        first = client.predict(x, task)[0]
        return first["label"], first["task"]

    return ask


@dataclass
class Stream:
    """Labelled batches of tasks that a daemon knows, of images that their masks have not seen."""

    daemon: DaemonProcess
    client: Client
    tasks: list[StreamTask]
    queued: list[int] = field(default_factory=list)
    """Batches that waited, or were being learned, at each look: never 0 if the daemon was never idle."""

    def __post_init__(self) -> None:
        self._batches = self._iter_batches()
        self._next_look = 0.0

    def begin(self) -> None:
        """Returns once batches are being learned."""
        learned = self.learned()
        while self.learned() == learned:
            self.keep_ahead()
            time.sleep(LOOK_SECONDS)
        self.queued.clear()

    def learned(self) -> int:
        """Batches learned since the daemon's start."""
        count: int = self.client.status()["learned_batches"]
        return count

    def keep_ahead(self) -> None:
        """Fills the queue up when it is time to look."""
        if time.monotonic() < self._next_look:
            return
        self.queued.append(self.client.status()["queue"])
        for name, x, y in itertools.islice(self._batches, max(0, BATCHES_AHEAD - self.queued[-1])):
            self.daemon.drop(self.daemon.stage(name, x, y))
        self._next_look = time.monotonic() + LOOK_SECONDS

    def finish(self) -> None:
        """Returns once nothing is left to learn."""
        while self.client.status()["queue"]:
            time.sleep(LOOK_SECONDS)

    def _iter_batches(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        rng = np.random.default_rng(1)
        for number in itertools.count():
            task = self.tasks[number % len(self.tasks)]
            rows = rng.choice(np.arange(TRAINING_ROWS, len(task.y)), BATCH_ROWS, replace=False)
            yield f"{number:06d}", task.transform(task.x[rows]), task.y[rows]


@contextmanager
def filled_daemon(trained: Trained, tasks: int) -> Iterator[DaemonProcess]:
    """A daemon that knows so many tasks, in a folder that goes with it."""
    with tempfile.TemporaryDirectory(prefix="supsupd-") as name:
        root = Path(name)
        write_state(root / "state", trained, tasks)
        daemon = DaemonProcess(root)
        try:
            daemon.await_ready()
            yield daemon
        except Exception as error:
            error.add_note(f"the end of the daemon's log:\n{daemon.tail()}")
            raise
        finally:
            daemon.stop()
