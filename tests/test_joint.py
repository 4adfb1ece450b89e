"""Queries that are answered together are answered as each would be alone."""

from dataclasses import replace

import numpy as np
import pytest
from digits import draw, held_out
from learning_stream import Stream
from test_predictor import CLASSES, served

from supsupd.learning import joint
from supsupd.learning.inference import MethodUnavailable, NoSuperfluousNeurons
from supsupd.learning.joint import answer_in_slices, answer_together
from supsupd.learning.labels import ClassList
from supsupd.learning.normalise import Normaliser, ShapeMismatch
from supsupd.learning.predictor import Predictor
from supsupd.learning.queries import Answer, Shortlist


@pytest.fixture(scope="module")
def predictor():
    stream = Stream()
    for task in (0, 1, 2):
        for seed in range(8):
            stream.feed(**draw(task, seed))
    scorer = stream.learner.workshop.scorer
    found = Predictor(scorer, Normaliser("sample", (64,)), CLASSES, "exact", "entropy", 1e-3)
    return found.with_masks([served(task) for task in stream.learner.tasks.values()], CLASSES)


def assert_alike(together, alone):
    for name in ("predicted", "task", "known"):
        assert np.array_equal(getattr(together, name), getattr(alone, name)), name
    for name in ("probabilities", "entropy", "surprise", "limit"):
        assert np.allclose(getattr(together, name), getattr(alone, name), atol=1e-4), name


def mixed_queries(predictor):
    """Rows of several types, sizes and ways to ask."""
    asked = []
    for turn, (rows, place, per_sample, method, objective) in enumerate(
        [
            (1, None, False, None, None),
            (1, None, True, None, "energy"),
            (5, None, True, None, None),
            (33, None, True, None, "energy"),
            (7, None, False, None, None),
            (4, 1, False, None, None),
            (1, 0, False, None, "max-logit"),
            (40, 0, True, None, None),
            (6, None, False, "one-shot", None),
            (6, None, True, "binary", None),
            (150, None, False, "exact", "g"),
        ]
    ):
        x = held_out(turn % 3)[0][:rows]
        x = np.round(x).astype(np.uint8) if turn % 2 else x
        asked.append((x, predictor.query(place, per_sample, method, objective)))
    return asked


def test_each_is_answered_as_if_it_came_alone(predictor):
    asked = mixed_queries(predictor)
    for (x, query), together in zip(asked, answer_together(predictor, asked), strict=True):
        assert_alike(together, predictor.predict(x, query.place, query.per_sample, query.method, query.objective))


def test_also_from_a_shortlist(predictor):
    short = replace(predictor, shortlist=Shortlist(above=2, queried=2))
    asked = [(held_out(task)[0][:rows], short.query(None, False)) for task in range(3) for rows in (1, 4, 1)]
    for (x, _), together in zip(asked, answer_together(short, asked), strict=True):
        assert_alike(together, short.predict(x, None, per_sample=False))


def test_what_cannot_be_answered_takes_nothing_from_the_others(predictor):
    good = (held_out(0)[0][:3], predictor.query(None, False))
    narrow = (np.ones((2, 5)), predictor.query(None, False))
    unheld = (held_out(0)[0][:3], predictor.query(None, False, "recover"))
    answers = answer_together(predictor, [narrow, good, unheld, good])
    assert [type(answer) for answer in answers] == [ShapeMismatch, Answer, MethodUnavailable, Answer]
    assert_alike(answers[1], predictor.predict(good[0], None, per_sample=False))


def test_a_query_that_makes_no_sense_is_refused_before_it_joins(predictor):
    full = replace(predictor, classes=ClassList(tuple(range(100)), 100))
    with pytest.raises(NoSuperfluousNeurons):
        full.query(None, False, objective="g")


def test_nothing_asked_is_nothing_answered(predictor):
    assert answer_together(predictor, []) == []


def test_light_is_what_is_small_in_memory_and_exact(predictor):
    one, many = (1, predictor.query(None, False)), (100_000, predictor.query(None, False))
    assert predictor.is_light([one])
    assert predictor.is_light([(1, predictor.query(0, False)), one])
    assert not predictor.is_light([one, many])
    assert not predictor.is_light([one, (1, predictor.query(None, False, "binary"))])
    assert not predictor.is_light([(1, predictor.query(None, False, objective="features"))])
    assert not replace(predictor, shortlist=Shortlist(above=2, queried=2)).is_light([one])


# -- in slices --------------------------------------------------------------------------------------------------------


def assert_alike_but_for_ties(sliced, whole):
    """Few rows and many go through other kernels, whose sums are rounded in another order."""
    first, second = np.sort(whole.probabilities, axis=1)[:, :-3:-1].T
    clear = first - second > 1e-3
    assert np.array_equal(sliced.predicted[clear], whole.predicted[clear])
    assert_alike(replace(sliced, predicted=whole.predicted), whole)


def in_slices(predictor, x, query):
    """(the answer, how many steps it took)"""
    *steps, answer = answer_in_slices(predictor, x, query)
    assert steps == [None] * len(steps)
    return answer, len(steps)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_a_query_in_slices_is_answered_as_in_one(predictor, rows, monkeypatch):
    monkeypatch.setattr(joint, "SLICE_ROWS", rows)
    for x, query in mixed_queries(predictor):
        (whole,) = answer_together(predictor, [(x, query)])
        sliced, steps = in_slices(predictor, x, query)
        assert_alike_but_for_ties(sliced, whole)
        assert steps == -(-len(x) // rows)


@pytest.mark.parametrize("rule", ["feature", "none"])
def test_every_normalisation_is_the_same_in_slices(predictor, rule, monkeypatch):
    monkeypatch.setattr(joint, "SLICE_ROWS", 7)
    x = held_out(1)[0][:150]
    other = replace(predictor, normaliser=Normaliser.fitted(rule, x))
    (whole,) = answer_together(other, [(x, other.query(None, False))])
    assert_alike(in_slices(other, x, other.query(None, False))[0], whole)


def test_slices_have_few_values(predictor, monkeypatch):
    monkeypatch.setattr(joint, "SLICE_VALUES", 64 * 10)
    assert in_slices(predictor, held_out(0)[0][:35], predictor.query(None, False))[1] == 4


def test_what_has_no_answer_has_none_in_slices(predictor):
    assert isinstance(in_slices(predictor, np.zeros((500, 63)), predictor.query(None, False))[0], ShapeMismatch)
    recover = predictor.query(None, False, "recover")
    assert isinstance(in_slices(predictor, np.zeros((500, 64)), recover)[0], MethodUnavailable)
