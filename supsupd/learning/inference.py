"""Task inference: which mask explains the inputs, from the outputs alone.

exact     runs the samples under every mask, from the packed bits, and takes the one with the best evidence;
          many rows are shared out by successive halving (`halving`).
one-shot  runs them once under the superposition of all masks and takes the steepest descent of the objective
          (Supermasks in Superposition, section 3.3, equation 4).
binary    does that ⌈log2 k⌉ times and drops the less promising half each time (section 3.3, Binary).

Evidence is read per mask against that mask's own reference (mean and standard deviation on samples held out from its
training): masks differ in how sure they are, and raw values would favour the easiest task.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from cachetools import LRUCache
from torch import Tensor

from supsupd.choices import Objective
from supsupd.learning.bank import Mask, Masks
from supsupd.learning.device_bank import DeviceScorer
from supsupd.learning.kernels import Kernels, LayerBits, LinearKernel, Located, outcomes
from supsupd.learning.lanes import LANES
from supsupd.learning.network import Network

KERNEL_ROWS = 32
"""Up to this many samples the kernel is used: on LeNet 300-100 it takes 185 µs for 32 under one mask, and the dense
product of weights that are unpacked already 224."""
LIGHT_WORK = 1 << 27
"""Weights times rows that go through the kernel in about two milliseconds (LeNet 300-100: 400 rows and masks)."""
DECISIVE = 7.06
"""Standard errors of a decisive lead. Student's t with 7 degrees of freedom, those of the 8 rows that are looked at
first, exceeds it with probability 1e-4; with more rows it is rarer still."""
CHUNK_VALUES = 1 << 22
"""Logits held at once while many masks are scored: 16 MiB."""
READY_BYTES = 128 << 20
"""Weights kept ready to run, of the masks used last."""


class ObjectiveUnavailable(ValueError):
    """An objective that this network, or this way of inference, does not have; the text says why."""


class MethodUnavailable(ObjectiveUnavailable):
    """Method recover finds masks that a reservoir holds, and there is none."""


class NoSuperfluousNeurons(ObjectiveUnavailable):
    """Objective g looks at outputs that stand for no class, and there are none."""


def entropy(logits: Tensor, classes: int = 0) -> Tensor:
    """Objective H: entropy in nats of softmax(logits) over the last axis."""
    log_probabilities = torch.log_softmax(logits, dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


def superfluous_mass(logits: Tensor, classes: int) -> Tensor:
    """What objective G pushes down: log-sum-exp of the outputs beyond the first `classes`.

    G itself is the log-sum-exp of all logits with the gradient blocked on the classes; its descent goes through the
    superfluous outputs alone, so as a value it is theirs that tells masks apart.
    """
    return torch.logsumexp(logits[..., classes:], dim=-1)


EVIDENCE: dict[Objective, Callable[[Tensor, int], Tensor]] = {
    # All read "lower is more at home".
    "entropy": entropy,
    "g": superfluous_mass,
    "energy": lambda logits, _: -torch.logsumexp(logits, dim=-1),
    "max-logit": lambda logits, _: -logits.amax(dim=-1),
}


def evidence_of(logits: Tensor, classes: int) -> dict[str, Tensor]:
    """All evidence that there is for logits (..., outputs), by name; g only where neurons are superfluous."""
    return {name: EVIDENCE[name](logits, classes) for name in _there(classes, logits.shape[-1])}


def _there(classes: int, outputs: int) -> list[Objective]:
    return [name for name in EVIDENCE if name != "g" or classes < outputs]


def slope_objective(objective: Objective, logits: Tensor, classes: int) -> Tensor:
    """What one-shot and binary descend, a scalar: the mean over the rows of H, of G, or of an evidence.

    Raises NoSuperfluousNeurons.
    """
    if objective == "g":
        if classes >= logits.shape[-1]:
            raise NoSuperfluousNeurons(f"objective g needs more outputs than classes, both are {classes}")
        real = torch.arange(logits.shape[-1], device=logits.device) < classes
        return torch.logsumexp(torch.where(real, logits.detach(), logits), dim=-1).mean()
    if objective not in EVIDENCE:
        raise ObjectiveUnavailable(f"objective {objective} has no gradient to descend; it needs method exact")
    return EVIDENCE[objective](logits, classes).mean()


@dataclass(frozen=True)
class MaskScores:
    """What every mask says about the same n samples.

    Args:
        evidence: float32 (k, n) by name, lower is more at home.
        predicted: int64 (k, n), the best real class.
        label_probability: float32 (k, n), softmax at the label over all outputs; empty (k, 0) without labels.
    """

    evidence: dict[str, np.ndarray]
    predicted: np.ndarray
    label_probability: np.ndarray


def reference_logits(network: Network, packed: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Logits (n, outputs) of an mlp in float64 by plain NumPy on unpacked bits: slow and obvious, to test the fast."""
    values = x.astype(np.float64)
    for index, (shape, weight) in enumerate(zip(network.architecture.layers, network.weights, strict=True)):
        rows = packed[shape.offset : shape.offset + shape.nbytes].reshape(shape.rows, shape.row_bytes)
        mask = np.unpackbits(rows, axis=1, bitorder="little", count=shape.columns).astype(np.float64)
        values = values @ (mask * weight.cpu().numpy().astype(np.float64)).T
        if index < len(network.weights) - 1:
            values = np.maximum(values, 0.0)
    return values


