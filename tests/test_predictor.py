"""The served snapshot: routes queries to the right mask, and never changes under a reader."""

import numpy as np
import pytest
from digits import draw, held_out
from learning_stream import Stream

from supsupd.learning.labels import ClassList
from supsupd.learning.normalise import Normaliser, ShapeMismatch
from supsupd.learning.predictor import ROUTING_ROWS, Predictor, ServedTask

CLASSES = ClassList(tuple(range(10)), 100)


def served(task):
    return ServedTask(task.task_id, task.version, task.packed, task.reference.evidence["entropy"])


@pytest.fixture(scope="module")
def stream():
    stream = Stream()
    for task in (0, 1, 2):
        for seed in range(15):
            stream.feed(**draw(task, seed))
    return stream


def predictor_by(method, stream):
    found = Predictor(stream.learner.scorer, Normaliser("sample", (64,)), CLASSES, method, "entropy", 1e-3)
    for task in stream.learner.tasks.values():
        found = found.with_mask(served(task), CLASSES)
    return found


@pytest.fixture(scope="module", params=["exact", "one-shot"])
def predictor(stream, request):
    return predictor_by(request.param, stream)


def test_pooled_rows_are_routed_to_their_task(predictor):
    for task in (0, 1, 2):
        x, y = held_out(task)
        answer = predictor.predict(x[:32], place=None, per_sample=False)
        assert set(answer.task.tolist()) == {task + 1}
        assert (answer.predicted == y[:32]).mean() > 0.8


def test_rows_of_several_tasks_are_routed_one_by_one(stream):
    # Exact only: what One-Shot makes of a single row depends on the training recipe.
    predictor = predictor_by("exact", stream)
    x = np.concatenate([held_out(task)[0][:40] for task in (2, 0, 1)])
    answer = predictor.predict(x, place=None, per_sample=True)
    assert (answer.task == np.repeat([3, 1, 2], 40)).mean() > 0.9


def test_a_known_task_is_known_and_noise_is_not(predictor):
    for task in (0, 1, 2):
        assert predictor.predict(held_out(task)[0][:64], None, False).known.all()
    noise = np.random.default_rng(0).random((64, 64))
    assert not predictor.predict(noise, None, False).known.any()


def test_the_limit_of_a_long_query_is_that_of_the_rows_that_were_weighed(stream):
    predictor = predictor_by("exact", stream)
    x = held_out(0)[0]
    short = predictor.predict(x[:ROUTING_ROWS], None, False).limit
    assert predictor.predict(x, None, False).limit == pytest.approx(short)


def test_a_given_task_is_used_whatever_the_rows_are(predictor):
    place = predictor.place_of(2)
    answer = predictor.predict(held_out(0)[0][:8], place, False)
    assert set(answer.task.tolist()) == {2}
    assert predictor.place_of(99) is None


def test_probabilities_are_over_the_classes_and_name_the_prediction(predictor):
    answer = predictor.predict(held_out(0)[0][:8], None, False)
    assert answer.probabilities.shape == (8, 10)
    np.testing.assert_allclose(answer.probabilities.sum(axis=1), 1, atol=1e-5)
    assert np.array_equal(answer.probabilities.argmax(axis=1), answer.predicted)


def test_a_newer_mask_makes_a_new_snapshot_and_leaves_the_old_one(stream, predictor):
    x = held_out(0)[0][:8]
    before = predictor.predict(x, None, False).probabilities
    task = stream.learner.tasks[1]
    newer = predictor.with_mask(
        ServedTask(1, task.version + 1, ~task.packed, task.reference.evidence["entropy"]), CLASSES
    )
    assert [t.task_id for t in newer.tasks] == [1, 2, 3]
    assert np.array_equal(predictor.predict(x, None, False).probabilities, before)
    assert not np.array_equal(newer.predict(x, 0, False).probabilities, before)


def test_rows_of_another_width_are_refused(predictor):
    with pytest.raises(ShapeMismatch):
        predictor.predict(np.zeros((2, 65)), None, False)
