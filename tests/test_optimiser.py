"""A step of the fused kernels equals one by plain torch operations, whatever the layer looks like."""

import itertools

import pytest
import torch
from torch.nn import functional

from supsupd.learning.optimiser import Layer, Step, loss_slope, step_by_torch, take_step

SHAPES = [(1, 1), (3, 7), (30, 41), (64, 128)]
RECIPES = list(itertools.product(["rmsprop", "adam"], ["threshold", "edge-popup"]))
SMALLEST = 1e-45
"""The least float32 above 0, far below the normal numbers."""


def drawn(shape, dtype=torch.float32, seed=0):
    """A layer in the middle of its training, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(6)]
    weight, scores, average, first, second, gradient = values
    return Layer(weight.sign() * 0.05, scores * 0.03, average * 0.03, first, second.square()), gradient


def copied(layer):
    return Layer(*(tensor.clone() for tensor in layer))


def assert_same_step(layer, gradient, recipe, count=3):
    step = Step.of(*recipe, count, lr=1e-3, share=0.1)
    fast, slow = copied(layer), copied(layer)
    take_step(fast, gradient, step)
    step_by_torch(slow, gradient, step)
    for name, ours, reference in zip(Layer._fields, fast, slow, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    return fast


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fused_step_equals_one_by_torch(recipe, shape, dtype):
    layer, gradient = drawn(shape, dtype)
    for count in (1, 2, 50):
        layer = assert_same_step(layer, gradient, recipe, count)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("value", [0.0, 1.0, SMALLEST, 1e-39, 1e30])
def test_a_fused_step_equals_one_by_torch_on_constant_and_denormal_values(recipe, value):
    layer, _ = drawn((5, 13))
    constant = torch.full((5, 13), value)
    assert_same_step(layer, constant, recipe)
    assert_same_step(layer._replace(scores=constant), constant, recipe)
    assert_same_step(layer._replace(first=constant, second=constant), constant, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_repeats_bit_for_bit_and_leaves_the_weights_alone(recipe):
    layer, gradient = drawn((30, 41))
    first, second = assert_same_step(layer, gradient, recipe), assert_same_step(layer, gradient, recipe)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first.weight, layer.weight)
    assert not torch.equal(first.scores, layer.scores)


def test_a_gradient_of_any_layout_moves_the_right_scores():
    layer, gradient = drawn((30, 41))
    transposed = gradient.T.contiguous().T
    assert not transposed.is_contiguous()
    straight, turned = assert_same_step(layer, gradient, RECIPES[0]), assert_same_step(layer, transposed, RECIPES[0])
    assert torch.equal(straight.scores, turned.scores)


def test_scores_that_cannot_be_changed_in_place_are_refused():
    layer, gradient = drawn((30, 41))
    scattered = layer._replace(scores=layer.scores.T.contiguous().T)
    with pytest.raises(RuntimeError):
        take_step(scattered, gradient, Step.of("rmsprop", "threshold", 1, lr=1e-3))


def test_rmsprop_looks_at_no_first_moments():
    layer, gradient = drawn((3, 7))
    step = Step.of("rmsprop", "threshold", 1, lr=1e-3)
    without = layer._replace(first=torch.empty(0))
    take_step(without, gradient, step)
    step_by_torch(layer, gradient, step)
    torch.testing.assert_close(without.scores, layer.scores)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize(("rows", "outputs"), [(1, 2), (12, 6), (128, 500)])
def test_the_slope_of_the_loss_is_what_autograd_finds(smoothing, rows, outputs):
    generator = torch.Generator().manual_seed(rows)
    logits = (20 * torch.randn(rows, outputs, generator=generator)).requires_grad_()
    labels = torch.randint(outputs, (rows,), generator=generator)
    loss = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    (wanted,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss_slope(logits.detach(), labels, smoothing), wanted, rtol=1e-5, atol=1e-7)
