"""What each model has answered, as the statistics extension tells it. All of it belongs to one event loop."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from supsupd.serving.batching import Pass

STAGES = ("queue", "compute_input", "compute_infer", "compute_output")
LARGEST_LISTED = 32
"""Passes of up to so many rows are counted by their exact size, larger ones by the power of two below it."""


@dataclass(slots=True)
class _Spent:
    """How often something was done, and the seconds that each of STAGES took of it together."""

    count: int = 0
    seconds: list[float] = field(default_factory=lambda: [0.0] * len(STAGES))

    def add(self, seconds: Sequence[float]) -> None:
        self.count += 1
        self.seconds = [before + more for before, more in zip(self.seconds, seconds, strict=True)]

    def show(self) -> dict[str, dict[str, int]]:
        return {stage: _duration(self.count, spent) for stage, spent in zip(STAGES, self.seconds, strict=True)}


@dataclass(slots=True)
class _Model:
    successes: _Spent = field(default_factory=_Spent)
    failures: int = 0
    failed_seconds: float = 0.0
    rows: int = 0
    passes: int = 0
    newest_pass: int = 0
    last_inference: int = 0  # milliseconds since 1970
    by_size: defaultdict[int, _Spent] = field(default_factory=lambda: defaultdict(_Spent))


class Statistics:
    """Of every model that was asked since the daemon's start: never more than there are models."""

    def __init__(self) -> None:
        self._models: defaultdict[str, _Model] = defaultdict(_Model)

    def succeeded(self, name: str, rows: int, seconds: Sequence[float], taken: Pass) -> None:
        """seconds: in each of STAGES. taken: the pass, which is counted with its first request."""
        model = self._models[name]
        model.successes.add(seconds)
        model.rows += rows
        model.last_inference = int(datetime.now(UTC).timestamp() * 1000)
        if taken.number > model.newest_pass:
            model.newest_pass = taken.number
            model.passes += 1
            size = taken.rows if taken.rows <= LARGEST_LISTED else 1 << taken.rows.bit_length() - 1
            model.by_size[size].add(seconds)

    def failed(self, name: str, seconds: float) -> None:
        model = self._models[name]
        model.failures += 1
        model.failed_seconds += seconds

    def show(self, name: str, version: str) -> dict[str, Any]:
        """One of "model_stats"."""
        model = self._models.get(name, _Model())
        successes = model.successes
        nothing = _duration(0, 0.0)
        return {
            "name": name,
            "version": version,
            "last_inference": model.last_inference,
            "inference_count": model.rows,
            "execution_count": model.passes,
            "inference_stats": {
                "success": _duration(successes.count, sum(successes.seconds)),
                "fail": _duration(model.failures, model.failed_seconds),
                **successes.show(),
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "response_stats": {},
            "batch_stats": [
                {"batch_size": size} | {stage: told for stage, told in spent.show().items() if stage != "queue"}
                for size, spent in sorted(model.by_size.items())
            ],
            "memory_usage": [],
        }


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": round(seconds * 1e9)}
