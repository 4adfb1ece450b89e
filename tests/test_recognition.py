"""Recognition on real digits: tasks are found, found again, and not invented."""

import numpy as np
import pytest
from digits import draw, held_out
from learning_stream import Stream, samples_of, small_network

from supsupd.learning.reference import Gauge, Reference
from supsupd.sections import LearningSettings, RecognitionSettings


def feed(stream, task, seeds, rows=64):
    """Batches of one task; the kinds of their decisions."""
    return [stream.feed(**draw(task, seed, rows)) for seed in seeds]


def test_a_new_task_is_found_at_its_second_batch_and_takes_the_first_with_it():
    stream = Stream()
    assert feed(stream, 0, range(3)) == ["unsure", "new", "known"]
    assert stream.task_of == {1: 1, 2: 1, 3: 1}


def test_tasks_that_return_are_known_at_once():
    stream = Stream()
    for task in (0, 1, 2):
        feed(stream, task, range(4))
    assert len(stream.learner.tasks) == 3
    for task in (1, 0, 2, 1):
        assert feed(stream, task, [50 + task]) == ["known"]
    assert [stream.task_of[b] for b in (13, 14, 15, 16)] == [2, 1, 3, 2]


def test_tasks_as_short_as_four_small_batches_are_found():
    stream = Stream()
    for task in (0, 1, 2):
        feed(stream, task, range(4), rows=32)
    assert len(stream.learner.tasks) == 3


def test_batches_of_16_rows_find_their_tasks_and_no_others():
    stream = Stream()
    for visit in range(2):
        for task in (0, 1):
            feed(stream, task, range(20 * visit, 20 * visit + 20), rows=16)
    owners = [stream.task_of.get(b) for b in range(1, 81)]
    truth = [1] * 20 + [2] * 20 + [1] * 20 + [2] * 20
    assert len(stream.learner.tasks) == 2
    assert sum(o == t for o, t in zip(owners, truth, strict=True)) >= 79


def test_noise_with_random_labels_never_becomes_a_task():
    rng = np.random.default_rng(0)
    stream = Stream(recognition=RecognitionSettings(patience_batches=20))
    feed(stream, 0, range(3))
    for _ in range(45):
        stream.feed(rng.random((64, 64)), rng.integers(0, 10, 64))
    assert len(stream.learner.tasks) == 1
    assert len(stream.learner.provisionals) <= 2
    assert stream.given_up  # patience is bounded
    assert feed(stream, 0, [60]) == ["known"]


def test_noise_of_one_label_never_becomes_a_task():
    rng = np.random.default_rng(0)
    stream = Stream()
    for _ in range(12):
        stream.feed(rng.random((64, 64)), np.full(64, 3))
    assert not stream.learner.tasks


def test_the_odd_batches_of_a_task_do_not_become_a_second_mask_for_it():
    rng = np.random.default_rng(0)
    stream = Stream()
    feed(stream, 0, range(10))
    odd = []
    for seed in range(100, 108):
        batch = draw(0, seed)
        wrong = rng.random(64) < 0.5
        odd.append(stream.feed(batch["x"], np.where(wrong, rng.integers(0, 10, 64), batch["y"])))
        feed(stream, 0, [1000 + seed])
    assert odd.count("unsure") >= 3  # enough to prove a task, were there no better one
    assert len(stream.learner.tasks) == 1


def test_an_outlier_of_a_known_task_that_waits_does_not_go_with_a_new_task():
    stream = Stream()
    for seed in range(10):
        stream.feed(**draw(0, seed))
    odd = draw(0, 50)
    wrong = np.arange(0, len(odd["y"]), 4)
    odd["y"][wrong] = (odd["y"][wrong] + 1) % 10
    assert stream.feed(**odd) == "unsure"
    outlier = stream.count
    for seed in range(100, 106):  # the same inputs under other labels: they join it
        batch = draw(0, seed)
        stream.feed(batch["x"], 9 - batch["y"])
    new = stream.changes[[change.kind for change in stream.changes].index("new", 5)]
    assert new.evidence["outliers"] == [outlier]
    assert outlier not in stream.task_of
    assert {stream.task_of[number] for number in range(outlier + 1, stream.count + 1)} == {2}


def test_known_inputs_with_random_labels_are_not_learned():
    stream = Stream()
    feed(stream, 0, range(4))
    mask = stream.learner.tasks[1].packed.copy()
    rng = np.random.default_rng(0)
    for seed in range(20, 26):
        stream.feed(draw(0, seed)["x"], rng.integers(0, 10, 64))
    assert len(stream.learner.tasks) == 1
    assert np.array_equal(stream.learner.tasks[1].packed, mask)


def test_the_same_inputs_under_permuted_labels_are_another_task():
    stream = Stream()
    swapped = np.random.default_rng(5).permutation(10)
    feed(stream, 0, range(4))
    kinds = [stream.feed(batch["x"], swapped[batch["y"]]) for batch in (draw(0, seed) for seed in range(10, 14))]
    assert kinds[-1] == "known"
    assert [stream.task_of[b] for b in range(1, 9)] == [1] * 4 + [2] * 4
    assert feed(stream, 0, [30]) == ["known"]
    assert stream.task_of[9] == 1


