"""The socket's speed: what a query takes, with the task given and inferred, with training beside it and without.

A real daemon holds 1, 100 and 2,500 tasks (`filled.py`). The client is a process of its own with one connection that is
kept (http.client of the standard library over the Unix socket), and asks one query after the other. A query's time runs
from the array of pixels to the decoded answer: the JSON of both sides is in it. For one row the project's own client is
measured too. In training, labelled batches of known tasks come into the watched folder faster than they are learned.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT
from filled import orders, train
from paper_report import make_table, measure, new_figure, report, save_figure, write_json
from rich.console import Console
from rich.table import Table
from serve_load import (
    BATCH_ROWS,
    Ask,
    Question,
    Stream,
    UnixConnection,
    filled_daemon,
    iter_questions,
    own_ask,
    plain_ask,
)

from supsupd import logs
from supsupd.client import Client

RESULT, PLOT = ROOT / "docs" / "results" / "serve.json", ROOT / "docs" / "plots" / "serve.png"
MOST_P50_MS, MOST_RISE = 2.0, 2.0
WARM_UP = 50
LONGEST_SECONDS = 30.0
"""A case ends then, with the queries that it has made."""


@dataclass(frozen=True)
class Case:
    """One way to ask."""

    rows: int
    given: bool
    own: bool = False

    @property
    def name(self) -> str:
        client = ", own client" if self.own else ""
        return f"{self.rows} row{'s' * (self.rows > 1)}, task {'given' if self.given else 'inferred'}{client}"


CASES = (Case(1, True), Case(1, False), Case(32, True), Case(32, False), Case(1, True, own=True))


@dataclass(frozen=True)
class Times:
    """What queries took, one after the other; `right` is the share with the right task and label."""

    p50_ms: float
    p99_ms: float
    per_second: float
    queries: int
    right: float


@dataclass(frozen=True)
class Row:
    """A case over a daemon that knows so many tasks."""

    tasks: int
    case: Case
    quiet: Times
    training: Times

    @property
    def rise(self) -> float:
        """What training multiplies p99 by."""
        return self.training.p99_ms / self.quiet.p99_ms

    def to_json(self) -> dict[str, Any]:
        times = {"quiet": asdict(self.quiet), "training": asdict(self.training)}
        return {"tasks": self.tasks, **asdict(self.case), **times, "p99_rise": self.rise}


def time_queries(
    questions: Iterator[Question], ask: Ask, given: bool, queries: int, between: Callable[[], None]
) -> Times:
    """Asks so many questions, after some that do not count; `between` two of them something else may be done."""
    seconds: list[float] = []
    right = 0
    for question in islice(questions, WARM_UP):
        ask(question.x, question.task if given else None)
    for question in islice(questions, queries):
        between()
        began = time.perf_counter()
        answer = ask(question.x, question.task if given else None)
        seconds.append(time.perf_counter() - began)
        right += answer == (question.label, question.task)
        if sum(seconds) > LONGEST_SECONDS:
            break
    p50, p99 = (1000 * float(q) for q in np.percentile(seconds, [50, 99]))
    return Times(p50, p99, len(seconds) / sum(seconds), len(seconds), right / len(seconds))


def time_daemon(data: Path, tasks: int, queries: int) -> tuple[list[Row], dict[str, Any]]:
    """All cases over one daemon, and what it learned meanwhile: first all of them quiet, then all in training."""
    tests, known = (orders(data, part)[:tasks] for part in ("test", "train"))
    with filled_daemon(train(data), tasks) as daemon, Client(daemon.socket) as client:
        plain, own = plain_ask(UnixConnection(daemon.socket)), own_ask(client)

        def timed(case: Case, between: Callable[[], None]) -> Times:
            return time_queries(
                iter_questions(tests, case.rows), own if case.own else plain, case.given, queries, between
            )

        quiet = [timed(case, lambda: None) for case in CASES]
        stream = Stream(daemon, client, known)
        stream.begin()
        began, learned = time.monotonic(), stream.learned()
        training = [timed(case, stream.keep_ahead) for case in CASES]
        about = {
            "tasks": tasks,
            "batches_per_second": (stream.learned() - learned) / (time.monotonic() - began),
            "fewest_queued": min(stream.queued),
        }
    return [Row(tasks, *found) for found in zip(CASES, quiet, training, strict=True)], about


def run(data: Path, counts: list[int], queries: int) -> dict[str, Any]:
    """Everything, one count of tasks after the other."""
    rows, streams = [], []
    for tasks in counts:
        found, stream = time_daemon(data, tasks, queries)
        rows += found
        streams.append(stream)
    return {
        "settings": {"tasks": counts, "queries": queries, "batch_rows": BATCH_ROWS},
        "measures": measures(rows),
        "rows": [row.to_json() for row in rows],
        "streams": streams,
    }


def measures(rows: list[Row]) -> list[dict[str, Any]]:
    """The two targets, each at its worst count of tasks."""
    given = [row for row in rows if row.case == Case(1, True)]
    worst = max(rows, key=lambda row: row.rise)
    return [
        measure("task given, 1 row: p50 in ms", max(row.quiet.p50_ms for row in given), MOST_P50_MS, sense="≤"),
        measure("  in training", max(row.training.p50_ms for row in given), MOST_P50_MS, sense="≤"),
        measure("  p99 in training over p99 without", max(row.rise for row in given), MOST_RISE, sense="≤"),
        measure(f"the same at worst: {worst.tasks} tasks, {worst.case.name}", worst.rise, MOST_RISE, sense="≤"),
    ]


def times_table(result: dict[str, Any]) -> Table:
    """A row for each case and count of tasks."""
    columns = ("tasks", "query", "p50", "p99", "per s", "training: p50", "p99", "per s", "right")
    table = Table(*columns, title="Milliseconds over the socket")
    for row in result["rows"]:
        case = Case(row["rows"], row["given"], row["own"])
        cells = [
            f"{row[when][what]:.4g}" for when in ("quiet", "training") for what in ("p50_ms", "p99_ms", "per_second")
        ]
        table.add_row(str(row["tasks"]), case.name, *cells, f"{row['quiet']['right']:.3f}")
    return table


def plot(result: dict[str, Any], path: Path) -> None:
    """p50 and p99 over the tasks, a line for each case."""
    figure = new_figure()
    axes = figure.subplots(1, 2, sharey=True)
    for axis, when in zip(axes, ("quiet", "training"), strict=True):
        for colour, case in enumerate(CASES):
            mine = [r for r in result["rows"] if Case(r["rows"], r["given"], r["own"]) == case]
            tasks = [r["tasks"] for r in mine]
            axis.plot(tasks, [r[when]["p50_ms"] for r in mine], f"C{colour}o-", label=case.name)
            axis.plot(tasks, [r[when]["p99_ms"] for r in mine], f"C{colour}.:")
        axis.axhline(MOST_P50_MS, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="tasks", title=when)
    axes[0].set_ylabel("ms (dotted: p99)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    save_figure(figure, path)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with mnist.npz")
    parser.add_argument("--tasks", default="1,100,2500", help="counts of tasks, with commas")
    parser.add_argument(
        "--queries", type=int, default=1000, help=f"of each case, if they take no more than {LONGEST_SECONDS:g} s"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and write nothing")
    options = parser.parse_args()
    options.tasks = [int(count) for count in options.tasks.split(",")]
    return options


def main() -> None:
    options = parse_options()
    logs.configure(level="error")
    started = time.monotonic()
    result = run(options.data, options.tasks, options.queries)
    command = " ".join(["python", "benchmarks/serve.py", *sys.argv[1:]])
    result = report(result, "serve", command, 0, time.monotonic() - started)
    if options.json:
        print(json.dumps(result))
        return
    console = Console()
    console.print(times_table(result))
    console.print(make_table(result))
    write_json(RESULT, result)
    plot(result, PLOT)


if __name__ == "__main__":
    main()
