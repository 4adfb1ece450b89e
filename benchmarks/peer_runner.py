"""Runs the unmodified code of a checkout of RAIVNLab/supsup; `peer.py` starts it in that folder.

A line of JSON on standard input is an order, and a line on standard output its answer. The first order says what to
build. What the code imports and this machine lacks is stubbed only if building and training never use it, and named
in the first answer.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

UNUSED = ("yaml",)
"""Of the peer's imports; yaml reads its --config files."""
CONVOLUTIONS = {"threshold": "FastMultitaskMaskConv", "edge-popup": "MultitaskMaskConv"}
ADAPTOR = "se_oneshot_g_minimization"
"""That of its experiments on MNISTPerm."""


class Batches:
    """A loader that gives one batch over and over, and notes when it is asked for the next."""

    def __init__(self, x: Tensor, y: Tensor, count: int) -> None:
        self.batch, self.count = (x, y), count
        self.dataset = range(count * len(x))
        self.asked: list[float] = []

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.count):
            self.asked.append(time.perf_counter())
            yield self.batch
        self.asked.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        return [1e3 * (after - before) for before, after in zip(self.asked, self.asked[1:], strict=False)]


class Writer:
    """In the place of TensorBoard's: keeps nothing."""

    def add_scalar(self, *_: Any) -> None:
        pass


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def stub_missing() -> list[str]:
    """Empty modules in the place of those that are not installed."""
    missing = []
    for name in UNUSED:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
            missing.append(name)
    return missing


class Runner:
    """The peer's network for the tasks ordered, set up as in its experiments/GNu/MNISTPerm."""

    def __init__(self, order: dict[str, Any]) -> None:
        sys.argv[1:] = []  # its args are read from there at import
        self.stubbed = stub_missing()
        self.args = importlib.import_module("args").args
        self.args.multigpu = None
        self.args.conv_init = "signed_constant"
        self.args.conv_type = CONVOLUTIONS[order["rule"]]
        self.args.model = order["network"]
        self.args.num_tasks = order["tasks"]
        self.args.output_size = order["outputs"]
        self.args.lr = order["lr"]
        self.args.unshared_labels = True
        self.utils = importlib.import_module("utils")
        self.adaptors = importlib.import_module("adaptors")
        self.trainer = importlib.import_module("trainers").default
        torch.set_num_threads(order["threads"])
        torch.manual_seed(order["seed"])
        self.before = resident("VmRSS")
        self.model = self.utils.set_gpu(self.utils.get_model())
        self.x = torch.randn(order["rows"], 1, 28, 28)
        self.y = torch.randint(0, 10, (order["rows"],))
        self.optimiser = torch.optim.RMSprop(self.scores(0), lr=self.args.lr)

    def scores(self, task: int) -> list[nn.Parameter]:
        """What its main.py trains for a task."""
        named = self.model.named_parameters()
        return [p for name, p in named if p.requires_grad and name.split(".")[-2:] == ["scores", str(task)]]

    def set_all(self, **values: Any) -> None:
        """Sets attributes of every module, as its main.py does."""
        for module in self.model.modules():
            for name, value in values.items():
                setattr(module, name, value)

    def train(self, count: int) -> list[float]:
        """Milliseconds of each step of its own training loop, with the batch at hand."""
        self.set_all(task=0)
        batches = Batches(self.x, self.y, count)
        self.trainer.train(self.model, Writer(), batches, self.optimiser, nn.CrossEntropyLoss(), 1, 0)
        return batches.milliseconds()

    def one_shot(self, count: int) -> list[float]:
        """Milliseconds of each One-Shot of one image among all masks: forward under all, gradient, least entry."""
        learned = self.args.num_tasks
        if getattr(self.model, "num_tasks_learned", None) != learned:
            self.set_all(num_tasks_learned=learned, task=-1)
            self.utils.cache_masks(self.model)
        images = Batches(self.x[:1], self.y[:1], count)
        # No task is number -1: it goes on to the next image before it classifies this one.
        getattr(self.adaptors, ADAPTOR)(self.model, Writer(), images, learned, -1)
        return images.milliseconds()

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        work = {"train": self.train, "one_shot": self.one_shot}[order["do"]]
        with contextlib.redirect_stdout(io.StringIO()):
            milliseconds = work(order["count"])
        grown = {name: resident(name) - self.before for name in ("VmRSS", "VmHWM")}
        return {"ms": milliseconds, "resident_bytes": grown["VmRSS"], "peak_bytes": grown["VmHWM"]}


def main() -> None:
    sys.path[0] = str(Path.cwd())  # its modules instead of those beside this file
    with contextlib.redirect_stdout(io.StringIO()):
        runner = Runner(json.loads(sys.stdin.readline()))
    print(json.dumps({"stubbed": runner.stubbed}), flush=True)
    for line in sys.stdin:
        print(json.dumps(runner.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
