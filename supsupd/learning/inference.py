"""Task inference: which mask explains the inputs, from the outputs alone.

exact     runs the samples under every mask, from the packed bits, and takes the one with the best evidence.
one-shot  runs them once under the superposition of all masks and takes the steepest descent of the output entropy
          (Supermasks in Superposition, section 3.3, equation 4).

Evidence is read per mask against that mask's own reference (mean and standard deviation on samples held out from its
training): masks differ in how sure they are, and raw values would favour the easiest task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from supsupd.learning.kernels import TableKernel
from supsupd.learning.network import Network

EvidenceName = Literal["entropy", "energy", "max-logit"]
Method = Literal["exact", "one-shot"]

TABLE_ROWS = 8  # up to this many samples the look-up tables beat unpacking each mask (measured on LeNet 300-100)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits) over the last axis."""
    log_probabilities = torch.log_softmax(logits, dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


EVIDENCE: dict[str, Callable[[Tensor], Tensor]] = {
    # All read "lower is more at home".
    "entropy": entropy,
    "energy": lambda logits: -torch.logsumexp(logits, dim=-1),
    "max-logit": lambda logits: -logits.amax(dim=-1),
}


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
    """Logits (n, outputs) in float64 by plain NumPy on unpacked bits: slow and obvious, to test the fast ways."""
    values = x.astype(np.float64)
    for index, (shape, weight) in enumerate(zip(network.architecture.layers, network.weights, strict=True)):
        rows = packed[shape.offset : shape.offset + shape.nbytes].reshape(shape.rows, shape.row_bytes)
        mask = np.unpackbits(rows, axis=1, bitorder="little", count=shape.columns).astype(np.float64)
        values = values @ (mask * weight.cpu().numpy().astype(np.float64)).T
        if index < len(network.weights) - 1:
            values = np.maximum(values, 0.0)
    return values


class Scorer:
    """Scores samples under every mask of a bank.

    Args:
        network: the fixed network.
        threads: CPU threads of the table kernel.
    """

    def __init__(self, network: Network, threads: int) -> None:
        self.network = network
        layers = [(s.rows, s.columns, s.offset, s.constant) for s in network.architecture.layers]
        on_cpu = network.device.type == "cpu"
        self._kernel = TableKernel(layers, network.packed_signs, threads) if on_cpu else None

    def warm_up(self) -> None:
        """Compiles the kernels, so that no query pays for it."""
        x = np.zeros((1, self.network.architecture.inputs), dtype=np.float32)
        list(self.iter_logits(x, self.network.packed_signs[None]))

    def iter_logits(self, x: np.ndarray, bank: np.ndarray) -> Iterator[Tensor]:
        """Logits (n, outputs) mask by mask of x, float32 (n, inputs); bank uint8 (k, mask_bytes)."""
        if self._kernel is not None and len(x) <= TABLE_ROWS:
            yield from torch.from_numpy(self._kernel.logits(x, bank))
            return
        samples = torch.from_numpy(x).to(self.network.device)
        for packed in bank:
            yield self.network.forward(samples, packed)

    @torch.no_grad()
    def score(self, x: np.ndarray, bank: np.ndarray, classes: int, labels: np.ndarray | None = None) -> MaskScores:
        """Scores x, float32 (n, inputs), under bank, uint8 (k, mask_bytes); labels are class indices (n,) or None."""
        shape = (len(bank), len(x))
        scores = MaskScores(
            {name: np.empty(shape, np.float32) for name in EVIDENCE},
            np.empty(shape, np.int64),
            np.empty(shape if labels is not None else (len(bank), 0), np.float32),
        )
        for index, logits in enumerate(self.iter_logits(x, bank)):
            for name, evidence in EVIDENCE.items():
                scores.evidence[name][index] = evidence(logits).cpu().numpy()
            scores.predicted[index] = logits[:, :classes].argmax(dim=-1).cpu().numpy()
            if labels is not None:
                probabilities = torch.softmax(logits, dim=-1).cpu().numpy()
                scores.label_probability[index] = probabilities[np.arange(len(x)), labels]
        return scores


def one_shot(network: Network, bank: np.ndarray, x: np.ndarray) -> np.ndarray:
    """-∂H/∂α_i at α_i = 1/k of the mean output entropy H, float64 (k,): the largest names the task (equation 4)."""
    samples = torch.from_numpy(x).to(network.device)
    alphas = torch.full((len(bank),), 1.0 / len(bank), device=network.device)
    weights = [torch.zeros_like(weight) for weight in network.weights]
    for alpha, packed in zip(alphas, bank, strict=True):
        for total, layer in zip(weights, network.masked_weights(packed), strict=True):
            total.add_(layer, alpha=float(alpha))
    superposed = [w.requires_grad_() for w in weights]
    gradients = torch.autograd.grad(entropy(network.run(samples, superposed)).mean(), superposed)
    # The superposed weight is Σ α_i (W ⊙ M_i), so ∂H/∂α_i is the gradient's inner product with W ⊙ M_i.
    slopes = np.empty(len(bank))
    for index, packed in enumerate(bank):
        masked = network.masked_weights(packed)
        slopes[index] = sum(float((gradient * m).sum()) for gradient, m in zip(gradients, masked, strict=True))
    return -slopes


def reference_one_shot(network: Network, bank: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The same gradient by differentiating the superposition in α itself, all masks dense: for tests."""
    alphas = torch.full((len(bank),), 1.0 / len(bank), requires_grad=True)
    stacks = [torch.stack(layer) for layer in zip(*map(network.masked_weights, bank), strict=True)]
    superposed = [torch.einsum("k,koi->oi", alphas, stack) for stack in stacks]
    objective = entropy(network.run(torch.from_numpy(x), superposed)).mean()
    return -torch.autograd.grad(objective, alphas)[0].double().numpy()
