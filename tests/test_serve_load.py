"""What the benchmark of the socket asks, and what it makes of the answers."""

import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import serve
import serve_load
from mnist_tasks import Images, permuted

TASKS = 3


@pytest.fixture(scope="module")
def tests():
    """Tasks whose images are constant, each of its label: no order of the pixels hides it."""
    labels = np.arange(serve_load.TEST_IMAGES) % 10
    images = np.broadcast_to(labels[:, None, None], (len(labels), 28, 28)).astype(np.uint8)
    return permuted(Images(images, labels), np.random.default_rng(0), TASKS)


@pytest.mark.parametrize("rows", [1, 32])
def test_questions_go_round_the_tasks_and_know_their_first_label(tests, rows):
    questions = list(islice(serve_load.iter_questions(tests, rows), 200))
    assert [q.task for q in questions] == [i % TASKS + 1 for i in range(200)]
    assert all(q.x.shape == (rows, 784) and q.x[0, 0] == q.label for q in questions)


@pytest.mark.parametrize("given", [True, False])
def test_the_task_is_told_only_where_it_is_given(tests, given):
    told = []

    def ask(x, task):
        told.append(task)
        return int(x[0, 0]), task or 1

    times = serve.time_queries(serve_load.iter_questions(tests, 1), ask, given, 30, lambda: None)
    assert len(told) == serve.WARM_UP + times.queries == serve.WARM_UP + 30
    assert set(told) == ({1, 2, 3} if given else {None})
    assert times.right == (1.0 if given else 1 / TASKS)


def test_the_targets_are_judged_at_the_worst_count_of_tasks():
    def row(tasks, p50, rise):
        quiet, training = (serve.Times(p50, p99, 1.0, 1, 1.0) for p99 in (p50, p50 * rise))
        return serve.Row(tasks, serve.Case(1, True), quiet, training)

    found = serve.measures([row(1, 1.0, 1.5), row(100, 3.0, 1.25), row(2500, 1.0, 4.0)])
    assert [m["ours"] for m in found] == [3.0, 3.0, 4.0, 4.0]
    assert not any(m["reached"] for m in found)
