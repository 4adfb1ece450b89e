"""One training step of a mask, against the same network trained densely and against the paper's own code.

LeNet 300-100 and FC 1024, both with 500 outputs, 128 rows at hand, RMSProp, on 2 threads. Ours is what the daemon does
for a batch, `Learner.train`, divided by its steps: beside what the others do it draws the rows, smooths the labels,
adds offsets to the logits, averages the scores, and copies the task's state once for each batch. The dense network has
torch's own layers without bias and torch.optim.RMSprop. All take turns, a burst of steps each; times are medians of the
bursts' means.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import numpy as np
import torch
from common import ROOT
from paper_report import make_table, measure, new_figure, report, save_figure, write_json
from peer import Peer, PeerFailed, PeerModel
from rich.console import Console
from torch import nn
from torch.nn import functional

from supsupd.learning.device import use_threads
from supsupd.learning.learner import Learner, Samples
from supsupd.learning.network import Architecture, Network
from supsupd.sections import LearningSettings

RESULT, PLOT = ROOT / "docs" / "results" / "train_step.json", ROOT / "docs" / "plots" / "train_step.png"
INPUTS, OUTPUTS, ROWS, LR, THREADS, SEED = 784, 500, 128, 1e-4, 2, 0
ROUNDS, BURST, PEER_BURST = 11, 20, 5
PAUSE_SECONDS = 0.05
"""Before each burst: OpenMP's threads of the other process go on spinning for a while after their work."""
MOST_OF_DENSE = {"threshold": 1.2, "top-k": 1.5}
LEAST_OF_PEER = {("LeNet", "threshold"): 4.5, ("LeNet", "top-k"): 10.0}

Burst = Callable[[], float]
"""Takes some steps; the mean milliseconds of one."""


@dataclass(frozen=True)
class Case:
    """A network and a rule, by the names of the tables."""

    network: Literal["LeNet", "FC 1024"]
    rule: Literal["threshold", "top-k"]

    @property
    def hidden(self) -> tuple[int, ...]:
        return (300, 100) if self.network == "LeNet" else (1024, 1024)

    @property
    def settings(self) -> LearningSettings:
        rule: Literal["threshold", "edge-popup"] = "threshold" if self.rule == "threshold" else "edge-popup"
        return LearningSettings(rule=rule, lr=LR, steps=BURST, minibatch=ROWS, threads=THREADS, seed=SEED)

    @property
    def peer(self) -> PeerModel:
        name: Literal["LeNet", "FC1024"] = "LeNet" if self.network == "LeNet" else "FC1024"
        return PeerModel(name, self.settings.rule, threads=THREADS, outputs=OUTPUTS, rows=ROWS, lr=LR, seed=SEED)


CASES = [Case(network, rule) for network in ("LeNet", "FC 1024") for rule in ("threshold", "top-k")]


def batch() -> Samples:
    """Normal inputs and labels of ten classes."""
    rng = np.random.default_rng(SEED)
    x = rng.standard_normal((ROWS, INPUTS), dtype=np.float32)
    return Samples.of(x, rng.integers(0, 10, ROWS), torch.device("cpu"))


def ours(case: Case, samples: Samples) -> Burst:
    """A task that learns the same batch again and again."""
    learner = Learner(Network(Architecture((INPUTS,), case.hidden, OUTPUTS), SEED), case.settings)
    state = learner.fresh("task")

    def burst() -> float:
        nonlocal state
        started = time.perf_counter()
        state = learner.train(state, samples, SEED)
        return 1e3 * (time.perf_counter() - started) / BURST

    return burst


