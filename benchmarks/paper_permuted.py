"""PermutedMNIST, GNu: tasks given in training, inferred from one image (Supermasks in Superposition, section 4.2)."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from common import StreamTask
from mnist_tasks import Images, permuted
from paper_engine import Engine, Setup, Tested, accuracy_given, ask, begin_task, found, in_processes, mnist
from paper_report import SUPSUP, measure, new_figure, save_figure

from supsupd.choices import Method, Objective
from supsupd.learning.predictor import Predictor
from supsupd.learning.records import TaskRecord
from supsupd.sections import LearningSettings, NetworkSettings, RecognitionSettings

PAPER = 94.91
LEAST = 95.5
COUNTS = (10, 50, 100, 250)
QUERIES = 2500
"""Images asked, about: spread evenly over the tasks."""
STEPS, FULL_STEPS = 550, 1000
WAYS: tuple[tuple[Method, Objective], ...] = (("exact", "entropy"), ("one-shot", "entropy"), ("one-shot", "g"))


def setup(full: bool, seed: int) -> Setup:
    """LeNet 300-100; one batch of all 60,000 images begins a task."""
    steps = FULL_STEPS if full else STEPS
    # Label smoothing and larger steps give a point more in fewer steps, and One-Shot then finds no task among many.
    learning = LearningSettings(
        lr=6e-4, steps=steps, max_steps=steps, label_smoothing=0.0, averaging=0.99, held_out=0.01, seed=seed
    )
    network = NetworkSettings(hidden=[300, 100], outputs=200, seed=seed)
    return Setup(network, learning, RecognitionSettings(scenario="GNu"))


def run(data: Path, full: bool, seed: int) -> dict[str, Any]:
    """Trains every mask once, then asks among the first 10, 50, 100 and all of them."""
    tasks = in_processes(partial(train, data, full, seed), max(COUNTS), "masks")
    engine, images = _engine(data, full, seed), mnist(data, "test")
    orders = permuted(images, np.random.default_rng(seed), max(COUNTS))
    given = accuracy_given(engine.predictor(tasks), _tests(orders, 10 * QUERIES))
    curve = [_point(engine.predictor(tasks[:count]), _tests(orders[:count], QUERIES)) for count in COUNTS]
    return {
        "settings": engine.setup.to_json() | {"training_rows": len(mnist(data, "train").y), "queries": QUERIES},
        "measures": _measures(curve, float(np.mean(given))),
        "curve": curve,
        "accuracy_given": given,
    }


def train(data: Path, full: bool, seed: int, index: int) -> TaskRecord:
    """The mask of one permutation."""
    engine, images = _engine(data, full, seed), _standardised(data, full, seed)
    task = permuted(images, np.random.default_rng(seed), max(COUNTS))[index]
    samples = engine.prepared(task.transform(task.x).reshape(len(task.y), -1), task.y)
    return begin_task(engine, samples, index + 1, f"{seed} {task.name}")


@cache
def _engine(data: Path, full: bool, seed: int) -> Engine:
    images = mnist(data, "train")
    return found(setup(full, seed), images.x[:1000], images.y[:1000])


@cache
def _standardised(data: Path, full: bool, seed: int) -> Images:
    """Before the pixels change places: it is the same, and done once."""
    images = mnist(data, "train")
    x = _engine(data, full, seed).samples(images.x, images.y).x.numpy()
    return Images(x.reshape(images.x.shape), images.y)


def _tests(orders: list[StreamTask], rows: int) -> list[Tested]:
    """About `rows` test images, as many of each task."""
    each = max(1, rows // len(orders))
    starts = [(each * index) % (len(orders[0].y) - each + 1) for index in range(len(orders))]
    parts = [slice(start, start + each) for start in starts]
    return [
        Tested(index + 1, task.transform(task.x[part]), task.y[part])
        for index, (task, part) in enumerate(zip(orders, parts, strict=True))
    ]


def _point(predictor: Predictor, tests: list[Tested]) -> dict[str, Any]:
    asked = {f"{method} {objective}": ask(predictor, tests, 1, method, objective) for method, objective in WAYS}
    return {"tasks": len(tests)} | {way: right.to_json() for way, right in asked.items()}


def _measures(curve: list[dict[str, Any]], given: float) -> list[dict[str, Any]]:
    rows = []
    for point in curve:
        last = point["tasks"] == max(COUNTS)
        for way in (f"{method} {objective}" for method, objective in WAYS):
            what = f"{point['tasks']} tasks, one image, {way}: accuracy"
            target = LEAST if last and way == "exact entropy" else None
            published = (PAPER, f"{SUPSUP}, one-shot") if last else None
            rows.append(measure(what, 100 * point[way]["accuracy"], target, published))
            rows.append(measure(f"{point['tasks']} tasks, one image, {way}: task right", 100 * point[way]["task"]))
    return [*rows, measure(f"{max(COUNTS)} tasks, task given: accuracy", 100 * given)]


def plot(result: dict[str, Any], path: Path) -> None:
    """Accuracy against the number of tasks."""
    figure = new_figure()
    axes = figure.add_subplot()
    counts = [point["tasks"] for point in result["curve"]]
    for way in (f"{method} {objective}" for method, objective in WAYS):
        axes.plot(counts, [100 * point[way]["accuracy"] for point in result["curve"]], marker="o", label=way)
    axes.plot([max(COUNTS)], [PAPER], "k*", markersize=10, label="published, one-shot")
    axes.set(xlabel="tasks", ylabel="task and label right with one image, %", title="PermutedMNIST, GNu, LeNet 300-100")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
