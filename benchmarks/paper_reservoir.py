"""SplitMNIST, HopSupSup: masks of units as attractors, found again from images alone (section 3.5, appendix F)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from mnist_tasks import split
from paper_engine import Engine, Setup, Tested, accuracy_given, ask, begin_task, found, mnist
from paper_report import SUPSUP, measure, new_figure, save_figure
from rich.progress import track

from supsupd.learning.network import Network
from supsupd.learning.predictor import Predictor
from supsupd.learning.records import TaskRecord
from supsupd.learning.reservoir import Recovered, Recovery, Reservoir, recall
from supsupd.sections import LearningSettings, NetworkSettings, RecognitionSettings, ReservoirSettings

PAPER = 97.43
LEAST = 97.5
TASKS = 5
STEPS, FULL_STEPS = 300, 1000
IMAGES = (1, 16, 128)
QUERIES, FULL_QUERIES = 10, 14
"""For each task and size of query."""
Descent = Literal["projected", "paper"]
PAPER_QUERIES = 2
TURNED = 0.1
LOADS = (0.0, 0.05, 0.1, 0.2, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Of the capacity; 0 stands for the trained masks alone."""
NEWEST = 50


@dataclass(frozen=True)
class Rows:
    """Test rows of a task, normalised float32 (n, inputs), with class indices (n,)."""

    x: np.ndarray
    y: np.ndarray

    def queries(self, images: int, count: int) -> Iterator[Rows]:
        """The first `count` queries of so many images each, as far as there are rows."""
        starts = range(0, len(self.x) - images + 1, images)[:count]
        return (Rows(self.x[s : s + images], self.y[s : s + images]) for s in starts)


def setup(full: bool, seed: int) -> Setup:
    """Two hidden layers of 2048 units, the default; one batch begins a task."""
    steps = FULL_STEPS if full else STEPS
    return Setup(
        NetworkSettings(kind="units", seed=seed),
        LearningSettings(lr=0.01, steps=steps, max_steps=steps, label_smoothing=0.0, seed=seed),
        RecognitionSettings(scenario="GNs"),
    )


def run(data: Path, full: bool, seed: int) -> dict[str, Any]:
    """Trains the masks, stores them, finds them again from test images; then stores more and more random ones."""
    images = mnist(data, "train")
    engine = found(setup(full, seed), images.x[:1000], images.y[:1000] % 2)
    tasks = train(engine, data, seed)
    rng = np.random.default_rng(seed)
    pairs = split(mnist(data, "test"), rng, 2)
    queries = FULL_QUERIES if full else QUERIES
    asked = queries * max(IMAGES)
    tests = [Tested(i, t.x[:asked], t.y[:asked]) for i, t in enumerate(pairs, 1)]
    rows = [Rows(engine.normaliser(t.x), engine.classes.encode(t.y)) for t in pairs]
    packed = [task.packed for task in tasks]
    held = holding(engine.network, packed)
    ways: tuple[tuple[Descent, int], ...] = (("projected", queries), ("paper", PAPER_QUERIES))
    points = [_point(engine, held, rows, descent, n, count) for descent, count in ways for n in IMAGES]
    settings = ReservoirSettings(enabled=True)
    predictor = replace(engine.predictor(tasks), recovery=Recovery(held, engine.network, settings))
    answers = _answers(predictor, tests)
    bytes_ = _bytes(engine, held)
    curve = list(_curve(engine, packed, rows, seed))
    return {
        "settings": engine.setup.to_json()
        | {"reservoir": settings.model_dump(mode="json"), "hidden": [len(t) for t in held.totals]},
        "measures": _measures(points, answers, bytes_, curve),
        "points": points,
        "answers": answers,
        "bytes": bytes_,
        "curve": curve,
    }


