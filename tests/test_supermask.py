"""Training a mask equals a slow NumPy reference on a 3-layer toy, step for step."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from supsupd.learning.learner import GROUPS, Learner, Samples
from supsupd.learning.network import Architecture, Network
from supsupd.sections import LearningSettings

ROWS, CLASSES = 12, 3


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


class Reference:
    """Scores of an mlp trained by hand: forward, backward, straight through to the scores, optimiser, average."""

    def __init__(self, network, scores, settings):
        self.weights = [w.numpy().astype(np.float64) for w in network.weights]
        self.scores = [s.numpy().astype(np.float64) for s in scores]
        self.average = [s.copy() for s in self.scores]
        self.first = [np.zeros_like(s) for s in self.scores]
        self.second = [np.zeros_like(s) for s in self.scores]
        self.settings, self.steps = settings, 0

    def mask(self, scores):
        if self.settings.rule == "threshold":
            return (scores >= 0).astype(np.float64)
        kept = np.argsort(-np.abs(scores), axis=None, kind="stable")[: round(self.settings.density * scores.size)]
        mask = np.zeros(scores.size)
        mask[kept] = 1.0
        return mask.reshape(scores.shape)

    def gradients(self, x, y):
        effective = [w * self.mask(s) for w, s in zip(self.weights, self.scores, strict=True)]
        inputs, values = [], x
        for weight in effective:
            inputs.append(values)
            values = np.maximum(values @ weight.T, 0.0) if weight is not effective[-1] else values @ weight.T
        smoothing, outputs = self.settings.label_smoothing, values.shape[1]
        target = (1 - smoothing) * np.eye(outputs)[y] + smoothing / outputs
        delta, found = (softmax(values) - target) / len(x), []
        for layer in reversed(range(len(effective))):
            slope = (delta.T @ inputs[layer]) * self.weights[layer]
            found.insert(0, slope * np.sign(self.scores[layer]) if self.settings.rule == "edge-popup" else slope)
            delta = (delta @ effective[layer]) * (inputs[layer] > 0)
        return found

    def step(self, x, y):
        self.steps += 1
        t, decay = self.steps, min(self.settings.averaging, (1 + self.steps) / (10 + self.steps))
        for i, g in enumerate(self.gradients(x, y)):
            if self.settings.optimiser == "rmsprop":
                self.second[i] = 0.99 * self.second[i] + 0.01 * g**2
                direction = g / (np.sqrt(self.second[i]) + 1e-8)
            else:
                self.first[i] = 0.9 * self.first[i] + 0.1 * g
                self.second[i] = 0.999 * self.second[i] + 0.001 * g**2
                direction = self.first[i] / (1 - 0.9**t) / (np.sqrt(self.second[i] / (1 - 0.999**t)) + 1e-8)
            self.scores[i] = self.scores[i] - self.settings.lr * direction
            self.average[i] = decay * self.average[i] + (1 - decay) * self.scores[i]


def in_double(network, state):
    """In float32 a gradient that is 0 up to rounding decides the direction of an RMSProp step."""
    network.weights = tuple(w.double() for w in network.weights)
    return replace(state, **{name: [t.double() for t in getattr(state, name)] for name in GROUPS})


@pytest.mark.parametrize("rule", ["threshold", "edge-popup"])
@pytest.mark.parametrize("optimiser", ["rmsprop", "adam"])
def test_training_equals_the_reference_step_for_step(rule, optimiser):
    network = Network(Architecture((9,), (8, 7), 6), seed=2)
    # A batch of its own size: every step sees all rows.
    settings = LearningSettings(rule=rule, optimiser=optimiser, steps=1, minibatch=ROWS, density=0.4, lr=0.003)
    learner = Learner(network, settings)
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((ROWS, 9)), np.arange(ROWS) % CLASSES
    state = in_double(network, learner.fresh("toy"))
    reference = Reference(network, state.scores, settings)
    for step in range(12):
        state = learner.train(state, Samples.of(x, y, torch.device("cpu")), seed=step)
        reference.step(x, y)
        for layer, scores in enumerate(state.scores):
            np.testing.assert_allclose(scores.numpy(), reference.scores[layer], atol=1e-9)
            np.testing.assert_allclose(state.average[layer].numpy(), reference.average[layer], atol=1e-9)
        wanted = [reference.mask(s).astype(bool) for s in reference.average]
        assert all(np.array_equal(m.numpy(), w) for m, w in zip(learner.mask(state), wanted, strict=True))


@pytest.mark.parametrize("rule", ["threshold", "edge-popup"])
@pytest.mark.parametrize("optimiser", ["rmsprop", "adam"])
def test_warming_up_changes_no_result(rule, optimiser):
    network = Network(Architecture((9,), (8, 7), 6), seed=2)
    learners = [Learner(network, LearningSettings(rule=rule, optimiser=optimiser, steps=3)) for _ in range(2)]
    learners[0].warm_up()
    samples = Samples.of(np.eye(9, dtype=np.float32), np.arange(9) % CLASSES, torch.device("cpu"))
    first, second = (one.train(one.fresh("toy"), samples, seed=1).to_bytes() for one in learners)
    assert first == second
