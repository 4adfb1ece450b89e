"""Trains the supermask of one task on one batch at a time.

Training is a pure function of (state, samples, settings, seed): the caller's state is never changed, so throwing a
result away is the whole of a rollback.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn import functional

from supsupd.learning.foreign import foreign_copies
from supsupd.learning.gpu_kernels import fused_rmsprop
from supsupd.learning.network import Architecture, Network
from supsupd.learning.optimiser import Layer, Step, loss_slope, take_step
from supsupd.learning.supermask import (
    effective_weights,
    erdos_renyi_densities,
    initial_scores,
    scores_from_mask,
    select,
)
from supsupd.learning.transforms import Transforms
from supsupd.sections import FLOAT_BYTES, LearningSettings

STEP_KEY = "steps"
GROUPS = ("scores", "average", "first_moments", "second_moments", "statistics")
STATISTICS_SHARE = 0.1
"""Least weight of a batch in a task's normalisation statistics: they follow the mask."""
SURENESS = 4.0
"""Of scores made from bits, in initial bounds. The moments start at 0, so that the first twenty steps go as far as 77
of full length: bits whose scores lay nearer to 0 were undone by them (0.95 to 0.74 on MNIST)."""
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
        return Samples(self.x.index_select(0, index), self.y.index_select(0, index))

    @property
    def nbytes(self) -> int:
        return self.x.nbytes + self.y.nbytes

    @staticmethod
    def joined(parts: Sequence[Samples]) -> Samples:
        """The rows of all parts, in order; those of one alone are not copied."""
        if len(parts) == 1:
            return parts[0]
        return Samples(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))


@dataclass(frozen=True)
class TrainingState:
    """What going on with a task needs; one tensor (rows, columns) per layer in each list.

    Args:
        scores: the trained scores.
        average: their running (Polyak) average, from which the mask is taken.
        moments: first moments (Adam only, else empty) and second moments of the gradient.
        steps: steps taken so far.
        statistics: normalisation statistics of the averaged mask, a vector each; [] unless norm is "task".
    """

    scores: list[Tensor]
    average: list[Tensor]
    first_moments: list[Tensor]
    second_moments: list[Tensor]
    steps: int
    statistics: list[Tensor] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for name in GROUPS for tensor in getattr(self, name))

    def to_bytes(self) -> bytes:
        tensors = {STEP_KEY: torch.tensor(self.steps)}
        for name in GROUPS:
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

        return cls(**{name: group(name) for name in GROUPS}, steps=steps)


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


