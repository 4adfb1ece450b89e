"""What each model has answered, as the statistics extension tells it. All of it belongs to one event loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from supsupd.serving.batching import Pass

STAGES = ("queue", "compute_input", "compute_infer", "compute_output")
LARGEST_LISTED = 32
"""Passes of up to so many rows are counted by their exact size, larger ones by the power of two below it."""


@dataclass(slots=True)
class Duration:
    """How often something happened, and how long that took together."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns

    def show(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


def _stages(names: tuple[str, ...]) -> dict[str, Duration]:
    return {name: Duration() for name in names}


@dataclass(slots=True)
class _Model:
    requests: dict[str, Duration] = field(default_factory=lambda: _stages(("success", "fail", *STAGES)))
    rows: int = 0
    passes: int = 0
    newest_pass: int = 0
    last_inference: int = 0  # milliseconds since 1970
    by_size: dict[int, dict[str, Duration]] = field(default_factory=dict)


class Statistics:
    """Of every model that was asked since the daemon's start: never more than there are models."""

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}

    def succeeded(self, name: str, rows: int, seconds: Sequence[float], taken: Pass) -> None:
        """seconds: in each of STAGES. taken: the pass; requests of one pass are counted one after another."""
        model = self._models.setdefault(name, _Model())
        spent = [round(part * 1e9) for part in seconds]
        model.requests["success"].add(sum(spent))
        for stage, ns in zip(STAGES, spent, strict=True):
            model.requests[stage].add(ns)
        model.rows += rows
        model.last_inference = time.time_ns() // 1_000_000
        if taken.number != model.newest_pass:
            model.newest_pass = taken.number
            model.passes += 1
            size = taken.rows if taken.rows <= LARGEST_LISTED else 1 << taken.rows.bit_length() - 1
            by_stage = model.by_size.setdefault(size, _stages(STAGES[1:]))
            for stage, ns in zip(STAGES[1:], spent[1:], strict=True):
                by_stage[stage].add(ns)

    def failed(self, name: str, seconds: float) -> None:
        self._models.setdefault(name, _Model()).requests["fail"].add(round(seconds * 1e9))

    def show(self, name: str, version: str) -> dict[str, Any]:
        """One of "model_stats"."""
        model, nothing = self._models.get(name, _Model()), Duration().show()
        return {
            "name": name,
            "version": version,
            "last_inference": model.last_inference,
            "inference_count": model.rows,
            "execution_count": model.passes,
            "inference_stats": {stage: spent.show() for stage, spent in model.requests.items()}
            | {"cache_hit": nothing, "cache_miss": nothing},
            "response_stats": {},
            "batch_stats": [
                {"batch_size": size, **{stage: spent.show() for stage, spent in stages.items()}}
                for size, stages in sorted(model.by_size.items())
            ],
            "memory_usage": [],
        }