def train(engine: Engine, data: Path, seed: int) -> list[TaskRecord]:
    """A mask for each pair of digits, from all of its images."""
    pairs = split(mnist(data, "train"), np.random.default_rng(seed), 2)
    begun = partial(begin_task, engine)
    return [
        begun(engine.samples(pair.x, pair.y), number, f"{seed} {pair.name}")
        for number, pair in enumerate(track(pairs, "masks"), 1)
    ]


def holding(network: Network, masks: Sequence[np.ndarray]) -> Reservoir:
    """A reservoir of these packed masks."""
    held = Reservoir.empty(network)
    for mask in masks:
        held = held.with_pattern(mask, network)
    return held


def _point(
    engine: Engine, held: Reservoir, rows: list[Rows], descent: Descent, images: int, count: int
) -> dict[str, Any]:
    """What descends to the right mask, in how many steps, and the accuracy under the bits where it ends."""
    recovery = Recovery(held, engine.network, ReservoirSettings(enabled=True, descent=descent))
    ended: list[tuple[int, Recovered]] = []
    right = []
    for task, mine in enumerate(track(rows, f"{descent}, {images} images")):
        for query in mine.queries(images, count):
            x = torch.from_numpy(query.x)
            ended.append((task, recovery.run(x)))
            logits = engine.network.forward(x, ended[-1][1].packed)[:, : len(engine.classes)]
            right.append(float((logits.argmax(dim=1).numpy() == query.y).mean()))
    exact = np.array([result.match == task for task, result in ended]).reshape(TASKS, -1)
    steps = [result.steps for task, result in ended if result.match == task]
    return {
        "descent": descent,
        "images": images,
        "queries": exact.size,
        "recovered": round(float(exact.mean()), 5),
        "of_task": exact.mean(axis=1).round(5).tolist(),
        "first": int(exact[:, 0].sum()),
        "other_mask": round(float(np.mean([r.match not in (None, t) for t, r in ended])), 5),
        "most_steps": max(steps, default=None),
        "accuracy": round(float(np.mean(right)), 5),
    }


def _answers(predictor: Predictor, tests: list[Tested]) -> dict[str, float]:
    """Accuracy with the mask given, and as method recover answers: with all masks compared where a descent fails."""
    asked = ask(predictor, tests, max(IMAGES), "recover")
    given = accuracy_given(predictor, tests)
    return {"given": round(float(np.mean(given)), 5), "recover": round(asked.both, 5), "task": round(asked.task, 5)}


