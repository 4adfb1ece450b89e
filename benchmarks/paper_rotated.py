"""RotatedMNIST, GNu: 36 turns of 10 degrees on a wide network, Binary, One-Shot and exact (section 4.2).

Exact scoring is asked twice: by the entropy of each mask's answer, and by the features of the whole network.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from mnist_tasks import turned
from paper_engine import Engine, Setup, Tested, accuracy_given, ask, begin_task, found, in_processes, mnist
from paper_report import measure, new_figure, save_figure
from rich.progress import track

from supsupd.choices import Method, Objective
from supsupd.learning.features import FeatureModel
from supsupd.learning.predictor import Predictor
from supsupd.learning.records import TaskRecord
from supsupd.sections import LearningSettings, NetworkSettings, RecognitionSettings

TASKS = 36
LEAST = 96.0
IMAGES = (1, 16, 128)
WAYS: dict[str, tuple[Method, Objective]] = {
    "binary": ("binary", "entropy"),
    "one-shot": ("one-shot", "entropy"),
    "exact": ("exact", "entropy"),
    "exact features": ("exact", "features"),
}
ROWS, STEPS = 40_000, 350
FULL_ROWS, FULL_STEPS = 60_000, 1000
FEATURE_ROWS = 10_000
"""Training images of each task that the features are learned from."""
TEST_ROWS = 2560
QUERIES: dict[Method, int] = {"binary": 1, "one-shot": 4, "exact": 3}
FULL_QUERIES: dict[Method, int] = {"binary": 10, "one-shot": 20, "exact": 20}
"""For each task and size of query; of single images ten times as many (Binary: twice), they are cheap."""


def setup(full: bool, seed: int) -> Setup:
    """FC 1024-1024 with 200 outputs; one batch begins a task."""
    steps = FULL_STEPS if full else STEPS
    return Setup(
        NetworkSettings(hidden=[1024, 1024], outputs=200, seed=seed),
        LearningSettings(
            lr=5e-4, steps=steps, max_steps=steps, label_smoothing=0.05, averaging=0.99, held_out=0.01, seed=seed
        ),
        RecognitionSettings(scenario="GNu", features=True),
    )


def run(data: Path, full: bool, seed: int) -> dict[str, Any]:
    """Trains a mask for each angle, then asks with 1, 16 and 128 images."""
    tasks = in_processes(partial(train, data, full, seed), TASKS, "masks")
    engine, images = _engine(data, full, seed), mnist(data, "test")
    predictor = engine.predictor(tasks, _features(engine, data))
    x, y = images.x[:TEST_ROWS], images.y[:TEST_ROWS]
    tests = [Tested(index + 1, turned(x, index * 360 // TASKS), y) for index in range(TASKS)]
    given = accuracy_given(predictor, tests)
    queries = FULL_QUERIES if full else QUERIES
    points = [_point(predictor, tests, rows, queries) for rows in IMAGES]
    return {
        "settings": engine.setup.to_json() | {"training_rows": FULL_ROWS if full else ROWS, "tasks": TASKS},
        "measures": _measures(points, float(np.mean(given))),
        "points": points,
        "accuracy_given": given,
    }


def train(data: Path, full: bool, seed: int, index: int) -> TaskRecord:
    """The mask of one angle."""
    rows = FULL_ROWS if full else ROWS
    engine, images = _engine(data, full, seed), mnist(data, "train")
    angle = index * 360 // TASKS
    samples = engine.samples(turned(images.x[:rows], angle), images.y[:rows])
    return begin_task(engine, samples, index + 1, f"{seed} {angle}")


@cache
def _engine(data: Path, full: bool, seed: int) -> Engine:
    images = mnist(data, "train")
    return found(setup(full, seed), images.x[:1000], images.y[:1000])


def _features(engine: Engine, data: Path) -> FeatureModel:
    """What recognition.features would keep of these tasks' images."""
    model = FeatureModel(engine.network, engine.normaliser.transforms)
    images = mnist(data, "train")
    for index in track(range(TASKS), "features"):
        turns = turned(images.x[:FEATURE_ROWS], index * 360 // TASKS)
        samples = engine.samples(turns, images.y[:FEATURE_ROWS])
        model = model.learned(index + 1, samples.x, samples.y)
    return model


def _point(predictor: Predictor, tests: list[Tested], rows: int, queries: dict[Method, int]) -> dict[str, Any]:
    point: dict[str, Any] = {"images": rows}
    for name, (method, objective) in WAYS.items():
        more = 1 if rows > 1 else 2 if method == "binary" else 10
        count = min(queries[method] * more * rows, TEST_ROWS)
        thinned = [Tested(t.task, t.x[:count], t.y[:count]) for t in tests]
        found = ask(predictor, thinned, rows, method, objective)
        point[name] = found.to_json() | {"queries": len(tests) * count // rows}
    return point


def _measures(points: list[dict[str, Any]], given: float) -> list[dict[str, Any]]:
    rows = []
    for point in points:
        for name in WAYS:
            count = f"{point['images']} image{'s' * (point['images'] > 1)}, {name}"
            target = LEAST if name == "exact features" and point["images"] == max(IMAGES) else None
            rows.append(measure(f"{count}: accuracy", 100 * point[name]["accuracy"], target))
            rows.append(measure(f"{count}: task right", 100 * point[name]["task"]))
    return [*rows, measure("task given: accuracy", 100 * given)]


def plot(result: dict[str, Any], path: Path) -> None:
    """Accuracy and task inference against the images of a query."""
    figure = new_figure()
    for axes, what in zip(figure.subplots(1, 2, sharey=True), ("accuracy", "task"), strict=True):
        for name in WAYS:
            values = [100 * point[name][what] for point in result["points"]]
            axes.plot([p["images"] for p in result["points"]], values, marker="o", label=name)
        axes.set(xscale="log", xlabel="images of a query", title={"task": "task right, %"}.get(what, "accuracy, %"))
        axes.set_xticks(IMAGES, [str(rows) for rows in IMAGES])
        axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle("RotatedMNIST, 36 turns of 10°, GNu, FC 1024-1024")
    save_figure(figure, path)
