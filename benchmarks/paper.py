"""The experiments of Supermasks in Superposition on real data, through the product's own engine.

Prints each experiment's table with the published figure beside ours and the target, and keeps it as
docs/results/paper_EXPERIMENT.json and docs/plots/paper_EXPERIMENT.png.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import ROOT
from paper_report import make_table, report, write_json
from rich.console import Console

EXPERIMENTS = (
    "permuted",
    "permuted-nn",
    "rotated",
    "split",
    "cifar",
    "reservoir",
    "density",
    "recognition",
    "baselines",
)
RESULTS = ROOT / "docs" / "results"
PLOTS = ROOT / "docs" / "plots"

Run = Callable[[Path, bool, int], dict[str, Any]]
Plot = Callable[[dict[str, Any], Path], None]


def stem(experiment: str) -> str:
    """The name of an experiment's module, result and plot."""
    return f"paper_{experiment.replace('-', '_')}"


def load(experiment: str) -> tuple[Run, Plot]:
    """`run` and `plot` of an experiment, which has a module of its own."""
    module = importlib.import_module(stem(experiment))
    return module.run, module.plot


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist.npz and cifar10_jpeg.npz")
    parser.add_argument("--full", action="store_true", help="the paper's sizes instead of those that fit 2 cores")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks, their order and the training")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the plot, instead of those in docs/")
    options = parser.parse_args(arguments)
    if not options.data.is_dir():
        parser.error(f"--data: {options.data} is no folder; expected one with mnist.npz and cifar10_jpeg.npz")
    return options


def main() -> None:
    options = parse_options()
    run, plot = load(options.experiment)
    started = time.monotonic()
    result = run(options.data, options.full, options.seed)
    seconds = time.monotonic() - started
    command = " ".join(["python", "benchmarks/paper.py", *(a for a in sys.argv[1:])])
    result = report(result, options.experiment, command, options.seed, seconds)
    Console().print(make_table(result))
    write_json((options.out or RESULTS) / f"{stem(options.experiment)}.json", result)
    plot(result, (options.out or PLOTS) / f"{stem(options.experiment)}.png")


if __name__ == "__main__":
    main()