def test_inverted_inputs_are_one_task_more_and_badly_scaled_ones_are_none():
    stream = Stream()
    feed(stream, 0, range(4))
    for seed in range(10, 14):
        batch = draw(0, seed)
        stream.feed(1.0 - batch["x"], batch["y"])
    assert len(stream.learner.tasks) == 2
    for seed, (scale, offset) in enumerate([(1000.0, 0.0), (1e-3, 5.0), (255.0, -40.0)], start=20):
        batch = draw(0, seed)
        assert stream.feed(scale * batch["x"] + offset, batch["y"]) == "known"
        assert stream.task_of[stream.count] == 1


def test_a_batch_that_straddles_two_known_tasks_trains_only_on_the_rows_of_the_longer_part():
    stream = Stream()
    for task in (0, 1):
        feed(stream, task, range(6))
    left, right = draw(0, 40, 40), draw(1, 40, 88)
    before = stream.learner.tasks[2].samples
    stream.feed(np.concatenate([left["x"], right["x"]]), np.concatenate([left["y"], right["y"]]))
    assert stream.task_of[13] == 2
    assert 80 <= stream.learner.tasks[2].samples - before <= 96


def test_a_first_batch_that_straddles_two_new_tasks_is_decided_and_spoils_neither():
    stream = Stream()
    left, right = draw(0, 40, 40), draw(1, 40, 88)
    stream.feed(np.concatenate([left["x"], right["x"]]), np.concatenate([left["y"], right["y"]]))
    feed(stream, 0, range(5))
    feed(stream, 1, range(5))
    assert len(stream.learner.tasks) == 2
    assert stream.task_of[1] in (1, 2)
    assert min(stream.accuracy(task + 1, *held_out(task)) for task in (0, 1)) > 0.85


def test_batches_of_one_class_go_to_their_task():
    stream = Stream()
    for task in (0, 1):
        feed(stream, task, range(8))
    for turn, task in enumerate((1, 0, 1)):
        batch = draw(task, 70 + turn, 200)
        only = batch["y"] == turn
        assert stream.feed(batch["x"][only], batch["y"][only]) == "known"
        assert stream.task_of[stream.count] == task + 1
        assert feed(stream, task, [80 + turn]) == ["known"]
    assert len(stream.learner.tasks) == 2


def test_learning_a_task_leaves_every_other_mask_bit_for_bit():
    stream = Stream()
    feed(stream, 0, range(6))
    mask, score = stream.learner.tasks[1].packed.copy(), stream.accuracy(1, *held_out(0))
    feed(stream, 1, range(6))
    assert np.array_equal(stream.learner.tasks[1].packed, mask)
    assert stream.accuracy(1, *held_out(0)) == score
    assert stream.accuracy(2, *held_out(1)) > 0.85


def test_a_step_is_pure_until_it_is_applied():
    stream = Stream()
    feed(stream, 0, range(3))
    from supsupd.learning.records import LabelledBatch

    batch = draw(0, 9)
    labelled = LabelledBatch(99, "f" * 64, samples_of(batch["x"], batch["y"]))
    first, second = (stream.learner.consider(labelled, 10) for _ in range(2))
    assert np.array_equal(first.task.packed, second.task.packed)
    assert stream.learner.tasks[1].batches == 3


def test_provisional_tasks_are_the_same_when_rebuilt_from_their_batches():
    stream = Stream(recognition=RecognitionSettings(promote_error=1e-200))
    feed(stream, 0, range(3))
    live = stream.learner.provisionals[1]
    again = stream.learner.rebuild(1, live.members, 10)
    assert np.array_equal(again.mask.packed, live.mask.packed)
    assert np.array_equal(again.wins, live.wins)
    assert again.reference == live.reference


def test_no_more_than_the_set_number_of_provisional_tasks_is_kept():
    rng = np.random.default_rng(1)
    stream = Stream(recognition=RecognitionSettings(max_provisional=3))
    for _ in range(9):  # nine sources, one batch each
        stream.feed(rng.random((32, 64)) ** 8 * rng.permutation(64) ** 2, rng.integers(0, 10, 32))
    assert len(stream.learner.provisionals) <= 3
    assert len(stream.given_up) == 9 - sum(len(p.members) for p in stream.learner.provisionals.values())


def test_nobody_pushes_out_what_others_have_sent():
    rng = np.random.default_rng(1)
    stream = Stream()
    assert stream.feed(**draw(0, 1), origin="camera") == "unsure"
    for _ in range(20):
        junk = rng.random((32, 64)) ** 8 * rng.permutation(64) ** 2
        stream.feed(junk, rng.integers(0, 10, 32), origin="socket junk")
    assert len(stream.learner.provisionals) == RecognitionSettings().max_provisional
    assert 1 not in stream.given_up
    assert stream.feed(**draw(0, 2), origin="camera") == "new"
    assert stream.task_of == {1: 1, 22: 1}


