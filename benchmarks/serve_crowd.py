"""A crowd while learning: many clients at once, quiet and while a labelled stream is learned, and far too many of them.

64 connections ask 32 rows each, one question after the other, over TCP and over the Unix socket. Quiet and learning
take turns, so that both see the same machine: a stream begins in the middle of each round. Then 200 connections ask a
daemon whose queue takes 32 questions: who is refused is to be told so by 429, and when to come back, and comes back
then; who gets through is not to wait for long. The clients are bare connections of one other process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clients import Clients, Found, Order, write_questions
from common import ROOT, DaemonProcess
from filled import orders, train, write_state
from paper_report import make_table, measure, report, write_json
from rich.console import Console
from rich.table import Table
from serve_load import Stream
from servers import Server, daemon_on_tcp

from supsupd import logs
from supsupd.client import Client

RESULT = ROOT / "docs" / "results" / "serve_crowd.json"
CROWD, ROWS, TASKS = 64, 32, 5
OVERLOAD, QUEUE = 200, 32
MOST_RISE, MOST_OVERLOADED_SECONDS = 2.0, 5.0
WARM_SECONDS = 2.0


@dataclass(frozen=True)
class Case:
    """Over what is asked, and whether a stream is learned meanwhile."""

    over: str
    learning: bool

    @property
    def name(self) -> str:
        return f"{self.over}, {'while learning' if self.learning else 'quiet'}"


CASES = tuple(Case(over, learning) for learning in (False, True) for over in ("TCP", "Unix socket"))


@dataclass(frozen=True)
class Crowd:
    """A daemon, what is asked of it, and who asks."""

    daemon: DaemonProcess
    server: Server
    questions: Path
    clients: Clients

    def ask(self, over: str, seconds: float, meanwhile: Callable[[], None] | None = None) -> Found:
        address, headers = str(self.daemon.socket), {}
        if over == "TCP":
            address, headers = self.server.address, self.server.headers
        order = Order(address, self.questions, CROWD, seconds, raw=True, headers=headers)
        began = self.server.cpu_seconds()
        found = self.clients.ask(order, meanwhile)
        found.cpu_seconds = self.server.cpu_seconds() - began
        return found


def time_crowd(state: Path, questions: Path, data: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """All cases in turn, so many times, and what was learned meanwhile."""
    known = orders(data, "train")[:TASKS]
    found = {case: Found() for case in CASES}
    batches, learning_seconds = 0, 0.0
    with daemon_on_tcp(state) as (daemon, server), Clients() as clients, Client(daemon.socket) as client:
        crowd = Crowd(daemon, server, questions, clients)
        stream = Stream(daemon, client, known)
        crowd.ask("TCP", WARM_SECONDS)
        for _ in range(rounds):
            for case in CASES:
                if not case.learning:
                    found[case].add(crowd.ask(case.over, seconds))
                    continue
                stream.begin()
                learned, began = stream.learned(), time.monotonic()
                found[case].add(crowd.ask(case.over, seconds, stream.keep_ahead))
                batches += stream.learned() - learned
                learning_seconds += time.monotonic() - began
            stream.finish()
    about = {"batches_per_second": batches / learning_seconds, "fewest_queued": min(stream.queued)}
    return {"rows": [asdict(case) | found[case].to_json() for case in CASES], "stream": about}


def time_overload(state: Path, questions: Path, seconds: float) -> dict[str, Any]:
    """More clients than the queue takes."""
    settings = f"[serving]\nqueue_requests = {QUEUE}\n"
    with daemon_on_tcp(state, settings) as (_, server), Clients() as clients:
        found = clients.ask(Order(server.address, questions, OVERLOAD, seconds, raw=True, headers=server.headers))
    refused = found.statuses["429"]
    return found.to_json() | {
        "refused": refused,
        "told_when": found.retry_after / refused if refused else 1.0,
        "errors": found.errors(["429"]),
    }


def run(data: Path, rounds: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="supsupd-crowd-") as name:
        state, questions = Path(name) / "state", Path(name) / "questions.npz"
        write_state(state, train(data), TASKS)
        write_questions(questions, orders(data, "test")[:TASKS], ROWS)
        result = time_crowd(state, questions, data, rounds, seconds)
        result["overload"] = time_overload(state, questions, seconds)
    counts = {"clients": CROWD, "rows": ROWS, "tasks": TASKS, "overload": OVERLOAD, "queue": QUEUE}
    result["settings"] = counts | {"rounds": rounds, "seconds": seconds}
    return result | {"measures": measures(result)}


def measures(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was wanted: no error, p99 that learning raises little, and an overload that is told and bounded."""
    rows = {Case(row["over"], row["learning"]): row for row in result["rows"]}
    answered = {case: row["answered"] for case, row in rows.items()}
    errors = sum(sum(row["statuses"].values()) - answered[case] for case, row in rows.items())
    found = [measure("requests without an answer", errors, 0, sense="=")]
    for over in ("TCP", "Unix socket"):
        quiet, learning = (rows[Case(over, learning)] for learning in (False, True))
        found += [
            measure(f"{over}: requests a second, quiet", round(quiet["per_second"])),
            measure("  while learning", round(learning["per_second"])),
            measure("  p99 in ms, quiet", quiet["p99_ms"]),
            measure("  p99 while learning over p99 quiet", learning["p99_ms"] / quiet["p99_ms"], MOST_RISE, sense="≤"),
        ]
    overload = result["overload"]
    return [
        *found,
        measure("batches learned a second beside that", round(result["stream"]["batches_per_second"], 2)),
        measure(f"{OVERLOAD} clients, a queue of {QUEUE}: requests a second", round(overload["per_second"])),
        measure("  refused with 429, share", overload["refused"] / sum(overload["statuses"].values())),
        measure("  of these told when to come back, share", overload["told_when"], 1.0, sense="="),
        measure("  other errors", overload["errors"], 0, sense="="),
        measure("  p99 in s of those answered", overload["p99_ms"] / 1000, MOST_OVERLOADED_SECONDS, sense="≤"),
    ]


def times_table(result: dict[str, Any]) -> Table:
    """A row for each case."""
    table = Table("", "a second", "p50", "p99", "CPU", "statuses", title="Milliseconds; CPU: of the server, a request")
    overload = (f"TCP, {OVERLOAD} clients", result["overload"])
    for name, row in [*((Case(r["over"], r["learning"]).name, r) for r in result["rows"]), overload]:
        cells = [f"{row[what]:.4g}" for what in ("per_second", "p50_ms", "p99_ms", "cpu_ms")]
        table.add_row(name, *cells, " ".join(f"{status}: {count}" for status, count in row["statuses"].items()))
    return table


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with mnist.npz")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each case, in each round")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and write nothing")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    logs.configure(level="error")
    started = time.monotonic()
    result = run(options.data, options.rounds, options.seconds)
    command = f"python benchmarks/serve_crowd.py --rounds {options.rounds} --seconds {options.seconds:g}"
    result = report(result, "serve_crowd", command, 0, time.monotonic() - started)
    if options.json:
        print(json.dumps(result))
        return
    console = Console()
    console.print(times_table(result))
    console.print(make_table(result))
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
