"""Trains the supermask of one task on one batch at a time.

Training is a pure function of (state, samples, settings, seed): the caller's state is never changed, so throwing a
result away is the whole of a rollback.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn import functional

from supsupd.config import LearningSettings
from supsupd.learning.network import Network
from supsupd.learning.supermask import initial_scores, masked_forward, scores_from_mask, select

STEP_KEY = "steps"
RMSPROP_DECAY = 0.99
ADAM_DECAYS = (0.9, 0.999)
EPSILON = 1e-8
SMOOTHING_ROWS = 8.0
WORSE_Z = 1.645
"""A good update is refused by chance in at most 5 % of the batches (one-sided normal test on paired differences)."""


@dataclass(frozen=True)
class Samples:
    """Normalised inputs and class indices of one batch, on the network's device.

    Args:
        x: float32 (n, inputs).
        y: int64 (n,), indices into the class list.
    """

    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, device: torch.device) -> Samples:
        return cls(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, start: int | None, stop: int | None) -> Samples:
        return Samples(self.x[start:stop], self.y[start:stop])

    def take(self, rows: np.ndarray) -> Samples:
        index = torch.from_numpy(rows).to(self.x.device)
        return Samples(self.x[index], self.y[index])

    def joined(self, other: Samples) -> Samples:
        return Samples(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]))


@dataclass(frozen=True)
class TrainingState:
    """What going on with a task needs; one tensor (rows, columns) per layer in each list.

    Args:
        scores: the trained scores.
        average: their running (Polyak) average, from which the mask is taken.
        moments: first moments (Adam only, else empty) and second moments of the gradient.
        steps: steps taken so far.
    """

    scores: list[Tensor]
    average: list[Tensor]
    first_moments: list[Tensor]
    second_moments: list[Tensor]
    steps: int

    def to_bytes(self) -> bytes:
        tensors = {STEP_KEY: torch.tensor(self.steps)}
        for name in ("scores", "average", "first_moments", "second_moments"):
            tensors |= {f"{name}.{i}": t.cpu().contiguous() for i, t in enumerate(getattr(self, name))}
        return save_tensors(tensors)

    @classmethod
    def from_bytes(cls, data: bytes, device: torch.device) -> TrainingState:
        """Raises safetensors' SafetensorError or KeyError when `data` is not what `to_bytes` made."""
        tensors = load_tensors(data)
        steps = int(tensors.pop(STEP_KEY))

        def group(name: str) -> list[Tensor]:
            count = sum(key.startswith(f"{name}.") for key in tensors)
            return [tensors[f"{name}.{i}"].to(device) for i in range(count)]

        return cls(group("scores"), group("average"), group("first_moments"), group("second_moments"), steps)


