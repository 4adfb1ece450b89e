"""Where a new task's scores start, the budget of its bits, and what it learns to be foreign."""

import math

import numpy as np
import pytest
import torch
from digits import draw
from learning_stream import Stream, samples_of, small_network

from supsupd.learning.bank import Mask
from supsupd.learning.foreign import foreign_copies
from supsupd.learning.learner import Learner
from supsupd.learning.network import Architecture, Network
from supsupd.learning.supermask import erdos_renyi_densities
from supsupd.learning.transfer import Earlier, start_scores
from supsupd.sections import LearningSettings


def learner(**settings):
    return Learner(small_network(), LearningSettings(**settings))


def batch(task=0, seed=0):
    arrays = draw(task, seed, 128)
    return samples_of(arrays["x"], arrays["y"])


def earlier(one, task, batches=6):
    state = one.fresh(task)
    for seed in range(batches):
        state = one.train(state, batch(task, seed), seed)
    return Earlier(Mask(one.packed(state)), state)


@pytest.mark.parametrize("transfer", ["none", "mean", "best", "auto"])
def test_the_first_task_starts_at_random(transfer):
    one = learner(transfer=transfer)
    assert start_scores(one, batch(), [], "k", 1).to_bytes() == one.fresh("k").to_bytes()


def test_the_mean_of_earlier_scores_has_the_norm_of_random_ones():
    one = learner(transfer="mean")
    known = [earlier(one, task) for task in (0, 1)]
    start = start_scores(one, batch(2), known, "k", 1)
    for layer, scores in enumerate(start.scores):
        mean = (known[0].state.average[layer] + known[1].state.average[layer]) / 2
        random = one.fresh("k").scores[layer]
        torch.testing.assert_close(scores, mean * (random.norm() / mean.norm()))


def test_a_task_known_by_its_bits_alone_is_in_the_mean_too():
    one = learner(transfer="mean")
    known = earlier(one, 0)
    start = start_scores(one, batch(), [Earlier(known.mask, None)], "k", 1)
    assert np.array_equal(one.packed(start), known.mask.packed)


def test_the_best_earlier_mask_is_the_one_that_knows_the_batch():
    one = learner(transfer="best")
    known = [earlier(one, task) for task in (0, 1, 2)]
    start = start_scores(one, batch(1, 99), known, "k", 1)
    assert np.array_equal(one.packed(start), known[1].mask.packed)


def test_auto_takes_what_the_held_out_rows_prefer():
    one = learner(transfer="auto")
    known = [earlier(one, task) for task in (0, 1)]
    for task in (1, 5):
        rows = batch(task, 99)
        training, held_out = one.split(rows, 1)
        starts = [start_scores(learner(transfer=t), rows, known, "k", 1) for t in ("none", "mean", "best")]
        losses = [float(one.losses(one.train(start, training, 1), held_out).mean()) for start in starts]
        found = start_scores(one, rows, known, "k", 1)
        assert found.to_bytes() == starts[int(np.argmin(losses))].to_bytes()


@pytest.mark.parametrize("transfer", ["none", "mean", "best", "auto"])
def test_a_stream_of_tasks_is_told_apart_wherever_new_scores_start(transfer):
    stream = Stream(learning=LearningSettings(transfer=transfer))
    for task in (0, 1, 2):
        for seed in range(8):
            stream.feed(**draw(task, seed, 64))
    assert len(stream.learner.tasks) == 3
    assert [len({stream.task_of[b] for b in range(first, first + 8)}) for first in (1, 9, 17)] == [1, 1, 1]


@pytest.mark.parametrize("density", [0.02, 0.1, 0.3, 0.49])
def test_the_erdos_renyi_budget_keeps_the_density_over_all_layers(density):
    shapes = [(64, 3, 3, 3), (64, 64, 3, 3), (256, 1024), (10, 256)]
    densities = erdos_renyi_densities(shapes, density)
    sizes = [math.prod(s) for s in shapes]
    assert sum(d * n for d, n in zip(densities, sizes, strict=True)) / sum(sizes) == pytest.approx(density, rel=1e-6)
    assert max(densities) <= 0.5
    ratios = [d / ((s[0] + s[1]) / n) for d, s, n in zip(densities, shapes, sizes, strict=True) if d < 0.4999]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-6)


def test_edge_popup_keeps_each_layer_at_its_budget():
    network = Network(Architecture.of_kind("conv2", (16, 16, 3), 10, width=0.1, hidden=(20,)), 0)
    one = Learner(network, LearningSettings(rule="edge-popup", density=0.2, density_budget="erdos-renyi"))
    wanted = erdos_renyi_densities([s.shape for s in network.architecture.layers], 0.2)
    for mask, density in zip(one.mask(one.fresh("a")), wanted, strict=True):
        assert int(mask.sum()) == max(1, round(density * mask.numel()))


def order():
    return np.random.Generator(np.random.Philox(1))


def test_rotated_copies_go_to_an_output_of_their_class_and_turn():
    x, y = torch.randn(300, 6 * 6 * 3), torch.arange(300) % 3
    copies, outputs = foreign_copies("rotated", x, y, ((6, 6, 3), 40), order())
    images, turned = x.view(300, 6, 6, 3), copies.view(300, 6, 6, 3)
    for turn in (1, 2, 3):
        mine = outputs == 39 - (3 * y + turn - 1)
        assert mine.sum() > 60
        assert torch.equal(turned[mine], torch.rot90(images[mine], turn, dims=(1, 2)))
    assert int(outputs.min()) == 40 - 9


def test_oblong_images_are_turned_upside_down():
    x = torch.randn(4, 6 * 5)
    copies, _ = foreign_copies("rotated", x, torch.zeros(4, dtype=torch.int64), ((6, 5), 20), order())
    assert torch.equal(copies.view(4, 6, 5), x.view(4, 6, 5).flip(1, 2))


def test_shuffled_copies_have_the_same_values_and_the_last_output():
    x, y = torch.randn(20, 50), torch.arange(20) % 3
    copies, outputs = foreign_copies("shuffled", x, y, ((50,), 10), order())
    assert torch.equal(copies.sort(dim=1).values, x.sort(dim=1).values)
    assert not torch.equal(copies, x)
    assert set(outputs.tolist()) == {9}


@pytest.mark.parametrize("outputs", [4, 5, 11])
def test_a_foreign_output_is_never_one_of_the_classes_in_the_batch(outputs):
    x, y = torch.randn(64, 16), torch.arange(64) % 3
    _, found = foreign_copies("rotated", x, y, ((4, 4), outputs), order())
    assert int(found.min()) > 2
    assert int(found.max()) < outputs


def test_a_mask_trained_on_the_foreign_gives_it_to_the_superfluous_outputs():
    one = learner(foreign="shuffled")
    state = one.fresh("a")
    for seed in range(10):
        state = one.train(state, batch(0, seed), seed)
    rows = batch(0, 99).x
    mixed = foreign_copies("shuffled", rows, torch.zeros(len(rows), dtype=torch.int64), ((64,), 100), order())[0]
    own, foreign = (one.network.forward(x, one.packed(state)).softmax(1)[:, :10].sum(1) for x in (rows, mixed))
    assert float(own.mean()) > 0.7 > 0.4 > float(foreign.mean())