def small_junk(rng, seed):
    """A few rows that look like task 0's, with labels that mean nothing."""
    return draw(0, seed, rows=8)["x"], rng.integers(0, 10, 8)


def test_who_joins_anothers_provisional_task_cannot_have_it_given_up():
    rng = np.random.default_rng(1)
    stream = Stream()
    assert stream.feed(**draw(0, 1), origin="camera") == "unsure"
    for seed in (50, 51):
        stream.feed(*small_junk(rng, seed), origin="socket junk")
    for _ in range(20):
        junk = rng.random((32, 64)) ** 8 * rng.permutation(64) ** 2
        stream.feed(junk, rng.integers(0, 10, 32), origin="socket junk")
    assert 1 in [m.batch.batch_id for p in stream.learner.provisionals.values() for m in p.members]


def test_patience_with_what_others_sent_costs_nobody_else_a_batch():
    rng = np.random.default_rng(1)
    stream = Stream(recognition=RecognitionSettings(patience_batches=20))
    assert stream.feed(**draw(0, 1), origin="camera") == "unsure"
    for seed in range(50, 75):
        stream.feed(*small_junk(rng, seed), origin="socket junk")
    assert stream.given_up
    assert 1 not in stream.given_up
    held = [m.batch.batch_id for p in stream.learner.provisionals.values() for m in p.members]
    assert 1 in held + stream.released


def test_what_is_provisional_is_bounded_in_bytes_and_its_rows_with_it():
    rng = np.random.default_rng(1)
    state = 12 * small_network().architecture.weights
    learning = LearningSettings(memory_bytes=4 * state)
    stream = Stream(learning=learning, recognition=RecognitionSettings(max_provisional=1000, patience_batches=1000))
    for turn in range(60):  # some alike, and some of their own
        source = 1.0 if turn % 2 else rng.permutation(64) ** 2
        stream.feed(rng.random((128, 64)) ** 8 * source, rng.integers(0, 10, 128))
        held = sum(p.nbytes for p in stream.learner.provisionals.values())
        assert held <= learning.memory_bytes + state
    assert stream.given_up


def test_training_states_are_bounded_in_bytes_too():
    state = 12 * small_network().architecture.weights
    stream = Stream(learning=LearningSettings(memory_bytes=2 * state + 1))
    for task in (0, 1, 2):
        feed(stream, task, range(4))
    assert [t.state is None for t in stream.learner.tasks.values()] == [True, False, False]


def test_a_batch_that_joins_a_provisional_task_costs_the_others_nothing():
    rng = np.random.default_rng(1)
    stream = Stream()
    sources = [rng.permutation(64) ** 2.0 for _ in range(5)]
    for source in (*sources, *sources):
        stream.feed(rng.random((32, 64)) ** 8 * source, rng.integers(0, 10, 32))
    members = [len(p.members) for p in stream.learner.provisionals.values()]
    assert (len(members), sum(members)) == (5, 10)
    assert not stream.given_up


def test_scores_are_kept_for_the_recent_tasks_only_and_the_others_go_on_from_their_bits():
    stream = Stream(learning=LearningSettings(active_tasks=1))
    for task in (0, 1):
        feed(stream, task, range(4))
    assert [t.state is None for t in stream.learner.tasks.values()] == [True, False]
    assert feed(stream, 0, [30, 31, 32]) == ["known"] * 3
    assert stream.accuracy(1, *held_out(0)) > 0.85


@pytest.mark.parametrize("memory", [10, 1000])
def test_a_gauge_is_the_mean_and_variance_of_the_rows_it_remembers(memory):
    values = np.random.default_rng(0).standard_normal(300)
    gauge = Gauge()
    for part in np.split(values, 10):
        gauge = gauge.updated(part, memory)
    expected = values if memory == 1000 else values[-30:]
    assert gauge.mean == pytest.approx(expected.mean(), abs=1e-9)
    assert gauge.variance == pytest.approx(expected.var(), abs=1e-9)


def test_a_reference_survives_json():
    labels = np.array([0, 1, 1, 2])
    reference = Reference().tested(labels, 1, np.array([0.1, 0.2, 0.9, 0.3]), 256).seen(labels)
    reference = reference.gauged({"entropy": np.array([0.5, 0.7])}, 256)
    assert Reference.from_json(reference.to_json()) == reference
    assert reference.accuracy == 0.75


def test_a_reference_forgives_a_hard_class_and_nothing_else():
    labels = np.tile([0, 1], 100)
    denied = np.where(labels == 0, 0.1, 0.6) + np.random.default_rng(0).uniform(-0.05, 0.05, 200)
    reference = Reference().tested(labels, 60, denied, 256)
    assert reference.denied_ceiling(np.ones(20, int), 1e-3) > 0.6
    assert reference.denied_ceiling(np.zeros(20, int), 1e-3) < 0.4
