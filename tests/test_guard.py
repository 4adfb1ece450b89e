"""A late alarm: what each passed and together cannot be goes back, and the mask with it."""

import math

import numpy as np
import pytest
from digits import draw
from learning_stream import Stream
from scipy.stats import norm

from supsupd.learning.guard import WINDOW_BATCHES, Guard
from supsupd.learning.records import LabelledBatch, Member, TaskRecord
from supsupd.learning.reference import Reference
from supsupd.learning.statistics import gamma_quantile, gamma_score, log_normal_cdf, log_shift_wealth
from supsupd.sections import RecognitionSettings

FALSE_ALARM = 1e-3


def record(rng, law, rows=256, classes=4):
    """A task whose mask denied to the labels what `law` draws."""
    labels = rng.integers(0, classes, rows)
    reference = Reference().tested(labels, 0, law(rng, rows), rows)
    return TaskRecord(1, 1, np.zeros(1, np.uint8), 0.5, reference, 1, rows)


def watched(guard, rng, law, batches, rows=32):
    """Feeds the guard; the numbers of the batches at which it gave alarm. It starts anew after each."""
    alarms = []
    for number in range(batches):
        member = Member(LabelledBatch(number, "", None), 0, rows)
        guard = guard.with_batch(member, rng.integers(0, 4, rows), law(rng, rows))
        if guard.alarmed(FALSE_ALARM):
            alarms.append(number)
            guard = Guard(guard.snapshot)
        else:
            guard = guard.settled(guard.snapshot)
    return alarms


def own(rng, rows):
    return rng.beta(1.0, 4.0, rows)


def test_a_stream_that_does_not_change_gives_an_alarm_in_a_thousand_batches_or_less():
    alarms = 0
    for seed in range(60):  # the record itself is a draw: many records, not one long stream
        rng = np.random.default_rng(seed)
        alarms += len(watched(Guard(record(rng, own)), rng, own, 100))
    assert alarms <= 60 * 100 * FALSE_ALARM


def test_batches_that_each_pass_give_an_alarm_together():
    rng = np.random.default_rng(0)
    task = record(rng, own)

    def worse(rng, rows):
        return np.clip(own(rng, rows) + 0.06, 0, 1)

    singly = [
        worse(rng, 32).mean() > task.reference.denied_ceiling(rng.integers(0, 4, 32), FALSE_ALARM) for _ in range(50)
    ]
    assert np.mean(singly) < 0.2
    assert watched(Guard(task), rng, worse, WINDOW_BATCHES)[0] < 10


def test_the_snapshot_moves_on_where_nothing_is_suspected_and_stays_where_something_is():
    rng = np.random.default_rng(0)
    task = record(rng, own)
    member = Member(LabelledBatch(1, "", None), 0, 32)
    labels = rng.integers(0, 4, 32)
    mean, variance = task.reference.denied_law(labels)
    calm = Guard(task).with_batch(member, labels, np.full(32, mean))
    assert calm.settled(task).members == ()
    uneasy = Guard(task).with_batch(member, labels, np.full(32, mean + 2.5 * math.sqrt(variance)))
    assert not uneasy.alarmed(FALSE_ALARM)
    assert uneasy.settled(task).members == (member,)


def test_a_window_is_bounded():
    rng = np.random.default_rng(0)
    guard = Guard(record(rng, own))
    mean, _ = guard.snapshot.reference.denied_law(np.zeros(32, int))
    for number in range(3 * WINDOW_BATCHES):
        member = Member(LabelledBatch(number, "", None), 0, 32)
        guard = guard.with_batch(member, np.zeros(32, int), np.full(32, mean + 0.04)).settled(guard.snapshot)
        assert len(guard.members) < WINDOW_BATCHES


@pytest.mark.parametrize("variance", [1e-4, 1e-2, 0.1])
def test_the_wealth_of_a_bet_on_a_rise_has_expectation_one_while_nothing_rises(variance):
    step = 0.01  # the wealth is won where the score is far above what it should be: far out, to be summed exactly
    scores = np.arange(-10.0, 200.0, step)
    logs = np.array([log_shift_wealth(score, variance) for score in scores]) + norm.logpdf(scores)
    assert float(np.exp(logs).sum() * step) == pytest.approx(1.0, abs=1e-3)


def test_a_gamma_score_is_its_quantile_the_other_way_round():
    for error in (0.5, 0.1, 1e-3):
        assert gamma_score(gamma_quantile(0.3, 0.01, error), 0.3, 0.01) == pytest.approx(norm.isf(error))


