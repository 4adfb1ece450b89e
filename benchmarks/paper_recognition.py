"""Recognition on streams of small MNIST: what must not make masks, and what must; the paper's rule beside ours.

Everything runs in process on a small network (196-100-100, and 196-50-100 where nothing changes), with MNIST at 14x14
pixels: the streams are long, and recognition, not accuracy, is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from paper_report import make_table, measure, new_figure, report, save_figure
from paper_stream import Piece
from recognition_streams import Run, Score, Setup, SmallMnist, iter_mixing, iter_visits, judge, with_junk
from rich.console import Console
from rich.progress import track

from supsupd.learning.device import use_threads
from supsupd.sections import LearningSettings, RecognitionSettings

CHECKS, FULL_CHECKS = 20_000, 100_000
MIXING, FULL_MIXING = 40, 120
FALSE_MASKS, JUNK_MASKS = 0.05, 1
PAPER_CHECK = 20
"""Batches between checks of the paper's rule here, a fifth of its 100: visits are short, three of these long."""
SMALL_ROWS, ROWS = 16, 128
TWICE = 2


@dataclass(frozen=True)
class Case:
    """A stream: its learner, its pieces, and how many masks it should make (None: that is only reported)."""

    name: str
    pieces: Callable[[SmallMnist, np.random.Generator], Iterator[Piece]]
    setup: Setup = field(default_factory=Setup)
    masks: int | None = None
    nothing_changes: bool = False


def cases(full: bool) -> list[Case]:
    """All streams but those that compare the rules."""
    over = FULL_MIXING if full else MIXING
    return [
        _unchanging(FULL_CHECKS if full else CHECKS),
        Case("A B A C B", _visits("permuted", [0, 1, 0, 2, 1], 10), masks=3),
        Case("mixing, permuted", lambda m, r: iter_mixing(m.permuted(0), m.permuted(1), over, ROWS, r), masks=2),
        Case("mixing, labels", lambda m, r: iter_mixing(m.relabelled(0), m.relabelled(1), over, ROWS, r), masks=2),
        Case("mixing, turned 30°", lambda m, r: iter_mixing(m.rotated(0), m.rotated(30), over, ROWS, r), masks=2),
        Case("labels permuted", _visits("relabelled", [0, 1, 2, 3, 0, 2], 8), masks=4),
        Case("inverted inputs", _visits("inverted", [0, 1, 0, 1], 8), masks=2),
        Case("junk: noise", _junk(real=False), masks=4),
        Case("junk: random labels", _junk(real=True), masks=4),
        Case("tasks of 4 batches", _visits("permuted", [*range(8), *range(8)], 4), masks=8),
        Case("16 rows, permuted", _visits("permuted", [0, 1, 2, 3] * TWICE, 40, SMALL_ROWS), masks=4),
        Case("16 rows, turned 30°", _visits("rotated", list(range(6)) * TWICE, 40, SMALL_ROWS), masks=6),
        Case("16 rows, two labels", _visits("pair", list(range(5)) * TWICE, 40, SMALL_ROWS), Setup(classes=2), 5),
    ]


def _unchanging(checks: int) -> Case:
    setup = Setup(hidden=50, learning=LearningSettings(steps=4))
    return Case(
        "nothing changes",
        lambda m, r: iter_visits([m.permuted(0)], [0], checks, SMALL_ROWS, r, aligned=True),
        setup,
        masks=1,
        nothing_changes=True,
    )


def _visits(
    kind: str, order: list[int], batches: int, rows: int = ROWS, aligned: bool = False
) -> Callable[[SmallMnist, np.random.Generator], Iterator[Piece]]:
    def pieces(mnist: SmallMnist, rng: np.random.Generator) -> Iterator[Piece]:
        make = {
            "permuted": mnist.permuted,
            "relabelled": mnist.relabelled,
            "rotated": lambda number: mnist.rotated(30 * number),
            "pair": mnist.pair,
            "inverted": lambda number: mnist.inverted() if number else mnist.permuted(0),
        }[kind]
        sources = [make(number) for number in range(max(order) + 1)]
        return iter_visits(sources, order, batches, rows, rng, aligned)

    return pieces


