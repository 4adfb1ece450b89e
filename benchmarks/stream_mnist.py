"""Streams of MNIST tasks through the daemon itself: files in a watched folder, answers over the socket.

Each task comes twice, unannounced, in labelled batches of 128 images that do not end where a task ends. Prints what the
daemon found against the truth, as a table, and writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, DaemonProcess, StreamBatch, count_overlap, daemon_running, iter_batches, order_visits
from mnist_tasks import Images, StreamKind, stream_kinds
from rich.console import Console
from rich.table import Table
from stream_scores import GROUP_ROWS, Answers, Sorting, score_before_training

from supsupd import __version__
from supsupd.client import Client

VISITS, VISIT_BATCHES, BATCH_ROWS = 2, 12, 128
LEAST_PURITY = 0.99
WAIT_SECONDS = 3600.0
RESULTS = ROOT / "docs" / "results" / "stream_mnist.json"


@dataclass(frozen=True)
class Result:
    """One stream: what was true, what was found, and how fast (from the first file to the last decision)."""

    stream: str
    true_tasks: int
    masks: int
    sorting: Sorting
    answers: Answers
    prequential: float
    seconds: float
    least_accuracy: float

    @property
    def speed(self) -> float:
        """Batches per second."""
        return self.sorting.batches / self.seconds

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"batches_per_second": self.speed}


@dataclass(frozen=True)
class Data:
    train: Images
    test: Images


def run_stream(name: str, kind: StreamKind, data: Data, seed: int, config: Path | None) -> Result:
    """One stream through a daemon of its own."""
    tasks = kind.make(data.train, np.random.default_rng(seed))
    tests = kind.make(data.test, np.random.default_rng(seed))
    rng = np.random.default_rng([seed, 1])
    visits = order_visits(len(tasks), VISITS, rng)
    batches = {b.name: b for b in iter_batches(tasks, visits, VISIT_BATCHES, BATCH_ROWS, rng)}
    with daemon_running(config) as daemon, Client(daemon.socket) as client:
        seconds = feed(daemon, client, list(batches.values()))
        rows = client.batches()
        overlap = count_overlap(rows, batches)
        return Result(
            stream=name,
            true_tasks=len(tasks),
            masks=len(client.tasks()),
            sorting=Sorting.of(rows, batches),
            answers=Answers.ask(client, tests, overlap),
            prequential=score_before_training(client, overlap),
            seconds=seconds,
            least_accuracy=kind.least_accuracy,
        )


def feed(daemon: DaemonProcess, client: Client, batches: list[StreamBatch]) -> float:
    """Drops all batches as fast as they can be renamed; the seconds until every one is decided."""
    staged = [daemon.stage(batch.name, batch.x, batch.y) for batch in batches]
    started = time.monotonic()
    for path in staged:
        daemon.drop(path)
    client.wait(WAIT_SECONDS)
    return time.monotonic() - started


def make_table(results: list[Result]) -> Table:
    """A column for each stream, a row for each measure, the targets beside what has one."""
    table = Table("", *(result.stream for result in results), title="MNIST streams through the daemon")
    for row in zip(*(_cells(result) for result in results), strict=True):
        labels, cells = zip(*row, strict=True)
        table.add_row(labels[0], *cells)
    return table


def _cells(result: Result) -> list[tuple[str, str]]:
    sorting, answers, least = result.sorting, result.answers, result.least_accuracy
    tasks_found = f"{result.masks}/{result.true_tasks}"
    return [
        ("masks/true tasks", _judged(tasks_found, result.masks == result.true_tasks)),
        ("assigned/all batches", f"{sorting.assigned}/{sorting.batches}"),
        ("purity, batches", _against(sorting.purity, LEAST_PURITY)),
        ("purity, rows (at most)", f"{sorting.row_purity:.4f} ({sorting.row_ceiling:.4f})"),
        ("adjusted Rand index", f"{sorting.rand:.4f}"),
        ("task inferred, 1 image", f"{answers.routed_single:.4f}"),
        (f"task inferred, {GROUP_ROWS}", _against(answers.routed_group, 1.0)),
        ("accuracy, mask given", _against(answers.accuracy_given, least)),
        ("  of the worst task", f"{answers.accuracy_given_least:.4f}"),
        (f"accuracy, inferred, {GROUP_ROWS}", _against(answers.accuracy_inferred, least)),
        ("  of the worst task", f"{answers.accuracy_inferred_least:.4f}"),
        ("right before training", f"{result.prequential:.4f}"),
        ("batches per second", f"{result.speed:.2f}"),
    ]


def _against(value: float, target: float) -> str:
    reached = value >= target
    return _judged(f"{value:.4f} {'≥' if reached else '<'} {target:.2f}", reached)


def _judged(text: str, reached: bool) -> str:
    return f"[{'green' if reached else 'red'}]{text}[/]"


def write_json(path: Path, results: list[Result], options: argparse.Namespace) -> None:
    """The results with what is needed to read them later."""
    report = {
        "version": __version__,
        "seed": options.seed,
        "config": options.config.read_text(encoding="utf-8") if options.config else None,
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "streams": [result.to_json() for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="mnist.npz: train_x, train_y, test_x, test_y")
    parser.add_argument("--streams", default="permuted,rotated,split", help=f"of {', '.join(stream_kinds())}")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks and the stream")
    parser.add_argument("--config", type=Path, help="the daemon's settings, in TOML")
    options = parser.parse_args()
    options.streams = options.streams.split(",")
    if unknown := set(options.streams) - set(stream_kinds()):
        parser.error(f"no such stream: {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    options = parse_options()
    test = Images.load(options.data, "test").shuffled(np.random.default_rng(options.seed))
    data = Data(Images.load(options.data, "train"), test)
    console = Console()
    results = []
    for name in options.streams:
        results.append(run_stream(name, stream_kinds()[name], data, options.seed, options.config))
        console.print(make_table(results[-1:]))
    write_json(options.json, results, options)
    if len(results) > 1:
        console.print(make_table(results))


if __name__ == "__main__":
    main()