def test_log_normal_cdf_is_right_far_below_zero():
    for z in (3.0, 0.0, -7.9, -8.1, -30.0):
        assert log_normal_cdf(z) == pytest.approx(norm.logcdf(z), rel=1e-3)


def blended(share, seed, relabelled=False, rows=64):
    """Digits of task 0 with a share of rows of another source in random order, and which rows those are."""
    count = round(share * rows)
    first, second = draw(0, seed, rows), draw(0 if relabelled else 1, seed + 1000, rows)
    if relabelled:
        second["y"] = np.random.default_rng(5).permutation(10)[second["y"]]
    order = np.random.default_rng(seed).permutation(rows)
    foreign = np.arange(rows) >= rows - count
    batch = {key: np.concatenate([first[key][count:], second[key][:count]])[order] for key in first}
    return batch, foreign[order]


def test_a_slow_mixture_sets_the_mask_back_bit_for_bit_and_ends_in_two_tasks():
    stream = Stream()
    for task in (0, 3):
        for seed in range(10):
            stream.feed(**draw(task, seed))
    other = stream.learner.tasks[2].packed.copy()
    masks = {stream.learner.tasks[1].version: stream.learner.tasks[1].packed.copy()}
    for turn in range(1, 41):
        stream.feed(**blended(turn / 40, 100 + turn)[0])
        masks[stream.learner.tasks[1].version] = stream.learner.tasks[1].packed.copy()
    alarms = [change for change in stream.changes if change.recalled]
    assert alarms
    for change in alarms:
        assert change.task.version in masks
        assert any(np.array_equal(change.task.packed, masks[v]) for v in masks if v < change.task.version)
        assert len(change.recalled) > 1
    assert len(stream.learner.tasks) == 3
    assert np.array_equal(stream.learner.tasks[2].packed, other)
    assert [stream.feed(**draw(task, 500)) for task in (0, 1)] == ["known"] * 2
    assert [stream.task_of[stream.count - 1], stream.task_of[stream.count]] == [1, 3]


def test_the_rows_of_a_known_task_are_left_out_of_a_new_one_that_was_mixed_into_it():
    stream = Stream()
    for seed in range(10):
        stream.feed(**draw(0, seed))
    foreign = {}
    for turn in range(1, 41):
        batch, foreign[stream.count + 1] = blended(turn / 40, 100 + turn, relabelled=True)
        stream.feed(**batch)
    (new,) = [change for change in stream.changes if change.kind == "new"][1:]
    assert new.evidence["separated_from"] == 1
    taken = np.concatenate([np.delete(foreign[m.batch.batch_id], m.left_out) for m in new.assigned])
    everything = np.concatenate([foreign[m.batch.batch_id] for m in new.assigned])
    assert taken.mean() > 2 * everything.mean()
    assert len(stream.learner.tasks) == 2


def test_two_known_tasks_share_out_a_batch_row_by_row():
    stream = Stream()
    for task in (0, 1):
        for seed in range(8):
            stream.feed(**draw(task, seed))
    batch, foreign = blended(0.4, 77)
    assert stream.feed(**batch) == "known"
    (member,) = stream.changes[-1].assigned
    assert stream.task_of[stream.count] == 1
    left_out = np.isin(np.arange(64), member.left_out)
    assert (left_out == foreign).mean() > 0.9


def test_more_new_tasks_than_the_cap_allows_have_to_wait():
    stream = Stream(recognition=RecognitionSettings(max_new_per_hour=3))
    kinds = [stream.feed(**draw(0, seed), found=3) for seed in range(3)]
    assert kinds == ["unsure"] * 3
    evidence = stream.changes[-1].evidence
    assert (evidence["found_last_hour"], evidence["max_new_per_hour"]) == (3, 3)
    assert stream.feed(**draw(0, 3), found=2) == "new"
    assert stream.task_of == {1: 1, 2: 1, 3: 1, 4: 1}


def test_what_has_proved_enough_and_is_still_unsure_tells_who_does_better():
    stream = Stream()
    for seed in range(10):
        stream.feed(**draw(0, seed))
    rng = np.random.default_rng(0)
    for seed in range(100, 116):
        batch = draw(0, seed)
        wrong = rng.random(64) < 0.5
        stream.feed(batch["x"], np.where(wrong, rng.integers(0, 10, 64), batch["y"]))
    told = [c.evidence for c in stream.changes if c.kind == "unsure" and "rivals" in c.evidence]
    assert told
    for evidence in told:
        assert evidence["rivals"][0]["log_wealth"] >= evidence["newer_log_wealth"]