def state_bytes(architecture: Architecture, settings: LearningSettings) -> int:
    """What one training state takes: scores, their average and the moments, float32."""
    tensors = 4 if settings.optimiser == "adam" else 3
    return FLOAT_BYTES * tensors * architecture.weights + architecture.statistic_bytes


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from what it belongs to (settings seed, batch hash, …), the same in every process."""
    digest = hashlib.sha256("\x00".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Learner:
    """Trains masks over one network with one recipe.

    Args:
        network: the fixed network.
        settings: rule, optimiser and bounds of a batch's training.
        transforms: whose flips and crops vary the rows of images.
    """

    def __init__(self, network: Network, settings: LearningSettings, transforms: Transforms | None = None) -> None:
        self.network = network
        self.settings = settings
        self.transforms = transforms or Transforms()
        shapes = [layer.shape for layer in network.architecture.layers]
        self._densities = [settings.density] * len(shapes)
        if settings.density_budget == "erdos-renyi":
            self._densities = erdos_renyi_densities(shapes, settings.density)

    @property
    def active_tasks(self) -> int:
        """How many tasks keep their training state: as many as are set, or as there is room for."""
        room = self.settings.memory_bytes // state_bytes(self.network.architecture, self.settings)
        return max(1, min(self.settings.active_tasks, room))

    def warm_up(self) -> None:
        """Compiles what a step of this recipe takes, or loads it: about a second where there is no cache yet."""
        one = torch.ones(1, device=self.network.device)
        settings = self.settings
        take_step(Layer(*(one.clone() for _ in Layer._fields)), one, Step.of(settings.optimiser, settings.rule, 1))
        effective_weights([one], [one], settings.rule, [0.5], [one.clone()])
        select(one, settings.rule, 0.5)

    def fresh(self, *key: object) -> TrainingState:
        """Random scores for a new task; `key` makes them repeat.

        Over pretrained weights all scores start positive: the network is whole at first (Piggyback).
        """
        generator = torch.Generator().manual_seed(derive_seed(self.settings.seed, "scores", *key))
        shapes = self.network.architecture.layers
        scores = [initial_scores((s.rows, s.columns), generator) for s in shapes]
        if self.network.pretrained is not None:
            scores = [s.abs() for s in scores]
        lengths = self.network.architecture.body.statistics
        return self._start(scores, [torch.zeros(length) for length in lengths])

    def from_mask(self, packed: np.ndarray, sureness: float = SURENESS) -> TrainingState:
        """Where training of a task goes on whose scores were not kept; they get this size, in initial bounds."""
        rule = self.settings.rule
        layers = zip(self.network.unpack(packed), self.network.architecture.layers, strict=True)
        scores = [scores_from_mask(mask, sureness / math.sqrt(s.columns), rule) for mask, s in layers]
        return self._start(scores, self.network.statistics(packed))

    def _start(self, scores: list[Tensor], statistics: list[Tensor]) -> TrainingState:
        scores = [s.to(self.network.device) for s in scores]
        zeros = [torch.zeros_like(s) for s in scores]
        first = [torch.zeros_like(s) for s in scores] if self.settings.optimiser == "adam" else []
        statistics = [s.to(self.network.device) for s in statistics]
        return TrainingState(scores, [s.clone() for s in scores], first, zeros, 0, statistics)

    def mask(self, state: TrainingState) -> list[Tensor]:
        """The bits of a state, bool (rows, columns) per layer."""
        return [select(s, self.settings.rule, d) for s, d in zip(state.average, self._densities, strict=True)]

    def packed(self, state: TrainingState) -> np.ndarray:
        return self.network.pack(self.mask(state), state.statistics)

    def learn(self, state: TrainingState, batch: Samples, seed: int, seen: Mapping[int, int]) -> MaskUpdate:
        """Trains on a part of the batch and measures the mask before and after on the rest.

        `seen` counts the task's rows so far per class index. The caller keeps the old mask unless the update is
        `taken`.
        """
        training_rows, held_out_rows = self.split_rows(len(batch), seed)
        training, held_out = batch.take(training_rows), batch.take(held_out_rows)
        trained = self.train(state, training, seed, seen)
        offsets = self._offsets(batch.y, seen)
        before, after = self.losses(state, held_out, offsets), self.losses(trained, held_out, offsets)
        masks = self.mask(trained)
        return MaskUpdate(
            packed=self.network.pack(masks, trained.statistics),
            state=trained,
            density=self.network.density(masks),
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
        drawn, buffers = np.empty(0, dtype=np.int64), self._buffers()
        for step in range(count):
            if len(drawn) < size:
                drawn = order.permutation(len(samples))
            rows, drawn = drawn[:size], drawn[size:]
            varied = self._varied(samples.take(rows), order)
            working = self._step(working, varied, offsets, self._lr(step / count), buffers)
        return self._with_statistics(working, samples, count)

    def _varied(self, samples: Samples, order: np.random.Generator) -> Samples:
        """Flipped and shifted as the transforms say, with foreign copies behind if the settings want them."""
        shape = self.network.architecture.input_shape
        if self.transforms.augments:
            samples = Samples(self.transforms.augmented(samples.x, shape, order), samples.y)
        if self.settings.foreign == "none":
            return samples
        outputs = self.network.architecture.outputs
        x, y = foreign_copies(self.settings.foreign, samples.x, samples.y, (shape, outputs), order)
        return Samples.joined([samples, Samples(x, y)])

    @torch.no_grad()
    def _with_statistics(self, state: TrainingState, samples: Samples, count: int) -> TrainingState:
        """The task's normalisation statistics, brought to its mask as it is now by one pass over the samples."""
        if not state.statistics:
            return state
        weights = self._effective(state.average, self._buffers())
        observed = []
        for start in range(0, len(samples), self.settings.minibatch):
            found = [torch.zeros_like(s) for s in state.statistics]
            self.network.run(samples.rows(start, start + self.settings.minibatch).x, weights, found, training=True)
            observed.append(found)
        means = [torch.stack(found).mean(dim=0) for found in zip(*observed, strict=True)]
        share = max(STATISTICS_SHARE, count / state.steps)
        return replace(state, statistics=[s.lerp(m, share) for s, m in zip(state.statistics, means, strict=True)])

    def _resumed(self, state: TrainingState) -> TrainingState:
        """A working copy; a state that another optimiser left gets the moments that it lacks."""
        working = _copy(state)
        if self.settings.optimiser == "adam" and not working.first_moments:
            return replace(working, first_moments=[torch.zeros_like(s) for s in working.scores])
        return working

    def _lr(self, progress: float) -> float:
        """Step size when the share `progress` of a batch's steps is done (cosine: Loshchilov and Hutter 2017)."""
        cosine = self.settings.schedule == "cosine"
        return self.settings.lr * (0.5 * (1.0 + math.cos(math.pi * progress)) if cosine else 1.0)

    def _step(
        self, state: TrainingState, samples: Samples, offsets: Tensor, lr: float, buffers: list[Tensor]
    ) -> TrainingState:
        """One gradient step in place on the working copy; `buffers` take the effective weights."""
        settings = self.settings
        weights = [w.detach().requires_grad_() for w in self._effective(state.scores, buffers)]
        passing = [s.clone() for s in state.statistics]  # the batch's own, under a mask that is not kept
        logits = self.network.run(samples.x, weights, passing, training=True)
        slope = loss_slope(logits.detach() + offsets, samples.y, settings.label_smoothing)
        gradients = torch.autograd.grad(logits, weights, slope)
        count = state.steps + 1
        decay = min(settings.averaging, (1 + count) / (10 + count))  # a short memory while young
        step = Step.of(settings.optimiser, settings.rule, count, lr, share=1.0 - decay)
        first = state.first_moments if step.adam else state.second_moments
        groups = (self.network.weights, state.scores, state.average, first, state.second_moments)
        for gradient, buffer, *tensors in zip(gradients, buffers, *groups, strict=True):
            if gradient.is_cuda and not (step.adam or step.signed):
                fused_rmsprop(Layer(*tensors), gradient, step, buffer)
            else:
                take_step(Layer(*tensors), gradient, step)
        return replace(state, steps=count)

    def split(self, samples: Samples, seed: int) -> tuple[Samples, Samples]:
        """A part to train on and a part to hold out."""
        training, held_out = self.split_rows(len(samples), seed)
        return samples.take(training), samples.take(held_out)

    def split_rows(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
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
    def losses(self, state: TrainingState, samples: Samples, offsets: Tensor | None = None) -> Tensor:
        """Training loss in nats of each row, (n,); `offsets` (outputs,) are added to the logits."""
        logits = self.network.run(samples.x, self._effective(state.average, self._buffers()), state.statistics)
        logits = logits if offsets is None else logits + offsets
        smoothing = self.settings.label_smoothing
        return functional.cross_entropy(logits, samples.y, label_smoothing=smoothing, reduction="none")

    def _buffers(self) -> list[Tensor]:
        """Room for the effective weights of each layer."""
        return [torch.empty_like(weight) for weight in self.network.weights]

    def _effective(self, scores: list[Tensor], buffers: list[Tensor]) -> list[Tensor]:
        """W ⊙ M under the mask of these scores, in the buffers."""
        effective_weights(scores, self.network.weights, self.settings.rule, self._densities, buffers)
        return buffers


def _coverage(labels: Tensor, seen: Mapping[int, int]) -> float:
    """The share of a task's rows, `seen` per class, whose classes occur in labels (n,)."""
    present = set(torch.unique(labels).tolist())
    total = sum(seen.values())
    return sum(count for label, count in seen.items() if label in present) / total if total else 1.0


def _copy(state: TrainingState) -> TrainingState:
    clones: dict[str, Any] = {name: [t.clone() for t in getattr(state, name)] for name in GROUPS}
    return replace(state, **clones)
