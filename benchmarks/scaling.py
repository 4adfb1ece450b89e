"""What the number of tasks costs: a learned batch, a query, and memory, from ten tasks to a hundred thousand.

State directories of LeNet 300-100 with 500 outputs (`filled.py`: 27 really trained masks of permuted, rotated and split
MNIST, the others perturbed) are loaded as the daemon loads them, with its own settings but for the memory limit. A
learned batch is one step of its worker: recognition, training, one transaction, the new snapshot. Queries are about the
really trained tasks; beyond 1,024 tasks they go through the index, and at the largest size their answers are compared
with those of exact scoring under every mask.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import ROOT, StreamTask
from filled import TRAINING_ROWS, all_kinds, train
from loading import THREADS, in_process, loaded, predictor_of, resident, timed, warm_up
from paper_report import make_table, measure, new_figure, report, save_figure, write_json
from rich.console import Console

from storage import ledger
from streams.batch import Batch
from streams.formats import encode
from supsupd import logs
from supsupd.learning.predictor import Predictor
from supsupd.worker import Worker

RESULT, PLOT = ROOT / "docs" / "results" / "scaling.json", ROOT / "docs" / "plots" / "scaling.png"
TASKS = (10, 100, 1000, 2500, 10_000, 100_000)
MOST_LEARNING_TASKS = 2500
"""Learned batches are measured up to so many."""
MEMORY_BYTES = 1 << 30
"""Of packed masks: 27,000 of them."""
BATCH_ROWS, BATCHES, WARM_UP = 128, 30, 3
QUERIES, GROUPS, GROUP_ROWS = 108, 9, 32
MOST_RISE, MOST_QUERY_MS, LEAST_AGREEMENT, MOST_INDEX_SHARE = 1.3, 60.0, 0.99, 0.25


# -- learned batches ------------------------------------------------------------------------------------------------


def learn(worker: Worker, views: Sequence[StreamTask], switching: bool) -> float:
    """Median milliseconds for a batch of known tasks: of one, or of another one each time."""
    rng, times = np.random.default_rng(int(switching)), []
    for number in range(WARM_UP + BATCHES):
        view = views[number % len(views) if switching else 0]
        rows = rng.choice(np.arange(TRAINING_ROWS, len(view.y)), BATCH_ROWS, replace=False)
        stage(worker, f"{switching} {number}", view.transform(view.x[rows]), view.y[rows])
        times.append(timed(worker.step))
    return median(times[WARM_UP:])


def stage(worker: Worker, name: str, x: np.ndarray, y: np.ndarray) -> None:
    """Puts a batch into the ledger, as a source would."""
    payload = encode(Batch(x, y.astype(np.int64)))
    digest = hashlib.sha256(payload).hexdigest()
    worker.spool.store({digest: payload})
    with worker.database.write() as session:
        ledger.stage(session, ledger.Entry("benchmark", name, digest, len(payload), len(x), labelled=True))


# -- queries --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """Images (n, 28, 28) of one trained task, and its kind."""

    x: np.ndarray
    kind: str


def questions(views: Sequence[StreamTask], places: Sequence[int], count: int, rows: int) -> list[Question]:
    """About the tasks at these places in turn, different images each time."""
    found = []
    for number in range(count):
        place = places[number % len(places)]
        view, start = views[place], (number // len(places)) * rows
        found.append(Question(view.transform(view.x[start : start + rows]), kind_of(place)))
    return found


def kind_of(place: int) -> str:
    return "permuted" if place < 10 else "rotated" if place < 22 else "split"


def ask(predictor: Predictor, asked: Sequence[Question]) -> tuple[float, np.ndarray]:
    """Median milliseconds of a query, and the task that each is answered by (n,)."""
    answers: list[int] = []

    def one(question: Question) -> None:
        answers.append(int(predictor.predict(question.x, None, per_sample=False).task[0]))

    one(asked[0])
    times = [timed(lambda question=question: one(question)) for question in asked]
    return round(median(times), 2), np.array(answers[1:])


def everywhere(whole: Predictor, asked: Sequence[Question]) -> np.ndarray:
    """The task under exact scoring of every mask (n,); single images share a pass over the masks."""
    if len(asked[0].x) > 1:
        return ask(whole, asked)[1]
    return whole.predict(np.concatenate([q.x for q in asked]), None, per_sample=True).task


def agreement(found: np.ndarray, exact: np.ndarray, asked: Sequence[Question]) -> dict[str, float]:
    """The share of queries answered alike, by kind of task."""
    kinds = np.array([q.kind for q in asked])
    return {kind: round(float((found == exact)[kinds == kind].mean()), 4) for kind in dict.fromkeys(kinds.tolist())}


# -- one size -------------------------------------------------------------------------------------------------------


def measured(data: Path, state: Path, compare: bool) -> dict[str, Any]:
    """All about the tasks of a state directory."""
    warm_up()
    before = resident()
    with loaded(state, MEMORY_BYTES) as worker:
        row = about_memory(worker, before)
        asked = make_questions(data, row["tasks"])
        answers = {}
        for name, questions_asked in asked.items():
            row[f"{name}_ms"], answers[name] = ask(predictor_of(worker), questions_asked)
        if row["tasks"] <= MOST_LEARNING_TASKS:
            known = all_kinds(data, "train", 0)[: row["tasks"]]
            row["batch_ms"] = round(learn(worker, known, switching=False), 1)
            row["switching_batch_ms"] = round(learn(worker, known, switching=True), 1)
            assert len(predictor_of(worker).tasks) == row["tasks"]
    if compare:
        with loaded(state) as worker:
            whole = replace(predictor_of(worker), shortlist=None)
            for name, answered in answers.items():
                row[f"{name}_agreement"] = agreement(answered, everywhere(whole, asked[name]), asked[name])
    return row


def about_memory(worker: Worker, before: int) -> dict[str, Any]:
    tasks = predictor_of(worker).tasks
    masks, densities = [task.mask for task in tasks], [task.inputs for task in tasks]
    index = sum(d.coefficients.nbytes for d in densities if d is not None)
    return {
        "tasks": len(masks),
        "stored_bytes_per_task": round(worker.settings.store.stat().st_size / len(masks)),
        "resident_bytes_per_task": round((resident() - before) / len(masks)),
        "packed_bytes_per_task": masks[0].nbytes,
        "index_bytes_per_task": round(index / len(masks)),
        "masks_in_memory": sum(mask.hot is not None for mask in masks),
    }


def make_questions(data: Path, tasks: int) -> dict[str, list[Question]]:
    """What is asked of so many tasks: single images, and groups of them."""
    views = all_kinds(data, "test", 0)
    known = range(min(tasks, len(views)))
    some = known[:: -(-len(known) // GROUPS)]
    return {
        "one": questions(views, known, QUERIES, 1),
        "many": questions(views, some, GROUPS, GROUP_ROWS),
    }


# -- all sizes ------------------------------------------------------------------------------------------------------


def size(options: argparse.Namespace, tasks: int) -> dict[str, Any]:
    """All about so many tasks."""
    compare = ["--compare"] if options.compare or tasks == max(TASKS) else []
    return in_process(__file__, train(options.data, 0, all_kinds), tasks, ["--data", str(options.data), *compare])


def measures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: every size, and the targets."""
    first, table = rows[0], []
    for row in rows:
        many, last = f"{row['tasks']} tasks", row is rows[-1] and row["tasks"] >= 100_000
        table.append(
            measure(f"{many}: query, one image, ms", row["one_ms"], MOST_QUERY_MS if last else None, sense="≤")
        )
        table.append(
            measure(f"{many}: query, 32 images, ms", row["many_ms"], MOST_QUERY_MS if last else None, sense="≤")
        )
        for key, what in (("batch_ms", "same task"), ("switching_batch_ms", "other task each")):
            if key in row:
                table.append(measure(f"{many}: learned batch, {what}, ms", row[key]))
                times = round(row[key] / first[key], 3)
                table.append(measure(f"{many}: times that of {first['tasks']}", times, MOST_RISE, sense="≤"))
        share = round(row["index_bytes_per_task"] / row["packed_bytes_per_task"], 4)
        table.append(measure(f"{many}: index / packed bytes", share, MOST_INDEX_SHARE, sense="≤"))
        for name, what in (("one", "one image"), ("many", "32 images")):
            for kind, share in row.get(f"{name}_agreement", {}).items():
                table.append(measure(f"{many}: {kind}, {what}: answered as by exact", share, LEAST_AGREEMENT))
    return table


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure = new_figure()
    axes = figure.subplots()
    for key, label in (
        ("one_ms", "query, one image"),
        ("many_ms", "query, 32 images"),
        ("batch_ms", "learned batch, same task"),
        ("switching_batch_ms", "learned batch, another task each time"),
    ):
        some = [row for row in rows if key in row]
        axes.loglog([row["tasks"] for row in some], [row[key] for row in some], marker="o", label=label)
    axes.set(xlabel="tasks", ylabel="ms", title="What the number of tasks costs, LeNet 300-100 with 500 outputs")
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with mnist.npz")
    parser.add_argument("--tasks", help=f"numbers of tasks, by default {','.join(map(str, TASKS))}")
    parser.add_argument("--compare", action="store_true", help="with exact scoring of every mask, whatever the size")
    parser.add_argument("--json", action="store_true", help="print JSON alone and write nothing")
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sizes = [int(size) for size in options.tasks.split(",")] if options.tasks else list(TASKS)
    return options


def main() -> None:
    logs.configure("console", "error")
    options = parse_options()
    if options.state is not None:
        print(json.dumps(measured(options.data, options.state, options.compare)))
        return
    started = time.monotonic()
    rows = [size(options, tasks) for tasks in options.sizes]
    if options.json:
        print(json.dumps(rows))
        return
    settings = {"threads": THREADS, "memory_bytes": MEMORY_BYTES, "batch_rows": BATCH_ROWS}
    result = {"settings": settings, "measures": measures(rows), "rows": rows}
    result = report(result, "scaling", "python benchmarks/scaling.py", 0, time.monotonic() - started)
    Console().print(make_table(result))
    if options.tasks is None:
        write_json(RESULT, result)
        plot(rows, PLOT)


if __name__ == "__main__":
    main()
