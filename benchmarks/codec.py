"""What a mask takes in the store, against its entropy and an ANS coder; LeNet 300-100 with 500 outputs.

Random masks of independent bits at several densities, in all layers the same or by the Erdős–Rényi budget, and masks
that edge-popup and the threshold trained on MNIST with its pixels in random order. The entropy is that of independent
bits with each layer's own density: what training gathers in some units or inputs may take a mask below it. Every mask
is decoded again and held equal. Times are the least of many, on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import coding
import numpy as np
from common import ROOT
from mnist_tasks import permuted
from paper_engine import Setup, found, mnist
from paper_report import measure, report, shown, write_json
from rich.console import Console
from rich.table import Table

from storage import codec
from supsupd.learning.learner import Learner
from supsupd.learning.network import Architecture, pack_rows
from supsupd.learning.supermask import erdos_renyi_densities
from supsupd.sections import LearningSettings, NetworkSettings, RecognitionSettings

RESULT = ROOT / "docs" / "results" / "codec.json"
LENET = Architecture((784,), (300, 100), 500)
SHAPES = [(layer.rows, layer.columns) for layer in LENET.layers]
DENSITIES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0)
BUDGETED = (0.02, 0.05, 0.1, 0.2)
TRAINED: tuple[tuple[Literal["threshold", "edge-popup"], float], ...] = (
    ("edge-popup", 0.02),
    ("edge-popup", 0.05),
    ("edge-popup", 0.1),
    ("edge-popup", 0.3),
    ("threshold", 0.5),
)
ROWS, STEPS = 32_000, 250
REPEATS = 50


@dataclass(frozen=True)
class Case:
    """A mask, a bool array (rows, columns) for each layer."""

    name: str
    masks: Sequence[np.ndarray]


def random_masks(seed: int) -> Iterator[Case]:
    rng = np.random.default_rng(seed)
    for density in DENSITIES:
        yield Case(f"random, {density:g}", [rng.random(shape) < density for shape in SHAPES])
    for density in BUDGETED:
        layers = zip(SHAPES, erdos_renyi_densities(SHAPES, density), strict=True)
        yield Case(f"random, Erdős-Rényi {density:g}", [rng.random(shape) < share for shape, share in layers])


def trained_masks(data: Path, seed: int) -> Iterator[Case]:
    images = mnist(data, "train")
    task = permuted(images, np.random.default_rng(seed), 1)[0]
    for rule, density in TRAINED:
        learning = LearningSettings(rule=rule, density=density, steps=STEPS, max_steps=STEPS, seed=seed)
        setup = Setup(NetworkSettings(outputs=500, seed=seed), learning, RecognitionSettings(scenario="GG"))
        engine = found(setup, images.x[:ROWS], images.y[:ROWS])
        learner = Learner(engine.network, learning)
        state = learner.train(learner.fresh(0), engine.samples(task.transform(images.x[:ROWS]), images.y[:ROWS]), 0)
        masks = [mask.numpy() for mask in engine.network.unpack(learner.packed(state))]
        yield Case(f"{rule}, {density:g}", masks)


def entropy(masks: Sequence[np.ndarray]) -> float:
    """Bytes."""
    shares = [(mask.size, share) for mask in masks for share in (mask.mean(), 1 - mask.mean()) if share]
    return float(sum(-size * share * np.log2(share) for size, share in shares)) / 8 + 0.0


def measured(case: Case) -> dict[str, Any]:
    """Bytes and microseconds of one mask."""
    bits = b"".join(pack_rows(mask).tobytes() for mask in case.masks)
    stored, kind = codec.encode(bits)
    ans, shapes = coding.encode(case.masks), [mask.shape for mask in case.masks]
    assert codec.decode(stored, kind, len(bits)) == bits
    assert all(map(np.array_equal, coding.decode(ans, shapes), case.masks))
    return {
        "mask": case.name,
        "entropy_bytes": round(entropy(case.masks)),
        "raw_bytes": len(bits),
        "stored_bytes": len(stored),
        "coding": kind or "raw",
        "ans_bytes": len(ans),
        "encode_us": microseconds(lambda: codec.encode(bits)),
        "decode_us": microseconds(lambda: codec.decode(stored, kind, len(bits))),
        "ans_decode_us": microseconds(lambda: coding.decode(ans, shapes)),
    }


def microseconds(call: Callable[[], object]) -> float:
    """The least of many."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return round(1e6 * min(times), 1)


def measures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the document shows of them."""
    table = []
    for row in rows:
        mask, bound = row["mask"], row["entropy_bytes"]
        table.append(measure(f"{mask}: stored bytes of {row['raw_bytes']:,}, {row['coding']}", row["stored_bytes"]))
        table.append(measure(f"{mask}: stored / entropy", round(row["stored_bytes"] / bound, 3) if bound else None))
        table.append(measure(f"{mask}: decode, µs", row["decode_us"]))
    return table


def make_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(*rows[0], title="A mask in the store")
    for row in rows:
        table.add_row(*map(shown, row.values()))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with mnist.npz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and write nothing")
    options = parser.parse_args()
    started = time.monotonic()
    rows = [measured(case) for case in (*random_masks(options.seed), *trained_masks(options.data, options.seed))]
    command = " ".join(["python", "benchmarks/codec.py", *sys.argv[1:]])
    result = report(
        {"measures": measures(rows), "rows": rows}, "codec", command, options.seed, time.monotonic() - started
    )
    if options.json:
        print(json.dumps(result))
        return
    Console().print(make_table(rows))
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