@dataclass(frozen=True)
class MaskUpdate:
    """A trained mask before it is committed.

    Args:
        packed: uint8 (mask_bytes,).
        state: where the next batch of the task goes on.
        density: fraction of the weights kept.
        held_out: the rows of the batch that training did not see (row numbers).
        loss_before, loss_after: mean training loss in nats on the held-out rows.
        margin: what the loss may rise by chance alone, from the spread of the rows' differences.
    """

    packed: np.ndarray
    state: TrainingState
    density: float
    held_out: np.ndarray
    loss_before: float
    loss_after: float
    margin: float

    @property
    def taken(self) -> bool:
        """False when the held-out rows say that the task got worse."""
        return self.loss_after <= self.loss_before + self.margin


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from what it belongs to (settings seed, batch hash, …), the same in every process."""
    digest = hashlib.sha256("\x00".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Learner:
    """Trains masks over one network with one recipe.

    Args:
        network: the fixed network.
        settings: rule, optimiser and bounds of a batch's training.
    """

    def __init__(self, network: Network, settings: LearningSettings) -> None:
        self.network = network
        self.settings = settings

    def fresh(self, *key: object) -> TrainingState:
        """Random scores for a new task; `key` makes them repeat."""
        generator = torch.Generator().manual_seed(derive_seed(self.settings.seed, "scores", *key))
        shapes = self.network.architecture.layers
        return self._start([initial_scores((s.rows, s.columns), generator) for s in shapes], steps=0)

    def from_mask(self, packed: np.ndarray) -> TrainingState:
        """A state that goes on from a task's bits alone."""
        rule = self.settings.rule
        layers = zip(self.network.unpack(packed), self.network.architecture.layers, strict=True)
        # Half of the initial spread: sure enough to keep the bits, near enough to change them.
        scores = [scores_from_mask(mask, 0.5 / math.sqrt(s.columns), rule) for mask, s in layers]
        return self._start(scores, steps=0)

    def _start(self, scores: list[Tensor], steps: int) -> TrainingState:
        scores = [s.to(self.network.device) for s in scores]
        zeros = [torch.zeros_like(s) for s in scores]
        first = [torch.zeros_like(s) for s in scores] if self.settings.optimiser == "adam" else []
        return TrainingState(scores, [s.clone() for s in scores], first, zeros, steps)

    def mask(self, state: TrainingState) -> list[Tensor]:
        """The bits of a state, bool (rows, columns) per layer."""
        return [select(s, self.settings.rule, self.settings.density) for s in state.average]

    def packed(self, state: TrainingState) -> np.ndarray:
        return self.network.pack(self.mask(state))

    def learn(self, state: TrainingState, batch: Samples, seed: int, seen: Mapping[int, int]) -> MaskUpdate:
        """Trains on a part of the batch and measures the mask before and after on the rest.

        `seen` counts the task's rows so far per class index. The caller keeps the old mask unless the update is
        `taken`.
        """
        training_rows, held_out_rows = self._split(len(batch), seed)
        training, held_out = batch.take(training_rows), batch.take(held_out_rows)
        trained = self.train(state, training, seed, seen)
        offsets = self._offsets(batch.y, seen)
        before, after = self._losses(state, held_out, offsets), self._losses(trained, held_out, offsets)
        masks = self.mask(trained)
        kept = sum(int(m.sum()) for m in masks)
        return MaskUpdate(
            packed=self.network.pack(masks),
            state=trained,
            density=kept / self.network.architecture.weights,
            held_out=held_out_rows,
            loss_before=float(before.mean()),
            loss_after=float(after.mean()),
            margin=WORSE_Z * float((after - before).std(correction=0)) / math.sqrt(len(held_out)),
        )

    def train(
        self, state: TrainingState, samples: Samples, seed: int, seen: Mapping[int, int] | None = None
    ) -> TrainingState:
        """`steps` minibatch steps, or one pass over the samples if that is longer, at most `max_steps`.

        A batch that shows only a part of the task's classes takes that part of the steps: what it does not show, it
        cannot keep from being unlearned.
        """
        settings = self.settings
        size = min(settings.minibatch, len(samples))
        count = min(max(settings.steps, math.ceil(len(samples) / size)), settings.max_steps)
        count = max(1, round(count * _coverage(samples.y, seen or {})))
        order = np.random.Generator(np.random.Philox(seed))
        working = self._resumed(state)
        offsets = self._offsets(samples.y, seen or {})
        drawn = np.empty(0, dtype=np.int64)
        for _ in range(count):
            if len(drawn) < size:
                drawn = order.permutation(len(samples))
            rows, drawn = drawn[:size], drawn[size:]
            working = self._step(working, samples.take(rows), offsets)
        return working

    def _resumed(self, state: TrainingState) -> TrainingState:
        """A working copy; a state that another optimiser left gets the moments that it lacks."""
        working = _copy(state)
        if self.settings.optimiser == "adam" and not working.first_moments:
            return replace(working, first_moments=[torch.zeros_like(s) for s in working.scores])
        return working

    def _step(self, state: TrainingState, samples: Samples, offsets: Tensor) -> TrainingState:
        """One gradient step in place on the working copy."""
        settings = self.settings
        scores = [s.requires_grad_() for s in state.scores]
        logits = masked_forward(samples.x, scores, self.network.weights, settings.rule, settings.density)
        loss = functional.cross_entropy(logits + offsets, samples.y, label_smoothing=settings.label_smoothing)
        gradients = torch.autograd.grad(loss, scores)
        steps = state.steps + 1
        decay = min(settings.averaging, (1 + steps) / (10 + steps))  # a short memory while young
        with torch.no_grad():
            for layer, gradient in enumerate(gradients):
                scores[layer].add_(self._direction(state, layer, gradient, steps), alpha=-settings.lr)
                state.average[layer].lerp_(scores[layer], 1.0 - decay)
        return replace(state, scores=[s.detach() for s in scores], steps=steps)

    def _direction(self, state: TrainingState, layer: int, gradient: Tensor, steps: int) -> Tensor:
        second = state.second_moments[layer]
        if self.settings.optimiser == "rmsprop":
            second.mul_(RMSPROP_DECAY).addcmul_(gradient, gradient, value=1 - RMSPROP_DECAY)
            return gradient / (second.sqrt() + EPSILON)
        beta1, beta2 = ADAM_DECAYS
        first = state.first_moments[layer].lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        return (first / (1 - beta1**steps)) / ((second / (1 - beta2**steps)).sqrt() + EPSILON)

    def _split(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers to train on and to hold out; at least one of each unless there is a single row."""
        order = np.random.Generator(np.random.Philox(derive_seed(seed, "held-out"))).permutation(count)
        held = min(max(1, round(self.settings.held_out * count)), count - 1)
        return (np.sort(order[held:]), np.sort(order[:held])) if held else (order, order)

    def _offsets(self, labels: Tensor, seen: Mapping[int, int]) -> Tensor:
        """What is added to the logits in training, (outputs,): log of the classes' share in the batch over their share
        in the task (logit adjustment, Menon et al. 2021).

        A batch of few classes is then no reason to forget the others: the mask learns p(x | class) from it, not that
        the other classes have gone. Both shares are smoothed by a few rows of the task; 0 for a class never seen.
        """
        offsets = torch.zeros(self.network.architecture.outputs, device=labels.device)
        classes, counts = (v.tolist() for v in torch.unique(labels, return_counts=True))
        batch = dict(zip(classes, counts, strict=True))
        task = {label: seen.get(label, 0) + batch.get(label, 0) for label in {*seen, *batch}}
        rows, total = sum(counts), sum(task.values())
        for label, count in task.items():
            share = count / total
            ratio = (batch.get(label, 0) + SMOOTHING_ROWS * share) / ((rows + SMOOTHING_ROWS) * share)
            offsets[label] = math.log(ratio)
        return offsets

    @torch.no_grad()
    def _losses(self, state: TrainingState, samples: Samples, offsets: Tensor) -> Tensor:
        """Training loss in nats of each row, (n,)."""
        weights = [torch.where(m, w, 0.0) for m, w in zip(self.mask(state), self.network.weights, strict=True)]
        logits = self.network.run(samples.x, weights) + offsets
        smoothing = self.settings.label_smoothing
        return functional.cross_entropy(logits, samples.y, label_smoothing=smoothing, reduction="none")


def _coverage(labels: Tensor, seen: Mapping[int, int]) -> float:
    """The share of a task's rows, `seen` per class, whose classes occur in labels (n,)."""
    present = set(torch.unique(labels).tolist())
    total = sum(seen.values())
    return sum(count for label, count in seen.items() if label in present) / total if total else 1.0


def _copy(state: TrainingState) -> TrainingState:
    def clones(tensors: list[Tensor]) -> list[Tensor]:
        return [t.clone() for t in tensors]

    return TrainingState(
        clones(state.scores),
        clones(state.average),
        clones(state.first_moments),
        clones(state.second_moments),
        state.steps,
    )