def _junk(real: bool) -> Callable[[SmallMnist, np.random.Generator], Iterator[Piece]]:
    plain = _visits("permuted", [0, 1, 2, 3, 0, 1], 12, aligned=True)
    return lambda mnist, rng: with_junk(plain(mnist, rng), 9, real, rng)


def rule_cases(full: bool) -> list[Case]:
    """The two rules on the same tasks, with boundaries at the checks of the paper's rule, and anywhere."""
    tasks, visit = (20, 5 * PAPER_CHECK) if full else (5, 3 * PAPER_CHECK)
    order = [*range(tasks), *range(tasks)]
    found = []
    for rule in ("calibrated", "paper"):
        recognition = RecognitionSettings(rule=rule, check_batches=PAPER_CHECK)
        for aligned in (True, False):
            # A visit that is no whole number of checks long, and does not end with a batch, is unaligned.
            pieces = _visits("permuted", order, visit if aligned else visit + 7, ROWS, aligned)
            name = f"{rule}, {'aligned' if aligned else 'unaligned'}"
            found.append(Case(name, pieces, Setup(recognition=recognition), tasks if rule == "calibrated" else None))
    return found


def run(data: Path, full: bool, seed: int) -> dict[str, Any]:
    """All streams one after the other; `data` is the folder with mnist.npz."""
    use_threads(1)
    mnist = SmallMnist(data)
    scores: dict[str, Score] = {}
    chosen = [*cases(full), *rule_cases(full)]
    for case in chosen:
        learner = Run(case.setup, seed)
        for piece in track(case.pieces(mnist, np.random.default_rng(seed)), case.name):
            learner.feed(piece)
        scores[case.name] = judge(learner)
    return {
        "settings": {case.name: case.setup.to_json() for case in chosen},
        "measures": [row for case in chosen for row in _measures(case, scores[case.name])],
        "scores": {name: score.to_json() for name, score in scores.items()},
    }


def _measures(case: Case, score: Score) -> list[dict[str, Any]]:
    name = case.name
    if case.nothing_changes:
        false = 1000 * (score.masks - 1) / score.batches
        alarms = 1000 * score.alarms / score.batches
        return [
            measure(f"{name}: false masks per 1000 of {score.batches} checks", false, FALSE_MASKS, sense="≤"),
            measure(f"{name}: late alarms per 1000 checks", alarms),
            measure(f"{name}: batches learned, %", 100 * score.assigned),
        ]
    judged = case.masks is not None
    rows = [
        measure(f"{name}: masks", score.masks, case.masks, sense="="),
        measure(f"{name}: tasks missed", score.missed, 0 if judged else None, sense="≤"),
        measure(f"{name}: batches at their mask, %", 100 * score.purity),
        measure(f"{name}: rows at their mask, %", 100 * score.row_purity),
        measure(f"{name}: adjusted Rand index", score.rand),
        measure(f"{name}: delay in batches", score.delay),
        measure(f"{name}: boundary precision", score.boundary_precision),
        measure(f"{name}: boundary recall", score.boundary_recall),
    ]
    if name.startswith("junk"):
        rows.append(measure(f"{name}: junk masks", score.junk_masks, JUNK_MASKS, sense="≤"))
        rows.append(measure(f"{name}: junk batches learned", score.junk_learned))
    return rows


def plot(result: dict[str, Any], path: Path) -> None:
    """Masks against tasks, and the share of batches at the right mask, for each stream."""
    figure = new_figure()
    figure.set_size_inches(9.0, 6.0)
    left, right = figure.subplots(1, 2, sharey=True)
    scores = result["scores"]
    names = list(scores)[::-1]
    left.barh(names, [scores[name]["masks"] for name in names], color="tab:gray", label="masks")
    left.plot([scores[name]["true_tasks"] for name in names], names, "k|", markersize=12, label="true tasks")
    left.set(title="masks")
    left.legend(loc="lower right")
    bars = right.barh(names, [100 * scores[name]["purity"] for name in names])
    right.bar_label(bars, fmt="%.1f")
    right.set(title="batches at their mask, %", xlim=(0, 115))
    figure.suptitle("recognition without task labels, small MNIST")
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist.npz")
    parser.add_argument("--full", action="store_true", help="longer streams")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="where a PNG goes")
    options = parser.parse_args()
    result = run(options.data, options.full, options.seed)
    Console().print(make_table(report(result, "recognition", "", options.seed, 0.0)))
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