def dense(case: Case, samples: Samples, foreach: bool) -> Burst:
    """The same layers with weights that train."""
    torch.manual_seed(SEED)
    pairs = itertools.pairwise((INPUTS, *case.hidden, OUTPUTS))
    layers = [module for before, after in pairs for module in (nn.Linear(before, after, bias=False), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    optimiser = torch.optim.RMSprop(model.parameters(), lr=LR, foreach=foreach)

    def burst() -> float:
        started = time.perf_counter()
        for _ in range(BURST):
            optimiser.zero_grad()
            functional.cross_entropy(model(samples.x), samples.y).backward()
            optimiser.step()
        return 1e3 * (time.perf_counter() - started) / BURST

    return burst


def in_turns(bursts: dict[str, Burst]) -> dict[str, list[float]]:
    """Milliseconds of each burst, one of each in every round; the first round only warms up."""
    taken: dict[str, list[float]] = {name: [] for name in bursts}
    for _ in range(1 + ROUNDS):
        for name, burst in bursts.items():
            time.sleep(PAUSE_SECONDS)
            taken[name].append(burst())
    return {name: times[1:] for name, times in taken.items()}


@contextlib.contextmanager
def peer_bursts(path: Path | None, case: Case) -> Iterator[dict[str, Burst]]:
    """The peer's burst, or nothing without a peer."""
    if path is None:
        yield {}
        return
    with Peer(path, case.peer) as peer:
        yield {"peer": lambda: mean(peer.train(PEER_BURST))}


def measured(case: Case, path: Path | None) -> dict[str, Any]:
    """One object of the result: median milliseconds of a step, and the least."""
    samples = batch()
    bursts = {"ours": ours(case, samples)}
    bursts |= {f"dense {way}": dense(case, samples, foreach=way == "foreach") for way in ("foreach", "for-loop")}
    with peer_bursts(path, case) as theirs:
        taken = in_turns(bursts | theirs)
    best = min((name for name in taken if name.startswith("dense")), key=lambda name: median(taken[name]))
    row: dict[str, Any] = {"network": case.network, "rule": case.rule}
    for key, name in (("step", "ours"), ("dense", best), ("peer_step", "peer")):
        row[f"{key}_ms"] = round(median(taken[name]), 3) if name in taken else None
        row[f"{key}_least_ms"] = round(min(taken[name]), 3) if name in taken else None
    return row | {"dense_optimiser": best.removeprefix("dense ")}


def measures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    table = []
    for row in rows:
        network, rule = row["network"], row["rule"]
        what, most = f"{network}, {rule}", MOST_OF_DENSE[rule]
        table.append(measure(f"{what}: a step, ms", row["step_ms"]))
        table.append(measure(f"{what}: of the dense network, ms", row["dense_ms"]))
        ratio = round(row["step_ms"] / row["dense_ms"], 3)
        table.append(measure(f"{what}: times the dense one's", ratio, most, sense="≤"))
        if row["peer_step_ms"] is not None:
            table.append(measure(f"{what}: of the paper's code, ms", row["peer_step_ms"]))
            faster = round(row["peer_step_ms"] / row["step_ms"], 2)
            table.append(measure(f"{what}: times faster than it", faster, LEAST_OF_PEER.get((network, rule))))
    return table


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure = new_figure()
    axes = figure.subplots()
    at = np.arange(len(rows))
    shown = (("ours", "step_ms"), ("the dense network", "dense_ms"), ("the paper's code", "peer_step_ms"))
    for place, (name, key) in enumerate(shown):
        if all(row[key] is not None for row in rows):
            bars = axes.bar(at + 0.27 * (place - 1), [row[key] for row in rows], 0.25, label=name)
            axes.bar_label(bars, fmt="%.3g", fontsize="small")
    axes.set_xticks(at, [f"{row['network']}\n{row['rule']}" for row in rows])
    axes.set(yscale="log", ylabel="ms", title=f"One training step of {ROWS} rows, {THREADS} threads")
    axes.legend()
    save_figure(figure, path)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help="a checkout of the paper's code, github.com/RAIVNLab/supsup")
    parser.add_argument("--json", action="store_true", help="print JSON alone and write nothing")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    use_threads(THREADS)
    started = time.monotonic()
    rows = [measured(case, options.peer) for case in CASES]
    if options.json:
        print(json.dumps(rows))
        return
    settings = {"threads": THREADS, "rows": ROWS, "outputs": OUTPUTS, "lr": LR, "rounds": ROUNDS, "burst": BURST}
    result = {"settings": settings, "measures": measures(rows), "rows": rows}
    command = f"python benchmarks/train_step.py{' --peer PATH' if options.peer else ''}"
    result = report(result, "train_step", command, SEED, time.monotonic() - started)
    Console().print(make_table(result))
    write_json(RESULT, result)
    plot(rows, PLOT)


if __name__ == "__main__":
    try:
        main()
    except PeerFailed as error:
        sys.exit(str(error))
