"""The served snapshot: routes queries to the right mask, and never changes under a reader."""

from dataclasses import replace

import numpy as np
import pytest
from digits import draw, held_out
from learning_stream import Stream, samples_of

from supsupd.learning.bank import Mask
from supsupd.learning.features import FeatureModel
from supsupd.learning.inference import NoSuperfluousNeurons, ObjectiveUnavailable
from supsupd.learning.labels import ClassList
from supsupd.learning.normalise import Normaliser, ShapeMismatch
from supsupd.learning.predictor import ROUTING_ROWS, Predictor
from supsupd.learning.queries import ServedTask
from supsupd.learning.transforms import Transforms

CLASSES = ClassList(tuple(range(10)), 100)


def served(task):
    return ServedTask(task.task_id, task.version, task.mask, task.reference.evidence)


@pytest.fixture(scope="module")
def stream():
    stream = Stream()
    for task in (0, 1, 2):
        for seed in range(15):
            stream.feed(**draw(task, seed))
    return stream


def predictor_by(method, stream):
    found = Predictor(stream.learner.workshop.scorer, Normaliser("sample", (64,)), CLASSES, method, "entropy", 1e-3)
    for task in stream.learner.tasks.values():
        found = found.with_mask(served(task), CLASSES)
    return found


@pytest.fixture(scope="module", params=["exact", "one-shot", "binary"])
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


def test_the_more_rows_a_query_pools_the_less_they_may_surprise(stream):
    predictor = predictor_by("exact", stream)
    x = held_out(0)[0]
    assert len(x) > ROUTING_ROWS
    limits = [predictor.predict(x[:count], None, False).limit for count in (1, 8, ROUTING_ROWS, len(x))]
    assert limits == sorted(limits, reverse=True)


@pytest.mark.parametrize(
    ("method", "objective"),
    # What a gradient of energy or of the largest logit names is left open: on masks so young it is often wrong.
    [("exact", o) for o in ("entropy", "g", "energy", "max-logit")]
    + [(m, o) for m in ("one-shot", "binary") for o in ("entropy", "g")],
)
def test_a_query_may_choose_its_method_and_objective(stream, method, objective):
    predictor = predictor_by("exact", stream)
    found = [int(predictor.predict(held_out(t)[0][:64], None, False, method, objective).task[0]) for t in (0, 1, 2)]
    assert found == [1, 2, 3]


def test_successive_halving_answers_as_if_all_masks_had_seen_all_rows(stream):
    predictor = predictor_by("exact", stream)
    for task in (0, 1, 2):
        rows = predictor.normaliser(held_out(task)[0][:64])
        scores = predictor.scorer.score(rows, predictor.masks, 10).evidence["entropy"]
        means = [t.evidence["entropy"].surprise(s).mean() for t, s in zip(predictor.tasks, scores, strict=True)]
        assert predictor.predict(held_out(task)[0][:64], None, False).task[0] == 1 + int(np.argmin(means))


def test_objective_g_without_superfluous_neurons_is_refused(stream):
    predictor = predictor_by("exact", stream)
    full = replace(predictor, classes=ClassList(tuple(range(100)), 100))
    with pytest.raises(NoSuperfluousNeurons):
        full.predict(held_out(0)[0][:4], None, False, objective="g")


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
    newer = predictor.with_mask(ServedTask(1, task.version + 1, Mask(~task.packed), task.reference.evidence), CLASSES)
    assert [t.task_id for t in newer.tasks] == [1, 2, 3]
    assert np.array_equal(predictor.predict(x, None, False).probabilities, before)
    assert not np.array_equal(newer.predict(x, 0, False).probabilities, before)


def test_a_snapshot_without_a_task_serves_the_others_and_leaves_the_old_one(predictor):
    x = held_out(0)[0][:8]
    kept = predictor.predict(x, predictor.place_of(3), False).probabilities
    without = predictor.without_task(2)
    assert [t.task_id for t in without.tasks] == [1, 3]
    assert without.place_of(2) is None
    assert np.array_equal(without.predict(x, without.place_of(3), False).probabilities, kept)
    assert [t.task_id for t in predictor.tasks] == [1, 2, 3]


def test_a_merged_task_is_answered_for_at_any_remove(predictor):
    chained = predictor.without_task(2, into=3).without_task(3, into=1)
    assert [chained.place_of(task) for task in (1, 2, 3)] == [0, 0, 0]
    assert predictor.place_of(2) == 1


def test_rows_of_another_width_are_refused(predictor):
    with pytest.raises(ShapeMismatch):
        predictor.predict(np.zeros((2, 65)), None, False)


def test_objective_features_names_the_task_of_single_rows(stream):
    model = FeatureModel(stream.learner.network, Transforms())
    for task in (0, 1, 2):
        for seed in range(15):
            samples = samples_of(**draw(task, seed))
            model = model.learned(task + 1, samples.x, samples.y)
    predictor = replace(predictor_by("exact", stream), features=model)
    x = np.concatenate([held_out(task)[0][:40] for task in (2, 0, 1)])
    answer = predictor.predict(x, None, True, objective="features")
    assert (answer.task == np.repeat([3, 1, 2], 40)).mean() > 0.9
    pooled = predictor.predict(held_out(1)[0][:32], None, False, objective="features")
    assert set(pooled.task.tolist()) == {2}
    assert pooled.known.all()


@pytest.mark.parametrize("method", ["exact", "one-shot", "binary"])
def test_objective_features_is_refused_where_features_are_not_kept_or_there_is_no_slope(stream, method):
    with pytest.raises(ObjectiveUnavailable, match="objective features"):
        predictor_by("exact", stream).predict(held_out(0)[0][:4], None, False, method, "features")
