"""PermutedMNIST, NNs: 20 permutations, the task never told; the calibrated rule of recognition beside the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from mnist_tasks import permuted
from paper_engine import Engine, Setup, found, mnist
from paper_report import TAME, measure, new_figure, save_figure
from paper_stream import Outcome, TrueTask, run_stream

from supsupd.sections import LearningSettings, NetworkSettings, RecognitionSettings

Rule = Literal["calibrated", "paper"]
PAPER = 87.32
LEAST = 95.0
TASKS = 20
BATCH_ROWS = 128
ROWS, FULL_ROWS = 26_000, 60_000
STEPS = 4
TEST_ROWS = 640
CHECK_BATCHES = 100
"""Of the paper's rule. With aligned boundaries a task has a multiple of as many batches, so that its check falls on
the boundary, as in the authors' code."""
RUNS: tuple[tuple[Rule, bool], ...] = (("calibrated", False), ("calibrated", True), ("paper", False), ("paper", True))


def setup(rule: Rule, seed: int) -> Setup:
    """LeNet 300-100 with 100 outputs; each batch of 128 takes a few steps."""
    return Setup(
        NetworkSettings(hidden=[300, 100], outputs=100, seed=seed),
        LearningSettings(lr=1e-3, steps=STEPS, seed=seed),
        RecognitionSettings(scenario="NNs", rule=rule, check_batches=CHECK_BATCHES),
    )


def run(data: Path, full: bool, seed: int) -> dict[str, Any]:
    """The same rows four times: each rule, with boundaries anywhere and at the ends of batches."""
    rows = FULL_ROWS if full else ROWS
    outcomes, settings = {}, {}
    for rule, aligned in RUNS:
        images = mnist(data, "train")
        engine = found(setup(rule, seed), images.x[:1000], images.y[:1000])
        name = f"{rule}, {'aligned' if aligned else 'unaligned'}"
        used = rows - rows % (CHECK_BATCHES * BATCH_ROWS) if aligned else rows
        outcomes[name] = run_stream(engine, _tasks(engine, data, used), BATCH_ROWS, aligned, name)
        settings[rule] = engine.setup.to_json()
    return {
        "settings": settings | {"batch_rows": BATCH_ROWS, "training_rows": rows, "test_rows": TEST_ROWS},
        "measures": [row for name, outcome in outcomes.items() for row in _measures(name, outcome)],
        "outcomes": {name: outcome.to_json() for name, outcome in outcomes.items()},
    }


def _tasks(engine: Engine, data: Path, rows: int) -> list[TrueTask]:
    """The rows are standardised before the pixels change places: it is the same, and done once."""
    train, test = mnist(data, "train"), mnist(data, "test")
    x = engine.samples(train.x[:rows], train.y[:rows]).x.numpy()
    orders = permuted(test, np.random.default_rng(engine.setup.network.seed), TASKS)
    return [
        TrueTask(x, train.y[:rows], task.transform(task.x[:TEST_ROWS]), task.y[:TEST_ROWS], task.transform)
        for task in orders
    ]


def _measures(name: str, outcome: Outcome) -> list[dict[str, Any]]:
    ours = name.startswith("calibrated")
    least = LEAST if ours else None
    return [
        measure(f"{name}: masks for {TASKS} tasks", outcome.masks, TASKS if ours else None, sense="="),
        measure(f"{name}: accuracy, mask inferred from one image", 100 * outcome.single, least, (PAPER, TAME)),
        measure(f"{name}: accuracy, mask inferred from 32 images", 100 * outcome.group, least),
        measure(f"{name}: accuracy, mask given", 100 * outcome.given, least),
        measure(f"{name}: batches at their mask, %", 100 * outcome.purity),
        measure(f"{name}: batches undecided", outcome.undecided),
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """Masks and accuracy by rule and boundaries."""
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    names = list(result["outcomes"])
    masks = left.barh(names, [result["outcomes"][name]["masks"] for name in names], color="tab:gray")
    left.bar_label(masks)
    left.axvline(TASKS, color="k", linestyle=":")
    left.set(title=f"masks for {TASKS} tasks")
    bars = right.barh(names, [100 * result["outcomes"][name]["single"] for name in names])
    right.bar_label(bars, fmt="%.1f")
    right.axvline(PAPER, color="k", linestyle="--", label=f"TAME {PAPER}")
    right.set(title="accuracy from one image, %", yticks=[])
    right.legend(loc="lower left")
    figure.suptitle("PermutedMNIST, NNs, LeNet 300-100")
    save_figure(figure, path)
