"""What `serve_peers.py` asks and how, and where the states and questions of a run lie."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from clients import Clients, Found, Order, write_questions
from filled import orders, train, write_state
from mlserver_process import MlserverSettings, mlserver_running
from servers import Server, ServerFailed

CONNECTIONS = 8
LEAST_TIMES = {1: 2.0, 32: 5.0}
"""How many times MLServer's requests a second ours are to be, by the rows of a request."""
WARM_SECONDS = 1.0


@dataclass(frozen=True)
class Case:
    """What is asked, and of how many tasks."""

    tasks: int
    rows: int
    given: bool

    @property
    def name(self) -> str:
        rows = f"{self.rows} row{'s' * (self.rows > 1)}"
        return f"{self.tasks} tasks, {rows}, task {'given' if self.given else 'inferred'}"


@dataclass(frozen=True)
class Way:
    """Who is asked, and how."""

    peer: bool
    binary: bool
    raw: bool

    @property
    def name(self) -> str:
        server = "MLServer" if self.peer else "supsupd"
        return f"{server}, {'binary' if self.binary else 'JSON'}{', bare connections' if self.raw else ''}"


OURS, PEER, OURS_JSON = Way(False, True, False), Way(True, False, False), Way(False, False, False)
WAYS = tuple(replace(way, raw=raw) for raw in (False, True) for way in (OURS, PEER, OURS_JSON))


@dataclass(frozen=True)
class Place:
    """Where everything of a run lies.

    Args:
        folder: a temporary one.
        data: the one with mnist.npz.
        python: the interpreter of MLServer's environment.
    """

    folder: Path
    data: Path
    python: Path

    def prepare(self, tasks: int) -> None:
        """Makes the state directory that knows so many tasks, and the questions about them."""
        write_state(self.state(tasks), train(self.data), tasks)
        for rows in LEAST_TIMES:
            write_questions(self.questions(tasks, rows), orders(self.data, "test")[:tasks], rows)

    def state(self, tasks: int) -> Path:
        return self.folder / f"state-{tasks}"

    def questions(self, tasks: int, rows: int) -> Path:
        return self.folder / f"questions-{tasks}-{rows}.npz"

    @contextmanager
    def mlserver(self, tasks: int, settings: MlserverSettings) -> Iterator[Server]:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        with mlserver_running(self.python, self.state(tasks), folder, settings) as server:
            yield server

    def order(self, server: Server, case: Case, way: Way, seconds: float) -> Order:
        questions = self.questions(case.tasks, case.rows)
        about = {"binary": way.binary, "given": case.given, "raw": way.raw, "headers": server.headers}
        return Order(server.address, questions, CONNECTIONS, seconds, **about)


def ask(clients: Clients, server: Server, order: Order) -> Found:
    """After some time that does not count. Raises ServerFailed where anything is not answered."""
    clients.ask(replace(order, seconds=WARM_SECONDS))
    began = server.cpu_seconds()
    found = clients.ask(order)
    found.cpu_seconds = server.cpu_seconds() - began
    if found.errors():
        raise ServerFailed(f"{order.address} answered {dict(found.statuses)}")
    return found
