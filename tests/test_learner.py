"""Training a mask: repeatable, pure, bounded, and never to the worse."""

import numpy as np
import pytest
import torch
from digits import draw, held_out
from learning_stream import samples_of, small_network

from supsupd.learning.learner import Learner, TrainingState, derive_seed
from supsupd.learning.supermask import scores_from_mask, select
from supsupd.sections import LearningSettings


def learner(**settings):
    return Learner(small_network(), LearningSettings(**settings))


def batch(task=0, seed=0, rows=128):
    arrays = draw(task, seed, rows)
    return samples_of(arrays["x"], arrays["y"])


def accuracy(learner, packed, task=0):
    x, y = held_out(task)
    samples = samples_of(x, y)
    return float((learner.network.forward(samples.x, packed)[:, :10].argmax(1) == samples.y).float().mean())


def trained(learner, batches=8):
    state = learner.fresh("a")
    for seed in range(batches):
        state = learner.train(state, batch(seed=seed), seed)
    return state


@pytest.mark.parametrize("rule", ["threshold", "edge-popup"])
@pytest.mark.parametrize("optimiser", ["rmsprop", "adam"])
def test_a_mask_alone_makes_the_random_network_read_digits(rule, optimiser):
    one = learner(rule=rule, optimiser=optimiser)
    assert accuracy(one, one.packed(one.fresh("a"))) < 0.3
    assert accuracy(one, one.packed(trained(one))) > 0.85


def test_training_repeats_bit_for_bit():
    first, second = (one.packed(trained(one, 2)) for one in (learner(), learner()))
    assert np.array_equal(first, second)
    other = learner(seed=1)
    assert not np.array_equal(first, other.packed(trained(other, 2)))


def test_training_changes_nothing_but_its_result():
    one = learner()
    state = one.fresh("a")
    before = state.to_bytes()
    one.learn(state, batch(), seed=1, seen={})
    assert state.to_bytes() == before


def test_a_state_survives_being_stored():
    one = learner(optimiser="adam")
    state = trained(one, 2)
    again = TrainingState.from_bytes(state.to_bytes(), torch.device("cpu"))
    assert again.to_bytes() == state.to_bytes()
    assert np.array_equal(one.packed(one.train(state, batch(), 9)), one.packed(one.train(again, batch(), 9)))


@pytest.mark.parametrize(("first", "then"), [("rmsprop", "adam"), ("adam", "rmsprop")])
def test_training_goes_on_under_another_optimiser(first, then):
    state = trained(learner(optimiser=first), 4)
    one = learner(optimiser=then)
    for seed in range(4, 8):
        state = one.train(state, batch(seed=seed), seed)
    assert accuracy(one, one.packed(state)) > 0.85


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
def test_edge_popup_keeps_exactly_its_density(density):
    scores = torch.randn(30, 41, generator=torch.Generator().manual_seed(0))
    mask = select(scores, "edge-popup", density)
    assert int(mask.sum()) == round(density * scores.numel())
    assert scores[mask].abs().min() >= scores[~mask].abs().max()


@pytest.mark.parametrize("rule", ["threshold", "edge-popup"])
def test_bits_alone_are_enough_to_go_on_from(rule):
    one = learner(rule=rule)
    packed = one.packed(trained(one))
    state = one.from_mask(packed)
    assert np.array_equal(one.packed(state), packed)
    for seed in range(100, 103):
        state = one.train(state, batch(seed=seed), seed)
    assert accuracy(one, one.packed(state)) > 0.85


def test_a_mask_whose_scores_were_not_kept_is_not_undone_by_its_next_batches():
    one = learner()
    packed = one.packed(trained(one, 40))
    state, before = one.from_mask(packed), accuracy(one, packed)
    for seed in range(100, 105):
        state = one.train(state, batch(seed=seed), seed)
        assert accuracy(one, one.packed(state)) > before - 0.03


def test_scores_from_a_mask_select_that_mask():
    mask = torch.rand(20, 33, generator=torch.Generator().manual_seed(1)) < 0.5
    density = float(mask.float().mean())
    for rule in ("threshold", "edge-popup"):
        assert torch.equal(select(scores_from_mask(mask, 0.1, rule), rule, density), mask)


def test_an_update_that_makes_the_task_worse_is_not_taken():
    one = learner(steps=200, lr=0.05)
    state = trained(learner())
    poisoned = batch(seed=50)
    # Rows to train on get labels of another law than the rows that are held out.
    rows, _ = one.split_rows(len(poisoned), 7)
    poisoned.y[torch.from_numpy(rows)] = (poisoned.y[torch.from_numpy(rows)] + 1) % 10
    update = one.learn(state, poisoned, seed=7, seen={})
    assert update.loss_after > update.loss_before
    assert not update.taken


def test_a_good_update_is_taken_and_its_held_out_rows_were_not_trained_on():
    one = learner()
    update = one.learn(one.fresh("a"), batch(), seed=3, seen={})
    assert update.taken
    assert update.loss_after < update.loss_before
    assert len(update.held_out) == 16


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
def test_the_smallest_batches_can_be_learned(rows):
    one = learner()
    update = one.learn(one.fresh("a"), batch(rows=rows), seed=3, seen={})
    assert 0.0 < update.density < 1.0


def test_steps_are_bounded_and_follow_the_classes_that_a_batch_shows():
    one = learner(max_steps=30)
    state = one.fresh("a")
    assert one.train(state, batch(rows=128), 1).steps == 20
    assert one.train(state, batch(rows=12800), 1).steps == 30
    seen = dict.fromkeys(range(10), 100)
    narrow = samples_of(np.random.default_rng(0).random((32, 64)), np.full(32, 4))
    assert one.train(state, narrow, 1, seen).steps == 2


def test_a_batch_of_one_class_does_not_unlearn_the_others():
    one = learner()
    state = trained(one)
    before = accuracy(one, one.packed(state))
    arrays = draw(0, 77, 640)
    fours = arrays["y"] == 4
    only = samples_of(arrays["x"][fours], arrays["y"][fours])
    after = one.train(state, only, 5, dict.fromkeys(range(10), 100))
    assert accuracy(one, one.packed(after)) > before - 0.05


def test_offsets_vanish_for_a_batch_like_the_task_and_favour_what_it_shows_too_much():
    one = learner()
    labels = torch.arange(100) % 10
    assert one._offsets(labels, dict.fromkeys(range(10), 50)).abs().max() < 1e-6
    skewed = one._offsets(torch.full((20,), 3), dict.fromkeys(range(10), 50))
    assert skewed[3] > 0 > skewed[2]
    assert torch.all(skewed[10:] == 0)


def test_seeds_depend_on_every_part():
    assert derive_seed(1, "a") == derive_seed(1, "a")
    assert len({derive_seed(1, "a"), derive_seed(1, "b"), derive_seed(2, "a"), derive_seed("1a")}) == 4