def _bytes(engine: Engine, held: Reservoir) -> dict[str, int]:
    mask = engine.network.architecture.bit_bytes
    raw = len(held.patterns) * mask
    return {"matrices": held.nbytes, "raw": raw, "break_even": -(-held.nbytes // mask), "capacity": int(held.capacity)}


def _curve(engine: Engine, trained: list[np.ndarray], rows: list[Rows], seed: int) -> Iterator[dict[str, Any]]:
    """The trained masks first, then random ones of fair coins: what comes back from a copy with bits turned, and the
    trained ones from images."""
    generator = np.random.default_rng(seed)
    network, masks = engine.network, list(trained)
    held = holding(network, masks)
    for load in track(LOADS, "capacity"):
        while len(masks) < int(load * held.capacity):
            masks.append(generator.integers(0, 256, network.architecture.bit_bytes, dtype=np.uint8))
            held = held.with_pattern(masks[-1], network)
        back = recall(held, masks, network, TURNED, seed)
        recovery = Recovery(held, network, ReservoirSettings(enabled=True))
        first = [next(mine.queries(max(IMAGES), 1)).x for mine in rows]
        matches = [recovery.run(torch.from_numpy(x)).match for x in first]
        yield {
            "masks": len(masks),
            "load": round(held.load, 4),
            "recalled": round(float(np.mean(back)), 5),
            "newest": round(float(np.mean(back[-NEWEST:])), 5),
            "trained": sum(back[:TASKS]),
            "from_images": sum(match == task for task, match in enumerate(matches)),
        }


def _measures(
    points: list[dict[str, Any]], answers: dict[str, float], sizes: dict[str, int], curve: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    best = next(p for p in points if p["descent"] == "projected" and p["images"] == max(IMAGES))
    whole = [point for point in curve if point["recalled"] == 1.0]
    return [
        measure("masks of 5 recovered bit for bit, from the first 128 images of each", best["first"], TASKS, sense="="),
        measure("most steps of a descent that did", best["most_steps"], 30, sense="≤"),
        measure("accuracy, mask recovered from 128 images", 100 * best["accuracy"], LEAST, (PAPER, SUPSUP)),
        measure("accuracy, method recover (all masks compared where a descent fails)", 100 * answers["recover"]),
        measure("accuracy, mask given", 100 * answers["given"]),
        *(
            measure(
                f"{p['descent']}, {p['images']} image{'s' * (p['images'] > 1)}: queries that recover their mask, %",
                100 * p["recovered"],
            )
            for p in points
        ),
        measure("bytes of the matrices", sizes["matrices"]),
        measure("bytes of the raw bits of 5 masks", sizes["raw"]),
        measure("masks from which on the matrices are smaller", sizes["break_even"]),
        measure("masks that the reservoir takes (0.138 d)", sizes["capacity"]),
        measure(
            "largest load tried at which all come back from 10 % of bits turned",
            max((p["load"] for p in whole), default=None),
        ),
        measure(
            "largest load tried at which the 5 trained come back from 128 images",
            max((p["load"] for p in curve if p["from_images"] == TASKS), default=None),
        ),
        measure(f"all masks back at load {curve[-1]['load']:.2g}, %", 100 * curve[-1]["recalled"]),
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """Left the capacity curve, right what images recover."""
    figure = new_figure()
    figure.set_figwidth(10.0)
    left, right = figure.subplots(1, 2)
    curve = result["curve"]
    loads = [point["load"] for point in curve]
    shares = {
        "all stored": [100 * p["recalled"] for p in curve],
        f"the newest {NEWEST}": [100 * p["newest"] for p in curve],
        "the 5 trained, stored first": [100 * p["trained"] / TASKS for p in curve],
        "the same 5, from 128 images": [100 * p["from_images"] / TASKS for p in curve],
    }
    for (name, values), style in zip(shares.items(), ("o-", "^:", "s--", "d-."), strict=True):
        left.plot(loads, values, style, label=name)
    left.axvline(1.0, color="k", linewidth=0.8)
    left.set(xscale="log", xlabel="load: masks / (0.138 · 2048)", ylim=(-4, 145), ylabel="come back bit for bit, %")
    left.set_title(f"{TURNED:.0%} of the bits turned, or from images")
    left.set_xticks(ticks := (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4), [f"{load:g}" for load in ticks])
    left.set_yticks(range(0, 101, 20))
    left.grid(alpha=0.3)
    left.legend(loc="upper left", fontsize="small", ncols=2)
    for place, (what, label) in enumerate((("recovered", "mask recovered"), ("accuracy", "accuracy there"))):
        for offset, descent in enumerate(("projected", "paper")):
            values = [100 * p[what] for p in result["points"] if p["descent"] == descent]
            at = np.arange(len(IMAGES)) + 0.2 * (2 * offset + place) - 0.3
            bars = right.bar(at, values, 0.18, label=f"{descent}: {label}")
            right.bar_label(bars, fmt="%.0f", fontsize="small")
    right.axhline(PAPER, color="k", linestyle="--", linewidth=0.8, label=f"published accuracy {PAPER}")
    right.set_xticks(range(len(IMAGES)), [f"{n} image{'s' * (n > 1)}" for n in IMAGES])
    right.set(ylim=(0, 145), ylabel="%", title="descent from images, 5 masks")
    right.set_yticks(range(0, 101, 20))
    right.legend(loc="upper left", fontsize="small", ncols=2)
    figure.suptitle("SplitMNIST, HopSupSup, 2048-2048 units")
    save_figure(figure, path)
