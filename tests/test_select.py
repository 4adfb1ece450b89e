"""Which weights a layer's scores keep: no sort decides it, yet it is what a stable sort would."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from supsupd.learning.supermask import effective_weights, select, select_by_torch

FLOATS = st.floats(width=32, allow_nan=False)
WAYS = pytest.mark.parametrize("way", [select, select_by_torch])


def sorted_select(scores, density):
    """By a stable sort: slow and obvious."""
    keep = max(1, round(density * scores.numel()))
    order = torch.sort(scores.abs().flatten(), descending=True, stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:keep]] = True
    return mask.view_as(scores)


def drawn(rows, columns, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * columns)
    return torch.randn(rows, columns, generator=generator, dtype=dtype) / 28


@WAYS
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (3, 7), (30, 41), (100, 301)])
@pytest.mark.parametrize("density", [0.001, 0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edge_popup_keeps_what_a_stable_sort_would(way, shape, density, dtype):
    scores = drawn(*shape, dtype)
    assert torch.equal(way(scores, "edge-popup", density), sorted_select(scores, density))


@WAYS
@settings(max_examples=200)
@given(st.lists(FLOATS, min_size=1, max_size=40), st.floats(0.01, 0.99))
def test_ties_zeros_denormals_and_infinities_are_in_order(way, values, density):
    scores = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(way(scores, "edge-popup", density), sorted_select(scores, density))


@WAYS
@pytest.mark.parametrize("values", [[0.0], [0.3, -0.3], [1e-45, -1e-45, 0.0, -0.0], [0.1, 0.2, -0.2, 0.2]])
def test_among_equal_scores_the_first_are_kept(way, values):
    scores = torch.tensor(values).repeat(300)
    for density in (0.01, 0.3, 0.5, 0.99):
        assert torch.equal(way(scores, "edge-popup", density), sorted_select(scores, density))


@pytest.mark.parametrize("rule", ["threshold", "edge-popup"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_effective_weights_are_the_weights_that_the_mask_keeps(rule, dtype):
    shapes, densities = [(30, 41), (7, 30), (1, 7)], [0.1, 0.5, 0.9]
    scores, weights = [drawn(*s, dtype) for s in shapes], [drawn(*s, dtype) + 1 for s in shapes]
    out = [torch.full_like(w, torch.nan) for w in weights]
    effective_weights(scores, weights, rule, densities, out)
    for layer, weight, density, found in zip(scores, weights, densities, out, strict=True):
        assert torch.equal(found, torch.where(select(layer, rule, density), weight, 0.0))


def test_scores_of_any_layout_keep_the_same_weights():
    scores = drawn(30, 41)
    for rule in ("threshold", "edge-popup"):
        turned = scores.T.contiguous().T
        assert torch.equal(select(turned, rule, 0.3), select(scores, rule, 0.3))


def test_the_score_zero_is_kept_by_the_threshold_with_either_sign():
    scores = torch.tensor([[0.0, -0.0, 1e-45, -1e-45]])
    out = [torch.empty_like(scores)]
    effective_weights([scores], [torch.ones_like(scores)], "threshold", [0.5], out)
    assert out[0].tolist() == [[1.0, 1.0, 1.0, 0.0]]
