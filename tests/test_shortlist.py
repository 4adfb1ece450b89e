"""Among many tasks only some are asked: nothing that any task explains is called foreign for that."""

from dataclasses import replace

import numpy as np
import pytest
from digits import draw, held_out
from learning_stream import Stream, samples_of

from supsupd.learning.index import InputDensity, InputMoments
from supsupd.learning.labels import ClassList
from supsupd.learning.normalise import Normaliser
from supsupd.learning.predictor import Predictor
from supsupd.learning.queries import ServedTask, Shortlist
from supsupd.learning.records import pooled
from supsupd.learning.shortlist import heard, likely
from supsupd.sections import RecognitionSettings

TASKS = 10
CLASSES = ClassList(tuple(range(10)), 100)


class IndexedStream(Stream):
    """A stream whose tasks' inputs are kept, as the daemon keeps them."""

    def _take(self, change):
        if change.task is not None and change.assigned:
            moments = InputMoments.of(pooled(change.assigned).x.numpy())
            change = replace(change, task=replace(change.task, inputs=InputDensity.of(moments)))
        super()._take(change)


def relabelled(task, seed):
    """Tasks from 100 on have the inputs of task 0 and labels of their own."""
    batch = draw(0 if task >= 100 else task, seed, rows=64)
    if task >= 100:
        batch["y"] = (batch["y"] + task) % 10
    return batch


def learned(kind, tasks, **settings):
    stream = kind(recognition=RecognitionSettings(**settings))
    for task in tasks:
        for seed in range(6):
            stream.feed(**relabelled(task, seed))
    return stream


@pytest.fixture(scope="module")
def stream():
    return learned(IndexedStream, range(TASKS), batch_shortlist=4)


def test_with_few_asked_every_batch_goes_where_it_went_with_all_asked(stream):
    everybody = learned(Stream, range(TASKS), batch_shortlist=1000)
    assert stream.task_of == everybody.task_of
    assert len(stream.learner.tasks) == TASKS
    for task_id, task in everybody.learner.tasks.items():
        assert np.array_equal(stream.learner.tasks[task_id].packed, task.packed)


def test_a_task_is_asked_for_its_inputs_however_long_it_was_unused(stream):
    tasks = list(stream.learner.tasks.values())
    for task in range(TASKS):
        batch = samples_of(**draw(task, 77))
        asked = likely(tasks, batch, 4, stream.learner.workshop)
        assert len(asked) < TASKS
        assert task + 1 in {t.task_id for t in asked}


def test_those_used_last_are_asked_whatever_the_inputs(stream):
    tasks = list(stream.learner.tasks.values())
    asked = likely(tasks, samples_of(**draw(0, 77)), 8, stream.learner.workshop)
    assert [t.task_id for t in asked][-2:] == [t.task_id for t in tasks][-2:]


def test_both_tasks_of_a_batch_that_straddles_them_are_asked(stream):
    tasks = list(stream.learner.tasks.values())
    two = [draw(task, 78, rows=40) for task in (2, 5)]
    batch = samples_of(*(np.concatenate([one[name] for one in two]) for name in ("x", "y")))
    assert {3, 6} <= {t.task_id for t in likely(tasks, batch, 4, stream.learner.workshop)}
    assert {3, 6} <= heard(tasks, batch, 4, stream.learner.workshop, 10)


def test_a_task_that_only_its_labels_tell_apart_is_found_among_more_of_its_kind_than_are_asked():
    tasks = range(100, 100 + TASKS)
    stream = learned(IndexedStream, tasks, batch_shortlist=4)
    assert len(stream.learner.tasks) == TASKS
    for place, task in enumerate(tasks):
        assert stream.feed(**relabelled(task, 50)) == "known"
        assert stream.task_of[stream.count] == place + 1


def test_tasks_whose_inputs_are_not_known_are_always_asked(stream):
    tasks = [replace(task, inputs=None) for task in stream.learner.tasks.values()]
    assert likely(tasks, samples_of(**draw(0, 77)), 4, stream.learner.workshop) == tasks


def predictor_of(stream, shortlist):
    found = Predictor(
        stream.learner.workshop.scorer,
        Normaliser("sample", (64,)),
        CLASSES,
        "exact",
        "entropy",
        1e-3,
        shortlist=shortlist,
    )
    served = [ServedTask(t.task_id, t.version, t.mask, t.reference.evidence, frozenset(), t.inputs) for t in
              stream.learner.tasks.values()]  # fmt: skip
    return found.with_masks(served, CLASSES)


@pytest.mark.parametrize("per_sample", [True, False])
def test_a_query_scored_under_its_shortlist_is_answered_as_if_under_all(stream, per_sample):
    whole, short = predictor_of(stream, None), predictor_of(stream, Shortlist(above=4, queried=4))
    for task in range(TASKS):
        x = held_out(task)[0][:60]
        for rows in (x, x[:1], x[:9]):
            expected, found = (p.predict(rows, None, per_sample).task for p in (whole, short))
            assert (expected == found).mean() >= 0.95


def test_a_task_withdrawn_is_never_an_answer(stream):
    short = predictor_of(stream, Shortlist(above=2, queried=3))
    for task in range(TASKS):
        rest = short.without_task(task + 1)
        for per_sample in (True, False):
            assert task + 1 not in rest.predict(held_out(task)[0][:20], None, per_sample).task
