"""Where plain fine-tuning, one network per task, BatchE and PSP stand beside SupSup: one PermutedMNIST stream, GG."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from common import StreamTask
from mnist_tasks import Images, permuted
from paper_engine import Engine, Setup, begin_task, found, mnist
from paper_report import measure, new_figure, save_figure
from references import REFERENCES, Reference, Shape, Training, accuracy, train
from rich.progress import track

from supsupd.sections import LearningSettings, NetworkSettings, RecognitionSettings

TASKS, FULL_TASKS = 10, 50
STEPS, FULL_STEPS = 300, 1000
MINIBATCH = 128
REFERENCE_LR = 1e-3
HIDDEN = (300, 100)
CLASSES = 10
TEST_ROWS = 2000
OURS = "SupSup"


def setup(full: bool, seed: int) -> Setup:
    """LeNet 300-100 with 100 outputs, as many steps as the references."""
    steps = FULL_STEPS if full else STEPS
    return Setup(
        NetworkSettings(hidden=list(HIDDEN), outputs=100, seed=seed),
        LearningSettings(lr=1e-3, steps=steps, max_steps=steps, minibatch=MINIBATCH, held_out=0.01, seed=seed),
        RecognitionSettings(scenario="GG"),
    )


def run(data: Path, full: bool, seed: int) -> dict[str, Any]:
    """Each method learns the tasks one after the other and is tested after each on all so far."""
    count = FULL_TASKS if full else TASKS
    engine = _engine(data, full, seed)
    stream = _Stream.of(engine, data, count, seed)
    training = Training(engine.setup.learning.steps, MINIBATCH, REFERENCE_LR, seed)
    methods: dict[str, dict[str, Any]] = {}
    for name, kind in REFERENCES.items():
        reference = kind(Shape((engine.network.architecture.inputs, *HIDDEN, CLASSES), seed))
        methods[name] = _learn(reference, stream, training, name)
    methods[OURS] = _learn_ours(engine, stream)
    for method in methods.values():
        method["bytes"] = method["shared_bytes"] + count * method["task_bytes"]
    return {
        "settings": engine.setup.to_json()
        | {"tasks": count, "references": {"lr": REFERENCE_LR, "optimiser": "rmsprop"}},
        "measures": _measures(methods),
        "methods": methods,
    }


@cache
def _engine(data: Path, full: bool, seed: int) -> Engine:
    images = mnist(data, "train")
    return found(setup(full, seed), images.x[:1000], images.y[:1000])


class _Stream:
    """The tasks' rows, standardised, float32 (n, inputs), made when they are asked for."""

    def __init__(self, train: list[StreamTask], test: list[StreamTask]) -> None:
        self._train, self._test = train, test

    @classmethod
    def of(cls, engine: Engine, data: Path, count: int, seed: int) -> _Stream:
        def tasks(images: Images) -> list[StreamTask]:
            rows = engine.samples(images.x, images.y).x.numpy().reshape(images.x.shape)
            return permuted(Images(rows, images.y), np.random.default_rng(seed), count)

        test = mnist(data, "test")
        return cls(tasks(mnist(data, "train")), tasks(Images(test.x[:TEST_ROWS], test.y[:TEST_ROWS])))

    def __len__(self) -> int:
        return len(self._train)

    def training(self, task: int) -> tuple[np.ndarray, np.ndarray]:
        return _rows(self._train[task])

    def test(self, task: int) -> tuple[np.ndarray, np.ndarray]:
        return _rows(self._test[task])


def _rows(task: StreamTask) -> tuple[np.ndarray, np.ndarray]:
    return task.transform(task.x).reshape(len(task.y), -1), task.y.astype(np.int64)


def _learn(reference: Reference, stream: _Stream, training: Training, name: str) -> dict[str, Any]:
    matrix = []
    for task in track(range(len(stream)), name):
        train(reference, task, stream.training(task), training)
        matrix.append([accuracy(reference, seen, *stream.test(seen)) for seen in range(task + 1)])
    return _outcome(matrix, reference.shared_bytes, reference.task_bytes)


def _learn_ours(engine: Engine, stream: _Stream) -> dict[str, Any]:
    records, matrix = [], []
    for task in track(range(len(stream)), OURS):
        samples = engine.prepared(*stream.training(task))
        records.append(begin_task(engine, samples, task + 1, f"{engine.setup.network.seed} order {task}"))
        matrix.append([_accuracy_ours(engine, r.packed, *stream.test(seen)) for seen, r in enumerate(records)])
    return _outcome(matrix, len(engine.network.packed_signs), engine.network.architecture.mask_bytes)


def _accuracy_ours(engine: Engine, packed: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    samples = engine.prepared(x, y)
    predicted = engine.network.forward(samples.x, packed)[:, : len(engine.classes)].argmax(dim=1)
    return float((predicted == samples.y).float().mean())


def _outcome(matrix: list[list[float]], shared: int, each: int) -> dict[str, Any]:
    """Accuracy after each task; forgetting: what tasks have lost at the end since they were learned (Lopez-Paz)."""
    lost = [matrix[task][task] - matrix[-1][task] for task in range(len(matrix))]
    return {
        "accuracy": round(float(np.mean(matrix[-1])), 5),
        "forgetting": round(float(np.mean(lost)), 5),
        "accuracy_after": [round(float(np.mean(row)), 5) for row in matrix],
        "shared_bytes": shared,
        "task_bytes": each,
    }


def _measures(methods: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for name, method in methods.items():
        rows.append(measure(f"{name}: accuracy, task given", 100 * method["accuracy"]))
        zero = 0.0 if name == OURS else None
        rows.append(measure(f"{name}: forgetting, points", 100 * method["forgetting"], zero, sense="="))
        rows.append(measure(f"{name}: bytes for all tasks", method["bytes"]))
    return rows


def plot(result: dict[str, Any], path: Path) -> None:
    """Mean accuracy over the tasks so far."""
    figure = new_figure()
    axes = figure.add_subplot()
    for name, method in result["methods"].items():
        values = [100 * value for value in method["accuracy_after"]]
        axes.plot(range(1, len(values) + 1), values, marker=".", label=f"{name} ({method['bytes'] / 1e6:.2f} MB)")
    axes.set(xlabel="tasks learned", ylabel="accuracy on all of them, %", title="PermutedMNIST, task given")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
