"""`make demo`: a daemon learns a real stream whose task changes without notice, and is judged by the truth.

The stream: scikit-learn's handwritten digits in four versions (as they are, turned, inverted, their pixels shuffled),
as labelled batches dropped into a folder that a `supsupd start --watch` process watches. Nothing tells it which version
a batch is of, nor when it changes. Ends with 0 if it found exactly the four tasks and answers well.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from local_daemon import DaemonFailed, DaemonProcess, daemon_running, own_environment, script
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from sklearn.datasets import load_digits
from task_stream import StreamBatch, StreamTask, batch_name, count_overlap, iter_batches, name_owners, order_visits

from supsupd.client import Client, DaemonError, DaemonUnavailable

SEED = 1
HELD_OUT = 450
VISITS, VISIT_BATCHES, BATCH_ROWS = 3, 7, 64
PACE_SECONDS = 0.2
GROUP_ROWS = 16
WAIT_SECONDS = 60.0
LEAST_ACCURACY = 0.85
SHOWN_BATCHES = 14


class DemoFailed(Exception):
    """What the daemon found is not the truth."""


FAILURES = (DemoFailed, DaemonFailed, DaemonUnavailable, DaemonError, TimeoutError, subprocess.SubprocessError)


@dataclass(frozen=True)
class Digits:
    """The true tasks, and the held-out images (m, 8, 8) with their labels (m,)."""

    tasks: list[StreamTask]
    x: np.ndarray
    y: np.ndarray

    @classmethod
    def load(cls, rng: np.random.Generator) -> Digits:
        digits = load_digits()
        images, labels = digits.images.astype(np.uint8), digits.target
        rows, pixels = rng.permutation(len(images)), rng.permutation(64)
        train, held_out = rows[HELD_OUT:], rows[:HELD_OUT]
        transforms = {
            "as they are": lambda x: x,
            "turned by 90°": lambda x: np.rot90(x, axes=(1, 2)),
            "inverted": lambda x: 16 - x,
            "pixels shuffled": lambda x: x.reshape(-1, 64)[:, pixels].reshape(-1, 8, 8),
        }
        tasks = [StreamTask(name, change, images[train], labels[train]) for name, change in transforms.items()]
        return cls(tasks, images[held_out], labels[held_out])


@dataclass
class Board:
    """What the daemon has said so far about the stream, for a terminal or as plain lines."""

    client: Client
    tasks: list[StreamTask]
    batches: dict[str, StreamBatch]
    console: Console
    found: list[dict[str, Any]] = field(default_factory=list)
    seen: dict[str, str] = field(default_factory=dict)
    latest: deque[tuple[str, ...]] = field(default_factory=lambda: deque(maxlen=SHOWN_BATCHES))

    def update(self) -> None:
        """Asks the daemon; takes up every batch that it has decided since."""
        rows = [r for r in self.client.batches() if r["decision"] and self.seen.get(r["name"]) != r["state"]]
        self.found = self.client.tasks()
        accuracy = self._accuracy({r["task"] for r in rows if r["decision"] == "known"})
        for row in rows:
            self.seen[row["name"]] = row["state"]
            self._take(row, accuracy.get(row["batch"], ""))

    def _accuracy(self, tasks: Iterable[int]) -> dict[int, str]:
        """Batch id -> the share that the mask had right before it was trained on the batch, from its decision."""
        shares = {}
        for decision in (d for task in tasks for d in self.client.task(task)["decisions"] if d["decision"] == "known"):
            start, stop = decision["evidence"]["rows"]
            shares[decision["batch"]] = f"{1 - decision['evidence']['candidates'][0]['errors'] / (stop - start):.0%}"
        return shares

    def _take(self, row: dict[str, Any], accuracy: str) -> None:
        name = batch_name(row)
        truth = " → ".join(self.tasks[task].name for task in dict.fromkeys(self.batches[name].truth.tolist()))
        task = "-" if row["task"] is None else f"task {row['task']}"
        self.latest.append((name, row["decision"], task, accuracy, truth))
        if not self.console.is_terminal:
            self.console.print(f"{name}  {row['decision']:<6}  {task:<6}  {accuracy:>4}  ({truth})")

    def __rich__(self) -> Group:
        stream = Table("batch", "decision", "task", "right before training", "the truth, never told", title="stream")
        for line in self.latest:
            stream.add_row(*line, style={"new": "bold green", "unsure": "yellow"}.get(line[1]))
        found = Table("task", "batches", "mask version", "accuracy", title=f"{len(self.found)} tasks found")
        for task in self.found:
            accuracy = "-" if task["accuracy"] is None else f"{task['accuracy']:.0%}"
            found.add_row(task["name"], str(task["batches"]), str(task["version"]), accuracy)
        return Group(stream, found) if self.console.is_terminal else Group(found)


def play(daemon: DaemonProcess, board: Board) -> None:
    """Drops the batches at a pace that can be watched, and waits until the daemon has decided them all."""
    with Live(board, console=board.console, auto_refresh=False) as live:
        for batch in board.batches.values():
            daemon.check_alive()
            daemon.drop(daemon.stage(batch.name, batch.x, batch.y))
            board.update()
            live.refresh()
            time.sleep(PACE_SECONDS)
        board.client.wait(WAIT_SECONDS)
        board.update()
        live.refresh()


def judge_stream(board: Board) -> dict[int, int]:
    """Found task -> true task. Raises DemoFailed unless they are one to one and each batch went to its own.

    A batch that straddles two tasks may go to either, or stay unsure.
    """
    rows = board.client.batches()
    owners = name_owners(count_overlap(rows, board.batches))
    if len(owners) != len(board.tasks) or len(set(owners.values())) != len(board.tasks):
        names = [board.tasks[true].name for true in owners.values()]
        raise DemoFailed(f"{len(board.tasks)} tasks are true, but the tasks found are of: {', '.join(names) or '-'}")
    for row in rows:
        truth = set(board.batches[batch_name(row)].truth.tolist())
        straddles = len(truth) > 1
        if row["state"] != "committed" and not straddles:
            raise DemoFailed(f"{row['name']} stayed {row['state']}: {row['reason']}")
        if row["state"] == "committed" and owners[row["task"]] not in truth:
            raise DemoFailed(f"{row['name']} went to task {row['task']}, which it is not of: {row['reason']}")
    return owners


@dataclass
class Score:
    """Of one true task: groups, groups routed right, images, images labelled right; the first answers."""

    groups: int = 0
    routed: int = 0
    images: int = 0
    right: int = 0
    example: str = ""

    def add(self, answer: list[dict[str, Any]], labels: np.ndarray, routed: bool) -> None:
        predicted = [row["label"] for row in answer]
        self.example = self.example or f"{_digits(predicted[:8])} ({_digits(labels[:8])})"
        self.groups += 1
        self.routed += routed
        self.images += len(labels)
        self.right += int((np.array(predicted) == labels).sum())


def judge_predictions(board: Board, digits: Digits, owners: dict[int, int]) -> list[Score]:
    """Held-out images under every true task, in groups whose task the daemon infers."""
    scores = [Score() for _ in digits.tasks]
    for true, task in enumerate(digits.tasks):
        for start in range(0, len(digits.x) - GROUP_ROWS + 1, GROUP_ROWS):
            part = slice(start, start + GROUP_ROWS)
            answer = board.client.predict(task.transform(digits.x[part]))
            scores[true].add(answer, digits.y[part], owners[answer[0]["task"]] == true)
    return scores


def show_predictions(console: Console, tasks: list[StreamTask], scores: list[Score]) -> None:
    title = f"held-out images, {GROUP_ROWS} at a time, task inferred"
    table = Table("true task", "groups routed", "accuracy", "first answers (truth)", title=title)
    for task, score in zip(tasks, scores, strict=True):
        routed = f"{score.routed} of {score.groups}"
        table.add_row(task.name, routed, f"{score.right / score.images:.1%}", score.example)
    console.print(table)


def run(console: Console) -> str:
    """The demo; returns its result in a line. Raises DemoFailed, DaemonFailed and the client's exceptions."""
    started = time.monotonic()
    rng = np.random.default_rng(SEED)
    digits = Digits.load(rng)
    visits = order_visits(len(digits.tasks), VISITS, rng)
    stream = list(iter_batches(digits.tasks, visits, VISIT_BATCHES, BATCH_ROWS, rng))
    console.print(f"{len(stream)} batches of digits, {len(visits) - 1} changes of task; starting the daemon …")
    with daemon_running() as daemon, Client(daemon.socket) as client:
        board = Board(client, digits.tasks, {batch.name: batch for batch in stream}, console)
        play(daemon, board)
        owners = judge_stream(board)
        console.print("\n$ supsup-cli tasks list")
        list_tasks: list[str | Path] = [script("supsup-cli"), "tasks", "list", "--socket", daemon.socket]
        subprocess.run(list_tasks, check=True, env=own_environment())
        scores = judge_predictions(board, digits, owners)
        show_predictions(console, digits.tasks, scores)
        accuracy = sum(s.right for s in scores) / sum(s.images for s in scores)
        routed = sum(s.routed for s in scores) / sum(s.groups for s in scores)
        result = f"accuracy {accuracy:.1%}, {routed:.0%} of the groups routed right"
        if accuracy < LEAST_ACCURACY:
            raise DemoFailed(f"{result}; at least {LEAST_ACCURACY:.0%} are expected")
    return f"{len(owners)} of {len(digits.tasks)} tasks found, {result}, in {time.monotonic() - started:.0f} s"


def main() -> int:
    """The exit code: 0, or 1 after one line that says why."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console()
    try:
        console.print(f"[bold green]ok[/]: {run(console)}")
    except FAILURES as error:
        print(*getattr(error, "__notes__", []), f"demo: failed: {error}", sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _digits(labels: Iterable[int]) -> str:
    return "".join(str(label) for label in labels)


if __name__ == "__main__":
    sys.exit(main())
