"""SplitMNIST, NNs: five pairs of digits, the task never told (labels: the digit is odd)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mnist_tasks import split
from paper_engine import Engine, Setup, found, mnist
from paper_report import TAME, measure, new_figure, save_figure
from paper_stream import Outcome, TrueTask, run_stream

from supsupd.sections import LearningSettings, NetworkSettings, RecognitionSettings

PAPER = 98.63
LEAST = 99.3
TASKS = 5
BATCH_ROWS = 128
TEST_ROWS = 1600


def setup(seed: int) -> Setup:
    """LeNet 300-100 with 100 outputs."""
    return Setup(
        NetworkSettings(hidden=[300, 100], outputs=100, seed=seed),
        LearningSettings(lr=1e-3, seed=seed),
        RecognitionSettings(scenario="NNs"),
    )


def run(data: Path, full: bool, seed: int) -> dict[str, Any]:
    """Every training image once, boundaries aligned and not; the default is the full size."""
    del full
    images = mnist(data, "train")
    engine = found(setup(seed), images.x[:1000], images.y[:1000] % 2)
    tasks = _tasks(engine, data)
    outcomes = {
        "unaligned": run_stream(engine, tasks, BATCH_ROWS, False, "boundaries anywhere"),
        "aligned": run_stream(engine, tasks, BATCH_ROWS, True, "boundaries at batches"),
    }
    return {
        "settings": engine.setup.to_json() | {"batch_rows": BATCH_ROWS, "training_rows": len(images.y)},
        "measures": [row for name, outcome in outcomes.items() for row in _measures(name, outcome)],
        "outcomes": {name: outcome.to_json() for name, outcome in outcomes.items()},
    }


def _tasks(engine: Engine, data: Path) -> list[TrueTask]:
    rng = np.random.default_rng(0)
    pairs = zip(split(mnist(data, "train"), rng, 2), split(mnist(data, "test"), rng, 2), strict=True)
    return [
        TrueTask(engine.samples(train.x, train.y).x.numpy(), train.y, test.x[:TEST_ROWS], test.y[:TEST_ROWS])
        for train, test in pairs
    ]


def _measures(name: str, outcome: Outcome) -> list[dict[str, Any]]:
    return [
        measure(f"{name}: masks for {TASKS} tasks", outcome.masks, TASKS, sense="="),
        measure(f"{name}: accuracy, mask given", 100 * outcome.given, LEAST, (PAPER, TAME)),
        measure(f"{name}: accuracy, mask inferred from 32 images", 100 * outcome.group, LEAST),
        measure(f"{name}: accuracy, mask inferred from one image", 100 * outcome.single),
        measure(f"{name}: batches at their mask, %", 100 * outcome.purity),
        measure(f"{name}: batches undecided", outcome.undecided),
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """Accuracy by what the mask is inferred from."""
    figure = new_figure()
    axes = figure.add_subplot()
    ways = {"given": "mask given", "group": "from 32 images", "single": "from one image"}
    for place, (name, outcome) in enumerate(result["outcomes"].items()):
        bars = axes.bar(np.arange(len(ways)) + 0.4 * place - 0.2, [100 * outcome[w] for w in ways], 0.38, label=name)
        axes.bar_label(bars, fmt="%.2f")
    axes.axhline(PAPER, color="k", linestyle="--", label=f"TAME {PAPER}")
    axes.set_xticks(range(len(ways)), list(ways.values()))
    axes.set(ylim=(50, 103), ylabel="accuracy, %", title="SplitMNIST, NNs: 5 tasks never told")
    axes.legend(loc="lower left")
    save_figure(figure, path)
