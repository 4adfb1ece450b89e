"""The kernels of a GPU: logits under every mask, bank times vector, and a training step, against torch and a copy.

FC 1024-1024 with 784 inputs and 500 outputs, random masks, normal inputs. Everything is held against torch's own
operations first, twice with other inputs, then timed by the GPU's own events: medians over bursts of calls, after a
warm-up burst. Copying is torch's, of as many bytes as the bank has, counted as read and as written; a kernel that reads
the bank and writes almost nothing counts the bank's bytes once, and its share is that rate over the copy's. Torch's own
time for all masks is measured in full, nothing is scaled up. Without a GPU it says so and stops.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import ROOT
from paper_report import make_table, measure, new_figure, report, save_figure, write_json
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from supsupd.learning import gpu_kernels
from supsupd.learning.gpu_layers import FixedLayer, fixed_layers
from supsupd.learning.network import Architecture, Network
from supsupd.learning.optimiser import Layer, Step
from supsupd.learning.supermask import initial_scores

RESULT, PLOT = ROOT / "docs" / "results" / "gpu.json", ROOT / "docs" / "plots" / "gpu.png"
ARCHITECTURE = Architecture((784,), (1024, 1024), 500)
TASKS, ROWS, TRAINING_ROWS = 2500, 32, 128
LR, SHARE = 1e-4, 0.01
BURSTS = 21
LOGIT_ERROR, SUM_ERROR, STEP_ERROR = 1e-4, 1e-6, 1e-4
LEAST_SHARE, MOST_LOGITS_MS = 0.6, 5.0
TARGET_GPU = "H200"

Update = Callable[[Layer[Tensor], Tensor, Step, Tensor], None]
"""Takes a layer, the gradient of its effective weights and how far to go; writes the effective weights that follow."""


@dataclass(frozen=True)
class Case:
    """What is measured, on the GPU: the network, packed masks (k, mask_bytes), and where random values come from."""

    network: Network
    layers: Sequence[FixedLayer]
    bank: Tensor
    generator: torch.Generator

    @classmethod
    def of(cls, tasks: int, seed: int) -> Case:
        """Every row of the network fills its bytes, so that random bytes are masks, of density 1/2."""
        generator = torch.Generator("cuda").manual_seed(seed)
        network = Network(ARCHITECTURE, seed, "cuda")
        shape = (tasks, ARCHITECTURE.mask_bytes)
        bank = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=generator)
        return cls(network, fixed_layers(network.weights, ARCHITECTURE.layers), bank, generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=self.generator)

    @property
    def slots(self) -> Tensor:
        return torch.arange(len(self.bank), device="cuda")


def timed(call: Callable[[], object], burst: int, bursts: int = BURSTS) -> float:
    """Milliseconds of a call: median over the bursts of the mean of one; the first burst only warms up."""
    taken = []
    for _ in range(1 + bursts):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(burst):
            call()
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop) / burst)
    return round(median(taken[1:]), 4)


def hold(what: str, found: Tensor, wanted: Tensor, most: float) -> float:
    """The error by the norms. Raises AssertionError if it is more than `most`, or no number."""
    error = float((found - wanted).double().norm() / wanted.double().norm())
    assert error <= most, f"{what}: relative error {error:.2e}, at most {most:.0e} is right"
    return error


def logits(case: Case, rows: int) -> dict[str, float]:
    """Kernel (a)."""
    errors = []
    for x in (case.normal(rows, ARCHITECTURE.inputs) for _ in range(2)):
        wanted = gpu_kernels.all_masks_logits_by_torch(x, case.bank, case.layers, case.slots)
        found = gpu_kernels.all_masks_logits(x, case.bank, case.layers)
        errors.append(hold("logits", found, wanted, LOGIT_ERROR))
    by_torch = timed(lambda: gpu_kernels.all_masks_logits_by_torch(x, case.bank, case.layers, case.slots), 1, bursts=3)
    ours = timed(lambda: gpu_kernels.all_masks_logits(x, case.bank, case.layers), 5)
    return {"all_masks_logits_ms": ours, "all_masks_logits_torch_ms": by_torch, "logits_error": max(errors)}


def products(case: Case) -> dict[str, float]:
    """Kernel (b), and the copy that it is measured by."""
    errors = []
    for vector in (case.normal(8 * ARCHITECTURE.bit_bytes) for _ in range(2)):
        wanted = gpu_kernels.bank_times_vector_by_torch(case.bank, vector, case.slots)
        errors.append(hold("sums", gpu_kernels.bank_times_vector(case.bank, vector), wanted, SUM_ERROR))
    by_torch = timed(lambda: gpu_kernels.bank_times_vector_by_torch(case.bank, vector, case.slots), 1, bursts=3)
    target = torch.empty_like(case.bank)
    copying = timed(lambda: target.copy_(case.bank), 10)
    ours = timed(lambda: gpu_kernels.bank_times_vector(case.bank, vector), 10)
    copied, read = 2 * case.bank.nbytes / copying, case.bank.nbytes / ours
    return {
        "copy_ms": copying,
        "copy_gb_per_s": round(copied / 1e6, 1),
        "bank_times_vector_ms": ours,
        "bank_times_vector_torch_ms": by_torch,
        "bank_times_vector_gb_per_s": round(read / 1e6, 1),
        "bank_times_vector_share": round(read / copied, 4),
        "sum_error": max(errors),
    }


def training(case: Case, update: Update) -> tuple[Callable[[], None], list[Layer[Tensor]]]:
    """One step of a mask by RMSProp under the threshold rule, and the state that it changes."""
    generator = torch.Generator().manual_seed(0)
    state, effective = [], []
    for shape, weight in zip(ARCHITECTURE.layers, case.network.weights, strict=True):
        scores = initial_scores((shape.rows, shape.columns), generator).cuda()
        state.append(Layer(weight, scores, scores.clone(), scores.new_empty(0), torch.zeros_like(scores)))
        effective.append(weight * (scores >= 0))
    x, y = batch(0)
    step = Step.of("rmsprop", "threshold", 1, LR, SHARE)

    def call() -> None:
        weights = [w.detach().requires_grad_() for w in effective]
        loss = functional.cross_entropy(case.network.run(x, weights), y)
        for layer, gradient, out in zip(state, torch.autograd.grad(loss, weights), effective, strict=True):
            update(layer, gradient, step, out)

    return call, state


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Normal inputs and labels of ten classes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((TRAINING_ROWS, ARCHITECTURE.inputs), dtype=np.float32)
    return torch.from_numpy(x).cuda(), torch.from_numpy(rng.integers(0, 10, TRAINING_ROWS)).cuda()


def dense_step() -> Callable[[], None]:
    """The same layers with weights that train."""
    torch.manual_seed(0)
    shapes = ARCHITECTURE.layers
    modules = [m for s in shapes for m in (nn.Linear(s.columns, s.rows, bias=False), nn.ReLU())]
    model = nn.Sequential(*modules[:-1]).cuda()
    optimiser = torch.optim.RMSprop(model.parameters(), lr=LR, foreach=True)
    x, y = batch(0)

    def call() -> None:
        optimiser.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimiser.step()

    return call


def steps(case: Case) -> dict[str, float]:
    """The fused update on the way of a training step, one operation at a time, and the dense network.

    Both ways are held to each other after one step, before which they are the same: later a score near 0 may have
    fallen on the other side.
    """
    fused, ours = training(case, gpu_kernels.fused_rmsprop)
    single, theirs = training(case, gpu_kernels.fused_rmsprop_by_torch)
    fused()
    single()
    errors = [
        hold(name, getattr(a, name), getattr(b, name), STEP_ERROR)
        for a, b in zip(ours, theirs, strict=True)
        for name in ("scores", "average", "second")
    ]
    return {
        "step_ms": timed(fused, 20),
        "step_torch_ms": timed(single, 20),
        "dense_ms": timed(dense_step(), 20),
        "step_error": max(errors),
    }


def measured(tasks: int, rows: int, seed: int) -> dict[str, Any]:
    case = Case.of(tasks, seed)
    started = time.monotonic()
    gpu_kernels.warm_up(case.layers, ARCHITECTURE.mask_bytes, (rows,))
    torch.cuda.synchronize()
    row: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "tasks": tasks,
        "rows": rows,
        "packed_bytes": case.bank.nbytes,
        "warm_up_seconds": round(time.monotonic() - started, 2),
    }
    with torch.no_grad():
        row |= logits(case, rows) | products(case)
    return row | steps(case)


def measures(row: dict[str, Any]) -> list[dict[str, Any]]:
    aimed = TARGET_GPU in row["gpu"] and (row["tasks"], row["rows"]) == (TASKS, ROWS)
    case, most = f"{row['tasks']} masks", MOST_LOGITS_MS if aimed else None
    return [
        measure("a copy of the bank, GB/s read and written", row["copy_gb_per_s"]),
        measure(f"{case}, {row['rows']} images: logits, ms", row["all_masks_logits_ms"], most, sense="≤"),
        measure(f"{case}, {row['rows']} images: logits by torch, ms", row["all_masks_logits_torch_ms"]),
        measure(f"{case}: bank times vector, ms", row["bank_times_vector_ms"]),
        measure(f"{case}: bank times vector by torch, ms", row["bank_times_vector_torch_ms"]),
        measure(f"{case}: bank times vector, share of the copy's", row["bank_times_vector_share"], LEAST_SHARE),
        measure("a training step, threshold, ms", row["step_ms"]),
        measure("a training step, update by torch, ms", row["step_torch_ms"]),
        measure("a training step, dense network, ms", row["dense_ms"]),
        measure("a training step, times the dense one's", round(row["step_ms"] / row["dense_ms"], 3)),
        measure("largest relative error of logits", row["logits_error"], LOGIT_ERROR, sense="≤"),
    ]


def plot(row: dict[str, Any], path: Path) -> None:
    figure = new_figure()
    axes = figure.subplots()
    names = {
        "all_masks_logits": "logits,\nall masks",
        "bank_times_vector": "bank times vector",
        "step": "training step",
    }
    ways = {"ours": "_ms", "torch, operation by operation": "_torch_ms"}
    for place, (name, suffix) in enumerate(ways.items()):
        heights = [row[key + suffix] for key in names]
        bars = axes.bar(np.arange(len(names)) + 0.4 * (place - 0.5), heights, 0.36, label=name)
        axes.bar_label(bars, fmt="%.3g", fontsize="small")
    for key, name in (("copy_ms", "a copy of the bank"), ("dense_ms", "a dense training step")):
        axes.axhline(row[key], color="grey", linestyle="--" if key == "copy_ms" else ":", label=name)
    axes.set_xticks(np.arange(len(names)), list(names.values()))
    axes.set(yscale="log", ylabel="ms", title=f"{row['gpu']}: FC 1024, {row['tasks']} masks, {row['rows']} images")
    axes.legend(fontsize="small")
    save_figure(figure, path)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=TASKS, help="number of masks")
    parser.add_argument("--rows", type=int, default=ROWS, help="number of images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON alone and write nothing")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        print("benchmarks/gpu.py needs a CUDA GPU and Triton, and this machine lacks one of them: nothing was measured")
        return
    started = time.monotonic()
    row = measured(options.tasks, options.rows, options.seed)
    if options.json:
        print(json.dumps(row))
        return
    settings = {"training_rows": TRAINING_ROWS, "lr": LR, "bursts": BURSTS, "gpu": row["gpu"]}
    command = f"python benchmarks/gpu.py --tasks {options.tasks} --rows {options.rows}"
    result = {"settings": settings, "measures": measures(row), "rows": [row]}
    result = report(result, "gpu", command, options.seed, time.monotonic() - started)
    Console().print(make_table(result))
    write_json(RESULT, result)
    plot(row, PLOT)


if __name__ == "__main__":
    main()
