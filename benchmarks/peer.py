"""The paper's own code, a checkout of github.com/RAIVNLab/supsup, timed in a process of its own (`peer_runner.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Literal, Self

RUNNER = Path(__file__).resolve().with_name("peer_runner.py")
ONE_SHOTS = 3


class PeerFailed(Exception):
    """The peer's code cannot be run, or stopped; what it said is on standard error."""


@dataclass(frozen=True)
class PeerModel:
    """What the peer builds: one of its fully connected networks, with scores for so many tasks."""

    network: Literal["LeNet", "FC1024"] = "LeNet"
    rule: Literal["threshold", "edge-popup"] = "threshold"
    tasks: int = 1
    threads: int = 2
    outputs: int = 500
    rows: int = 128
    lr: float = 1e-4
    seed: int = 0


class Peer:
    """A running peer, used with `with`.

    Args:
        path: the checkout; nothing is written to it.
        model: what it builds. Raises PeerFailed if it does not.

    `stubbed` names the modules that an empty one stands for.
    """

    def __init__(self, path: Path, model: PeerModel) -> None:
        if not (path / "args.py").is_file():
            raise PeerFailed(f"{path} is no checkout of RAIVNLab/supsup: it has no args.py")
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(model.threads))
        self._process = subprocess.Popen(
            [sys.executable, "-B", RUNNER],
            cwd=path,
            env={**os.environ, **threads},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.stubbed: list[str] = self._ask(asdict(model))["stubbed"]

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """The answer to an order."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerFailed("the paper's code stopped") from None
        if not (line := self._process.stdout.readline()):
            raise PeerFailed(f"the paper's code stopped with exit status {self._process.wait()}")
        return dict(json.loads(line))

    def train(self, count: int) -> list[float]:
        """Milliseconds of each of so many training steps."""
        return list(self._ask({"do": "train", "count": count})["ms"])

    def one_shot(self, count: int) -> dict[str, Any]:
        """Milliseconds ("ms") of each One-Shot from one image among all tasks, and the bytes that building and asking
        took: resident afterwards ("resident_bytes") and at most ("peak_bytes")."""
        return self._ask({"do": "one_shot", "count": count})

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()  # closes its input, which ends it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def one_shot(path: Path, tasks: int, threads: int) -> dict[str, Any]:
    """The peer's One-Shot from one image among so many masks of LeNet 300-100 with 500 outputs.

    "one_shot_ms" is the median after one more; "rss_bytes" what it took at most while it built and asked,
    "resident_bytes" what stayed. At 2,500 masks it needs more than 11 GB. Raises PeerFailed.
    """
    with Peer(path, PeerModel(tasks=tasks, threads=threads)) as peer:
        found = peer.one_shot(1 + ONE_SHOTS)
        return {
            "one_shot_ms": median(found["ms"][1:]),
            "rss_bytes": found["peak_bytes"],
            "resident_bytes": found["resident_bytes"],
            "stubbed": peer.stubbed,
        }
