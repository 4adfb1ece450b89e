"""GG: what a bit of accuracy costs in bytes. Edge-popup at several densities, masks raw and entropy-coded (4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from coding import encode
from mnist_tasks import permuted, split, turned
from paper_engine import Engine, Setup, found, mnist
from paper_report import measure, new_figure, save_figure
from rich.progress import track

from supsupd.learning.learner import Learner, Samples
from supsupd.learning.transfer import Earlier, start_scores
from supsupd.sections import LearningSettings, NetworkSettings, RecognitionSettings

Transfer = Literal["none", "mean", "best"]
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
BUDGETS: tuple[Literal["uniform", "erdos-renyi"], ...] = ("uniform", "erdos-renyi")
NORMS: tuple[Literal["group", "task"], ...] = ("group", "task")
TRANSFERS: tuple[Transfer, ...] = ("none", "mean", "best")
TASKS, FULL_TASKS = 2, 10
STEPS, FULL_STEPS = 250, 1000
CONV_STEPS, CONV_DENSITY, CONV_ROWS = 80, 0.2, 10_000
TURNS, TURN_STEPS, DEGREES = 5, 60, 10
ROWS = 32_000
TEST_ROWS = 2000


@dataclass(frozen=True)
class Part:
    """Training and test samples of one task."""

    train: Samples
    test: Samples


def run(data: Path, full: bool, seed: int) -> dict[str, Any]:
    """The curve on permutations of MNIST, normalisation on pairs of digits, transfer on turned digits."""
    curve = _curve(data, full, seed)
    norms = [_norm(data, norm, seed) for norm in NORMS]
    transfer = {name: _transfer(data, name, seed) for name in TRANSFERS}
    return {
        "settings": {
            "network": "LeNet 300-100, 100 outputs",
            "learning": _settings(STEPS, seed, density=0.5).learning.model_dump(mode="json", exclude_unset=True),
            "tasks": FULL_TASKS if full else TASKS,
            "steps": FULL_STEPS if full else STEPS,
            "conv": {"kind": "conv2", "width": 0.25, "hidden": [64], "steps": CONV_STEPS, "density": CONV_DENSITY},
            "transfer": {"tasks": TURNS, "degrees": DEGREES, "steps": TURN_STEPS, "rule": "threshold"},
        },
        "measures": _measures(curve, norms, transfer),
        "curve": curve,
        "norms": norms,
        "transfer": transfer,
    }


def _settings(steps: int, seed: int, **learning: Any) -> Setup:
    chosen = {"rule": "edge-popup", "lr": 1e-3, "steps": steps, "max_steps": steps, "label_smoothing": 0.0} | learning
    return Setup(
        NetworkSettings(hidden=[300, 100], outputs=100, seed=seed),
        LearningSettings(**chosen, seed=seed),
        RecognitionSettings(scenario="GG"),
    )


def _curve(data: Path, full: bool, seed: int) -> list[dict[str, Any]]:
    points = []
    wanted = [("threshold", "uniform", 0.5), *(("edge-popup", b, d) for b in BUDGETS for d in DENSITIES)]
    for rule, budget, density in track(wanted, "densities"):
        steps = FULL_STEPS if full else STEPS
        setup = _settings(steps, seed, rule=rule, density=density, density_budget=budget)
        engine = _engine(setup, data)
        learned = [_learn(engine, part, index) for index, part in enumerate(_permuted(engine, data, full))]
        points.append({"rule": rule, "budget": budget, "density": density} | _mean(learned))
    return points


def _engine(setup: Setup, data: Path, modulo: int = 10) -> Engine:
    images = mnist(data, "train")
    return found(setup, images.x[:1000], images.y[:1000] % modulo)


def _permuted(engine: Engine, data: Path, full: bool) -> list[Part]:
    count = FULL_TASKS if full else TASKS
    seed, rows = engine.setup.network.seed, None if full else ROWS
    train, test = mnist(data, "train"), mnist(data, "test")
    rngs = (np.random.default_rng(seed), np.random.default_rng(seed))
    pairs = zip(permuted(train, rngs[0], count), permuted(test, rngs[1], count), strict=True)
    return [
        Part(engine.samples(a.transform(a.x[:rows]), a.y[:rows]), _test(engine, b.transform(b.x[:TEST_ROWS]), b.y))
        for a, b in pairs
    ]


def _test(engine: Engine, x: np.ndarray, y: np.ndarray) -> Samples:
    return engine.samples(x, y[: len(x)])


def _learn(engine: Engine, part: Part, index: int) -> dict[str, float]:
    """Accuracy and bytes of one task's mask."""
    learner = Learner(engine.network, engine.setup.learning)
    state = learner.train(learner.fresh(index), part.train, index)
    return _weighed(engine, learner.packed(state), part.test)