class Scorer:
    """Runs samples under masks: few under all of a bank, many under one.

    Args:
        network: the fixed network.
        threads: CPU threads of the kernels.
        ready_bytes: of weights kept ready to run, of the masks used last.
    """

    def __init__(self, network: Network, threads: int, ready_bytes: int = READY_BYTES) -> None:
        self.network = network
        self.kernels = Kernels(threads)
        architecture = network.architecture
        self._linear: LinearKernel | None = None
        if network.device.type == "cpu" and architecture.kind == "mlp":
            layers = [LayerBits(s.rows, s.row_bytes, s.offset) for s in architecture.layers]
            self._linear = LinearKernel(layers, [w.numpy() for w in network.weights], self.kernels)
        self._device: DeviceScorer | None = None
        if network.device.type == "cuda" and architecture.kind == "mlp":
            self._device = DeviceScorer(network)
        self._ready: LRUCache[Mask, list[Tensor]] = LRUCache(max(1, ready_bytes // (4 * architecture.weights)))
        self._lock = threading.Lock()

    def warm_up(self) -> None:
        """Compiles the kernels, so that no query pays for it."""
        architecture = self.network.architecture
        masks = Masks.of([np.zeros(architecture.mask_bytes, np.uint8)])
        x = np.zeros((1, architecture.inputs), np.float32)
        self.run(x, masks[0])
        self.evidence("entropy", x, masks, classes=1)
        self.network.masked_weights(masks[0].packed)
        outcomes(np.zeros((1, architecture.outputs), np.float32), np.ones(1, np.bool_))
        self.kernels.products(masks.load(), np.zeros(8 * architecture.bit_bytes, np.float32))
        self.kernels.counts(masks.load(), architecture.bit_bytes)
        self.kernels.halves_dots(np.zeros(1, np.int64), np.zeros(LANES, np.float32))
        if self._device is not None:
            self._device.warm_up()

    def is_light(self, rows: int, masks: Sequence[Mask]) -> bool:
        """Whether so many rows, each under one of these masks, take two milliseconds or so, and nothing is read from
        the store."""
        work = rows * self.network.architecture.weights
        return self._linear is not None and work <= LIGHT_WORK and all(mask.hot is not None for mask in masks)

    def run(self, x: np.ndarray, mask: Mask) -> Tensor:
        """Logits (n, outputs) of x, float32 (n, inputs), under one mask; its weights are ready if it ran lately."""
        if self._linear is not None and len(x) <= KERNEL_ROWS:
            return torch.from_numpy(self._linear.logits(x, Masks([mask]).load())[0])
        with self._lock:
            weights = self._ready.get(mask)
        if weights is None:
            weights = self.network.masked_weights(mask.packed)
            with self._lock:
                self._ready[mask] = weights
        samples = torch.from_numpy(x).to(self.network.device)
        return self.network.run(samples, weights, self.network.statistics(mask.packed))

    def logits(self, x: np.ndarray, masks: Located) -> Tensor:
        """Logits (k, n, outputs) of x, float32 (n, inputs), under every mask."""
        if self._linear is not None and len(x) <= KERNEL_ROWS:
            return torch.from_numpy(self._linear.logits(x, masks))
        samples = torch.from_numpy(x).to(self.network.device)
        each = [self.network.forward(samples, packed) for packed in masks.arrays]
        return torch.stack(each) if each else samples.new_empty(0, len(x), self.network.architecture.outputs)

    def _iter_chunks(self, x: np.ndarray, masks: Masks) -> Iterator[tuple[slice, Tensor]]:
        """Logits (m, n, outputs) of so many masks at a time that memory stays bounded."""
        count = max(1, CHUNK_VALUES // max(1, len(x) * self.network.architecture.outputs))
        if self._device is not None:
            samples = torch.from_numpy(x).to(self.network.device)
            for start in range(0, len(masks), count):
                places = np.arange(start, min(start + count, len(masks)))
                yield slice(start, start + len(places)), self._device.logits(samples, masks.take(places))
            return
        for part, located in masks.chunks(count):
            yield part, self.logits(x, located)

    def products(self, masks: Masks, vector: np.ndarray) -> np.ndarray:
        """For each mask the sum of `vector`, float32 (8 bit_bytes,), over its set bits, float32 (k,)."""
        if self._device is not None:
            return self._device.products(masks, torch.from_numpy(vector).to(self.network.device)).cpu().numpy()
        parts = [self.kernels.products(part, vector) for _, part in masks.chunks(max(1, len(masks)))]
        return np.concatenate([np.empty(0, np.float32), *parts])

    @torch.no_grad()
    def score(self, x: np.ndarray, masks: Masks, classes: int, labels: np.ndarray | None = None) -> MaskScores:
        """Scores x, float32 (n, inputs), under all masks; labels are class indices (n,) or None."""
        shape = (len(masks), len(x))
        names = _there(classes, self.network.architecture.outputs)
        scores = MaskScores(
            {name: np.empty(shape, np.float32) for name in names},
            np.empty(shape, np.int64),
            np.empty(shape if labels is not None else (len(masks), 0), np.float32),
        )
        for part, logits in self._iter_chunks(x, masks):
            for name, values in evidence_of(logits, classes).items():
                scores.evidence[name][part] = values.cpu().numpy()
            scores.predicted[part] = logits[..., :classes].argmax(dim=-1).cpu().numpy()
            if labels is not None:
                probabilities = torch.softmax(logits, dim=-1).cpu().numpy()
                scores.label_probability[part] = probabilities[:, np.arange(len(x)), labels]
        return scores

    def evidence(self, objective: Objective, x: np.ndarray, masks: Masks, classes: int) -> np.ndarray:
        """One kind of evidence alone, float32 (k, n)."""
        found = np.empty((len(masks), len(x)), np.float32)
        if self._linear is not None and len(x) <= KERNEL_ROWS:
            for part, located in masks.chunks(max(1, len(masks))):
                found[part] = self._linear.evidence(x, located, objective, classes)
            return found
        with torch.no_grad():
            for part, logits in self._iter_chunks(x, masks):
                found[part] = EVIDENCE[objective](logits, classes).cpu().numpy()
        return found


def halving(evidence: Callable[[slice, np.ndarray], np.ndarray], masks: int, rows: int, first: int) -> int:
    """The mask with the least mean evidence over `rows` rows, most masks having seen only a few of them.

    Successive halving (Karnin, Koren and Somekh 2013): all masks see the `first` rows, the better half of them twice
    as many, and so on, until one is left, all rows were seen, or one leads by more than chance explains.
    `evidence(part, places)` gives (places, rows of part).
    """
    places = np.arange(masks)
    values = evidence(slice(0, min(rows, first)), places)
    while True:
        totals = values.sum(axis=1, dtype=np.float64)
        best, seen = int(totals.argmin()), values.shape[1]
        if seen == rows or len(places) == 1 or _leads(values, best):
            return int(places[best])
        kept = np.sort(totals.argsort(kind="stable")[: (len(places) + 1) // 2])
        places = places[kept]
        values = np.hstack([values[kept], evidence(slice(seen, min(rows, 2 * seen)), places)])


def halving_work(masks: int, rows: int, first: int) -> int:
    """Rows times masks that `halving` scores at most."""
    seen = min(rows, first)
    work = masks * seen
    while seen < rows and masks > 1:
        masks, before, seen = (masks + 1) // 2, seen, min(rows, 2 * seen)
        work += masks * (seen - before)
    return work


def _leads(values: np.ndarray, best: int) -> bool:
    """Whether each other mask is worse than the best one on these rows, values (k, n), by a paired t-test."""
    behind = np.delete(values, best, axis=0) - values[best]
    error = behind.std(axis=1, ddof=1) / math.sqrt(values.shape[1])
    return bool((behind.mean(axis=1) > DECISIVE * error).all())


Superposition = tuple[list[Tensor], list[Tensor]]
"""Weights (rows, columns) of each layer, and statistics, of several masks at once."""


@dataclass(frozen=True)
class Slopes:
    """How one-shot and binary look at rows: under the superposition of all masks with weights α.

    Args:
        scorer: of the fixed network.
        masks: the bank.
        objective: what is descended.
        classes: outputs that stand for a class.
        everything: `superposed` of all masks, where it is at hand: it does not depend on the rows.
    """

    scorer: Scorer
    masks: Masks
    objective: Objective
    classes: int
    everything: Superposition | None = None

    def superposed(self, places: np.ndarray) -> Superposition:
        """The masks at `places` (m,), each with α = 1/m."""
        if self.everything is not None and len(places) == len(self.masks):
            return self.everything
        network, bit_bytes = self.scorer.network, self.scorer.network.architecture.bit_bytes
        counts = np.zeros(8 * bit_bytes, np.float32)
        sums = [torch.zeros(length, device=network.device) for length in network.architecture.body.statistics]
        for _, part in self.masks.take(places).chunks(len(places)):
            counts += self.scorer.kernels.counts(part, bit_bytes)
            for packed in part.arrays if sums else ():
                for total, vector in zip(sums, network.statistics(packed), strict=True):
                    total.add_(vector)
        weights = []
        for weight, shape in zip(network.weights, network.architecture.layers, strict=True):
            bits = counts[8 * shape.offset : 8 * (shape.offset + shape.nbytes)].reshape(shape.rows, -1)
            share = torch.from_numpy(bits[:, : shape.columns] / len(places)).to(network.device)
            weights.append(weight * share)
        return weights, [total / len(places) for total in sums]

    def descent(self, x: np.ndarray, places: np.ndarray) -> np.ndarray:
        """-∂/∂α of the objective at α = 1/m for each mask at `places`, float32 (m,): the largest names the task.

        The superposed weight is Σ α_i (W ⊙ M_i), so the slope of α_i is the inner product of W ⊙ gradient with M_i's
        bits: one pass over the packed bank. Raises NoSuperfluousNeurons.
        """
        network = self.scorer.network
        superposed, statistics = self.superposed(places)
        weights = [w.detach().requires_grad_() for w in superposed]
        logits = network.run(torch.from_numpy(x).to(network.device), weights, statistics)
        gradients = torch.autograd.grad(slope_objective(self.objective, logits, self.classes), weights)
        vector = self._by_bits([(g * w).cpu().numpy() for g, w in zip(gradients, network.weights, strict=True)])
        return -self.scorer.products(self.masks.take(places), vector)

    def _by_bits(self, values: list[np.ndarray]) -> np.ndarray:
        """Layers (rows, columns) as one vector in the order of the packed bits, 0 where a row is filled up."""
        shapes = self.scorer.network.architecture.layers
        pairs = zip(values, shapes, strict=True)
        filled = [np.pad(v, ((0, 0), (0, 8 * s.row_bytes - s.columns))).reshape(-1) for v, s in pairs]
        return np.concatenate(filled).astype(np.float32)

    def one_shot(self, x: np.ndarray) -> int:
        """The mask that one gradient step names for rows x, float32 (n, inputs) (equation 4)."""
        return int(self.descent(x, np.arange(len(self.masks))).argmax())

    def binary(self, x: np.ndarray) -> int:
        """⌈log2 k⌉ rounds, each of which keeps the half with the larger slopes (ties: the older masks)."""
        places = np.arange(len(self.masks))
        while len(places) > 1:
            slopes = self.descent(x, places)
            places = np.sort(places[np.argsort(-slopes, kind="stable")[: (len(places) + 1) // 2]])
        return int(places[0])


def reference_slopes(slopes: Slopes, x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The same descent by differentiating the superposition in α itself, all masks dense, float64 (m,): for tests."""
    network = slopes.scorer.network
    alphas = torch.full((len(places),), 1.0 / len(places), requires_grad=True)
    stacks = [
        torch.stack(w) for w in zip(*(network.masked_weights(slopes.masks[p].packed) for p in places), strict=True)
    ]
    superposed = [torch.einsum("k,koi->oi", alphas, stack) for stack in stacks]
    each = [network.statistics(slopes.masks[p].packed) for p in places]
    statistics = [torch.stack(vectors).mean(dim=0) for vectors in zip(*each, strict=True)]
    logits = network.run(torch.from_numpy(x), superposed, statistics)
    return -torch.autograd.grad(slope_objective(slopes.objective, logits, slopes.classes), alphas)[0].double().numpy()
