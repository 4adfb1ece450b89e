"""The Hopfield reservoir of HopSupSup: finished masks as attractors of one matrix for each masked layer.

A mask is the vector x = 2m - 1 of ±1 over a layer's units. It is stored with the first-order Storkey rule and found
again for some inputs by descent on (1 - t/T) · evidence + γ (t/T) · energy, from the mean of all stored masks
(Supermasks in Superposition, section 3.5 and appendix F). The matrices have one size however many masks they hold.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from supsupd.learning.inference import entropy
from supsupd.learning.network import Network
from supsupd.sections import ReservoirSettings

CAPACITY_PER_UNIT = 0.138
"""Masks that a matrix holds for each unit before recall breaks down (Amit, Gutfreund and Sompolinsky 1985)."""
FLOAT_BYTES = 4
RECALL_STEPS = 30
"""Rounds in which all units follow their field, at most."""


class ReservoirMismatch(ValueError):
    """Stored bytes are not those of a matrix of this size."""


@dataclass(frozen=True)
class Reservoir:
    """All stored masks at once. Immutable.

    Args:
        matrices: float32 (d, d) for each masked layer of d units, on the CPU.
        totals: float32 (d,) for each, the sum of the stored ±1.
        patterns: SHA-256 of each stored mask's packed bits, the oldest first.
    """

    matrices: tuple[Tensor, ...]
    totals: tuple[Tensor, ...]
    patterns: tuple[str, ...] = ()

    @classmethod
    def empty(cls, network: Network) -> Reservoir:
        sizes = [layer.columns for layer in network.architecture.layers]
        return cls(tuple(torch.zeros(d, d) for d in sizes), tuple(torch.zeros(d) for d in sizes))

    @classmethod
    def from_bytes(cls, payloads: Sequence[bytes], patterns: Sequence[str], network: Network) -> Reservoir:
        """What `to_bytes` made, with the hashes of the patterns. Raises ReservoirMismatch."""
        sizes = [layer.columns for layer in network.architecture.layers]
        given = [len(payload) for payload in payloads]
        if given != (wanted := [FLOAT_BYTES * (d + 1) * d for d in sizes]):
            raise ReservoirMismatch(f"reservoir: matrices of {given} bytes, the network's layers want {wanted}")
        tables = [
            torch.from_numpy(np.frombuffer(payload, "<f4").astype(np.float32).reshape(d + 1, d))
            for payload, d in zip(payloads, sizes, strict=True)
        ]
        return cls(tuple(t[:-1] for t in tables), tuple(t[-1] for t in tables), tuple(patterns))

    def to_bytes(self) -> list[bytes]:
        """For each layer its matrix and then its total, float32, little-endian, row by row."""
        pairs = zip(self.matrices, self.totals, strict=True)
        return [torch.cat([w, total[None]]).numpy().astype("<f4").tobytes() for w, total in pairs]

    @property
    def nbytes(self) -> int:
        return FLOAT_BYTES * sum(w.numel() + total.numel() for w, total in zip(self.matrices, self.totals, strict=True))

    @property
    def capacity(self) -> float:
        """Masks that the narrowest layer can hold."""
        return CAPACITY_PER_UNIT * min(len(total) for total in self.totals)

    @property
    def load(self) -> float:
        """Stored masks as a share of the capacity."""
        return len(self.patterns) / self.capacity

    def with_pattern(self, packed: np.ndarray, network: Network) -> Reservoir:
        """With one packed mask more; the same when it is stored already: storing twice would take it out again."""
        digest = pattern_hash(packed)
        if digest in self.patterns:
            return self
        signs = signs_of(packed, network)
        matrices = tuple(storkey(w, x) for w, x in zip(self.matrices, signs, strict=True))
        totals = tuple(total + x for total, x in zip(self.totals, signs, strict=True))
        return Reservoir(matrices, totals, (*self.patterns, digest))

    def energy(self, signs: Sequence[Tensor]) -> float:
        """The sum over the layers of -½ xᵀ W x."""
        return sum(-0.5 * float(x @ (w @ x)) for w, x in zip(self.matrices, signs, strict=True))


@dataclass(frozen=True)
class Recovered:
    """Where a descent ended.

    Args:
        packed: the mask, uint8 (mask_bytes,).
        match: the place among the stored patterns whose bits these are, None if they are no stored mask's.
        steps: taken; it ends where a stored mask is reached.
        evidence, energy: before each step.
    """

    packed: np.ndarray
    match: int | None
    steps: int
    evidence: tuple[float, ...]
    energy: tuple[float, ...]


def pattern_hash(packed: np.ndarray) -> str:
    """SHA-256 of a packed mask."""
    return hashlib.sha256(packed.tobytes()).hexdigest()


def signs_of(packed: np.ndarray, network: Network) -> list[Tensor]:
    """A packed mask as ±1, float32 (d,) for each layer, on the CPU."""
    return [2.0 * mask.cpu().float().view(-1) - 1.0 for mask in network.unpack(packed)]


def storkey(matrix: Tensor, x: Tensor) -> Tensor:
    """W + (xxᵀ - I - xhᵀ - hxᵀ) / d with h = Wx: the first-order Storkey rule."""
    h = matrix @ x
    crossed = torch.outer(x, h)
    change = torch.outer(x, x) - (crossed + crossed.T)
    change.diagonal().sub_(1.0)
    return matrix + change / len(x)


@dataclass(frozen=True)
class Descent:
    """A descent on the way.

    Args:
        scores: float32 (d,) for each layer; a unit is kept where its score is at least 0.
        velocity: of each score.
        evidence: of the mask that the last step left.
    """

    scores: list[Tensor]
    velocity: list[Tensor]
    evidence: float = math.nan

    @property
    def bits(self) -> list[Tensor]:
        return [s >= 0 for s in self.scores]

    @property
    def signs(self) -> list[Tensor]:
        return [2.0 * bits.float() - 1.0 for bits in self.bits]


class Recovery:
    """Finds stored masks again, from inputs.

    Args:
        reservoir: what is stored.
        network: what inputs run through.
        settings: of the descent.
    """

    def __init__(self, reservoir: Reservoir, network: Network, settings: ReservoirSettings) -> None:
        self.reservoir = reservoir
        self.network = network
        self.settings = settings

    def start(self) -> Descent:
        """At the mean of the stored masks. There must be one."""
        count = len(self.reservoir.patterns)
        return Descent([t / count for t in self.reservoir.totals], [torch.zeros_like(t) for t in self.reservoir.totals])

    def step(self, descent: Descent, x: Tensor, number: int) -> Descent:
        """Step `number` of 1 to `steps`, for rows x (n, inputs): momentum on the straight-through slopes."""
        settings = self.settings
        share = number / settings.steps
        evidence, slopes = self._slopes(descent, x)
        pulls = [-2.0 * (w @ s) for w, s in zip(self.reservoir.matrices, descent.signs, strict=True)]
        velocity = [
            settings.momentum * v + (1.0 - share) * slope + settings.gamma * share * pull
            for v, slope, pull in zip(descent.velocity, slopes, pulls, strict=True)
        ]
        scores = [s - settings.lr * v for s, v in zip(descent.scores, velocity, strict=True)]
        return Descent(scores, velocity, evidence)

    def run(self, x: Tensor) -> Recovered:
        """From the mean to a stored mask, or for all the steps, on rows x (n, inputs)."""
        descent = self.start()
        evidence: list[float] = []
        energy: list[float] = []
        for number in range(1, self.settings.steps + 1):
            energy.append(self.reservoir.energy(descent.signs))
            descent = self.step(descent, x, number)
            evidence.append(descent.evidence)
            packed = self.network.pack([bits[None] for bits in descent.bits])
            digest = pattern_hash(packed)
            if digest in self.reservoir.patterns:
                match = self.reservoir.patterns.index(digest)
                return Recovered(packed, match, number, tuple(evidence), tuple(energy))
        return Recovered(packed, None, number, tuple(evidence), tuple(energy))

    def _slopes(self, descent: Descent, x: Tensor) -> tuple[float, list[Tensor]]:
        """The evidence under the mask, and its slope in each bit."""
        device = self.network.device
        bits = [b.float().to(device).requires_grad_() for b in descent.bits]
        logits = self.network.run(x, [b[None] for b in bits])
        projected = self.settings.descent == "projected"
        evidence = informed_entropy(logits) if projected else entropy(logits).mean()
        slopes = [slope.cpu() for slope in torch.autograd.grad(evidence, bits)]
        return float(evidence.detach()), self._projected(slopes) if projected else slopes

    def _projected(self, slopes: list[Tensor]) -> list[Tensor]:
        """W g for each layer, as strong as the energy's own slope: root mean square γ over all units.

        W weighs what lies along the stored masks and drops the rest, which is most of a slope and noise to the search.
        """
        along = [w @ slope for w, slope in zip(self.reservoir.matrices, slopes, strict=True)]
        strength = float(torch.cat(along).square().mean().sqrt())
        return [g * (self.settings.gamma / strength) for g in along] if strength > 0 else along


def informed_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the rows less the entropy of their mean answer; of a single row its entropy.

    A mask that gives every row the same answer is sure of all of them, and at home with none.
    """
    rows = entropy(logits).mean()
    if len(logits) == 1:
        return rows
    mean = torch.softmax(logits, dim=-1).mean(dim=0)
    return rows + torch.special.xlogy(mean, mean).sum()


def recall(reservoir: Reservoir, masks: Sequence[np.ndarray], network: Network, turned: float, seed: int) -> list[bool]:
    """Whether each packed mask comes back, bit for bit, from a copy with a share of bits `turned`, by energy alone."""
    generator = torch.Generator().manual_seed(seed)
    back = [True] * len(masks)
    stored = [torch.stack(layer) for layer in zip(*(signs_of(m, network) for m in masks), strict=True)] if masks else []
    for matrix, x in zip(reservoir.matrices, stored, strict=False):
        state = torch.where(torch.rand(x.shape, generator=generator) < turned, -x, x)
        for _ in range(RECALL_STEPS):
            moved = torch.where(state @ matrix >= 0, 1.0, -1.0)
            if torch.equal(moved, state):
                break
            state = moved
        back = [b and bool(same) for b, same in zip(back, (state == x).all(dim=1), strict=True)]
    return back