def _weighed(engine: Engine, packed: np.ndarray, test: Samples) -> dict[str, float]:
    architecture = engine.network.architecture
    masks = [mask.numpy() for mask in engine.network.unpack(packed)]
    return {
        "accuracy": _accuracy(engine, packed, test),
        "kept": sum(int(mask.sum()) for mask in masks) / architecture.weights,
        "raw_bytes": architecture.mask_bytes,
        "coded_bytes": len(encode(masks)) + architecture.statistic_bytes,
        "statistic_bytes": architecture.statistic_bytes,
    }


def _accuracy(engine: Engine, packed: np.ndarray, test: Samples) -> float:
    predicted = engine.network.forward(test.x, packed)[:, : len(engine.classes)].argmax(dim=1)
    return float((predicted == test.y).float().mean())


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(float(np.mean([row[name] for row in rows])), 5) for name in rows[0]}


def _norm(data: Path, norm: Literal["group", "task"], seed: int) -> dict[str, Any]:
    """A small convolutional network on two pairs of digits: what statistics of each task's own buy and cost."""
    base = _settings(CONV_STEPS, seed, density=CONV_DENSITY)
    network = NetworkSettings(
        kind="conv2", input_shape=[28, 28], hidden=[64], width=0.25, outputs=20, norm=norm, seed=seed
    )
    engine = _engine(Setup(network, base.learning, base.recognition), data, modulo=2)
    rng = np.random.default_rng(seed)
    pairs = zip(split(mnist(data, "train"), rng, 2), split(mnist(data, "test"), rng, 2), strict=True)
    parts = [
        Part(engine.samples(a.x[:CONV_ROWS], a.y[:CONV_ROWS]), _test(engine, b.x[:TEST_ROWS], b.y)) for a, b in pairs
    ]
    return {"norm": norm} | _mean([_learn(engine, part, index) for index, part in enumerate(parts[:TASKS])])


def _transfer(data: Path, transfer: Transfer, seed: int) -> float:
    """Mean accuracy of all but the first of a few neighbouring turns, with few steps for each."""
    setup = _settings(TURN_STEPS, seed, rule="threshold", transfer=transfer, minibatch=64)
    engine = _engine(setup, data)
    learner = Learner(engine.network, setup.learning)
    train, test = mnist(data, "train"), mnist(data, "test")
    rows = setup.learning.minibatch * TURN_STEPS
    earlier: list[Earlier] = []
    found_right = []
    for index in range(TURNS):
        samples = engine.samples(turned(train.x[:rows], index * DEGREES), train.y[:rows])
        state = learner.train(start_scores(learner, samples, earlier, str(index), seed), samples, index)
        earlier.append(Earlier(learner.packed(state), state))
        tested = _test(engine, turned(test.x[:TEST_ROWS], index * DEGREES), test.y)
        found_right.append(_accuracy(engine, earlier[-1].packed, tested))
    return round(float(np.mean(found_right[1:])), 5)


def _measures(
    curve: list[dict[str, Any]], norms: list[dict[str, Any]], transfer: dict[str, float]
) -> list[dict[str, Any]]:
    rows = []
    for point in curve:
        name = point["rule"] if point["rule"] == "threshold" else f"{point['budget']} {point['density']}"
        rows.append(measure(name, _cell(point)))
    rows += [measure(f"conv2, norm {point['norm']}, uniform {CONV_DENSITY}", _cell(point)) for point in norms]
    rows += [measure(f"transfer {name}, {TURN_STEPS} steps: accuracy", 100 * value) for name, value in transfer.items()]
    return rows


def _cell(point: dict[str, Any]) -> str:
    return (
        f"{100 * point['accuracy']:.2f} % at {point['coded_bytes']:,.0f} bytes coded, {point['raw_bytes']:,.0f} raw"
        + (f", of these {point['statistic_bytes']:,.0f} statistics" if point["statistic_bytes"] else "")
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Accuracy against coded bytes of a task."""
    figure = new_figure()
    axes = figure.add_subplot()
    for budget in BUDGETS:
        points = [p for p in result["curve"] if p["rule"] == "edge-popup" and p["budget"] == budget]
        sizes = [p["coded_bytes"] / 1000 for p in points]
        axes.plot(sizes, [100 * p["accuracy"] for p in points], marker="o", label=f"edge-popup, {budget}, coded")
        for size, point in zip(sizes, points, strict=True):
            axes.annotate(f"{point['density']:g}", (size, 100 * point["accuracy"]), fontsize=7)
    raw = result["curve"][0]
    axes.plot(raw["raw_bytes"] / 1000, 100 * raw["accuracy"], "k*", markersize=10, label="threshold, raw bits")
    axes.set(xlabel="kilobytes of a task", ylabel="accuracy, %", title="PermutedMNIST, GG, LeNet 300-100")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    save_figure(figure, path)
