"""The queue before the engine: what is answered together, what is refused, and that nobody waits for ever."""

import asyncio
import threading
from collections import Counter

import numpy as np
import pytest
from tiny_engine import INPUTS, TinyEngine

from supsupd.sections import ServingSettings
from supsupd.serving.batching import Batcher
from supsupd.serving.engine import BadInput, DeadlineExceeded, Prediction, Question, TooManyQueries


class Counting(TinyEngine):
    """Notes how many questions, and rows, came to it at a time."""

    def __init__(self, light=False):
        super().__init__()
        self.light = light
        self.passes = []

    def is_light(self, questions):
        return self.light

    def predict(self, questions):
        self.passes.append([len(question.x) for question in questions])
        return super().predict(questions)


def question(rows=1, seed=0, **asked):
    return Question(np.random.default_rng(seed).normal(size=(rows, INPUTS)).astype(np.float32), **asked)


def in_a_loop(engine, talk, **limits):
    """What `talk(batcher)` returns, in a loop of its own; no question is left behind."""

    async def run():
        batcher = Batcher(engine, lambda: ServingSettings(**limits))
        try:
            found = await talk(batcher)
            assert batcher.queued == 0
            return found, batcher.passes
        finally:
            engine.gate.set()
            batcher.close()

    return asyncio.run(run())


async def entered(engine):
    """Until a pass is under way in a thread."""
    assert await asyncio.to_thread(engine.entered.wait, 10)


@pytest.mark.parametrize("light", [True, False])
@pytest.mark.parametrize("limits", [{}, {"batch_window_ms": 5.0}, {"batch_rows": 1}, {"parallel": 1}])
def test_every_question_gets_its_own_answer(light, limits):
    engine = Counting(light)
    questions = [question(rows=1 + seed % 5, seed=seed, per_sample=bool(seed % 2)) for seed in range(40)]

    async def talk(batcher):
        return await asyncio.gather(*(batcher.ask(asked) for asked in questions))

    answers, passes = in_a_loop(engine, talk, **limits)
    for asked, answer in zip(questions, answers, strict=True):
        (alone,) = TinyEngine().predict([asked])
        assert np.allclose(answer.probabilities, alone.probabilities)
        assert np.array_equal(answer.task, alone.task)
    assert (passes.requests, passes.rows) == (40, sum(len(asked.x) for asked in questions))
    assert sum(passes.by_reason.values()) == len(engine.passes)


def test_what_comes_while_others_are_answered_is_answered_together():
    engine = Counting()
    engine.gate.clear()

    async def talk(batcher):
        first = asyncio.create_task(batcher.ask(question()))
        await entered(engine)
        later = [asyncio.create_task(batcher.ask(question(seed=seed))) for seed in range(7)]
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(first, *later)

    _, passes = in_a_loop(engine, talk, parallel=1)
    assert engine.passes == [[1], [1] * 7]
    assert passes.by_reason == Counter(idle=2)


@pytest.mark.parametrize("most", [1, 4, 5])
def test_no_pass_is_larger_than_is_set_unless_one_question_is(most):
    engine, asked = Counting(), (1, 3, 2, 9, 1, 1, 4)

    async def talk(batcher):
        await asyncio.gather(*(batcher.ask(question(rows)) for rows in asked))

    _, passes = in_a_loop(engine, talk, batch_rows=most)
    answered = [rows for taken in engine.passes for rows in taken]
    for is_large in (False, True):  # each in their order; large ones have a way of their own
        assert [n for n in answered if (n > most) == is_large] == [n for n in asked if (n > most) == is_large]
    assert all(sum(taken) <= most or len(taken) == 1 for taken in engine.passes)
    assert passes.by_reason["full"] >= 1


def test_a_window_waits_for_others_and_ends_early_when_a_pass_is_full():
    engine = Counting(light=True)

    async def talk(batcher):
        first = asyncio.create_task(batcher.ask(question()))
        await asyncio.sleep(0)
        assert batcher.queued == 1  # nothing else runs, and still it waits
        await asyncio.gather(first, *(batcher.ask(question()) for _ in range(3)))

    _, passes = in_a_loop(engine, talk, batch_window_ms=1000, batch_rows=4)
    assert (engine.passes, passes.by_reason) == ([[1, 1, 1, 1]], Counter(full=1))
    _, passes = in_a_loop(engine, lambda batcher: batcher.ask(question()), batch_window_ms=5)
    assert passes.by_reason == Counter(window=1)


def test_beyond_what_may_wait_the_next_is_refused_at_once():
    engine = Counting()
    engine.gate.clear()

    async def talk(batcher):
        running = asyncio.create_task(batcher.ask(question()))
        await entered(engine)
        waiting = [asyncio.create_task(batcher.ask(question())) for _ in range(3)]
        await asyncio.sleep(0)
        refused = await batcher.ask(question())
        engine.gate.set()
        return refused, await asyncio.gather(running, *waiting)

    (refused, answers), _ = in_a_loop(engine, talk, parallel=1, queue_requests=3)
    assert isinstance(refused, TooManyQueries)
    assert (refused.status, refused.text) == (429, "overloaded: 3 queries are waiting")
    assert all(isinstance(answer, Prediction) for answer in answers)


def test_a_question_whose_time_is_over_is_refused_in_its_turn_and_takes_no_place_in_a_pass():
    engine = Counting()
    engine.gate.clear()

    async def talk(batcher):
        running = asyncio.create_task(batcher.ask(question()))
        await entered(engine)
        hasty = asyncio.create_task(batcher.ask(question(rows=2), timeout=1e-6))
        patient = asyncio.create_task(batcher.ask(question(rows=3)))
        await asyncio.sleep(0.001)
        engine.gate.set()
        return await asyncio.gather(running, hasty, patient)

    (_, hasty, patient), _ = in_a_loop(engine, talk, parallel=1)
    assert isinstance(hasty, DeadlineExceeded)
    assert len(patient.labels) == 3
    assert engine.passes == [[1], [3]]


def test_who_left_takes_no_place_in_a_pass():
    engine = Counting()
    engine.gate.clear()

    async def talk(batcher):
        running = asyncio.create_task(batcher.ask(question()))
        await entered(engine)
        left = asyncio.create_task(batcher.ask(question(rows=2)))
        await asyncio.sleep(0)
        left.cancel()
        stays = asyncio.create_task(batcher.ask(question(rows=3)))
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(running, stays)

    in_a_loop(engine, talk, parallel=1)
    assert engine.passes == [[1], [3]]


def test_a_refusal_and_a_crash_reach_who_asked_and_nobody_is_forgotten():
    async def refused(batcher):
        wrong = Question(np.ones((1, INPUTS + 1), np.float32))
        return await asyncio.gather(batcher.ask(question()), batcher.ask(wrong))

    (good, bad), _ = in_a_loop(Counting(), refused)
    assert isinstance(good, Prediction)
    assert isinstance(bad, BadInput)

    class Broken(Counting):
        def predict(self, questions):
            raise ZeroDivisionError("a bug")

    async def crashed(batcher):
        return await asyncio.gather(*(batcher.ask(question()) for _ in range(3)), return_exceptions=True)

    for light in (True, False):
        answers, _ = in_a_loop(Broken(light), crashed)
        assert [type(answer) for answer in answers] == [ZeroDivisionError] * 3


def test_several_passes_run_at_a_time():
    engine = Counting()
    engine.gate.clear()

    async def talk(batcher):
        large = asyncio.create_task(batcher.ask(question(rows=9)))
        await entered(engine)
        engine.entered.clear()
        small = asyncio.create_task(batcher.ask(question()))
        await entered(engine)
        engine.gate.set()
        await asyncio.gather(large, small)

    in_a_loop(engine, talk, parallel=2)
    assert engine.passes == [[9], [1]]


# -- large questions --------------------------------------------------------------------------------------------------


class Stepping(Counting):
    """Waits in every step but the first of a large question, until `go_on`; small ones are answered."""

    def __init__(self):
        super().__init__()
        self.go_on = threading.Event()

    def predict_in_steps(self, question):
        for step in range(4):
            self.answered_in.append(step)
            self.entered.set()
            if step:
                self.go_on.wait(10)
            yield None
        yield from self.predict([question])


@pytest.mark.parametrize("parallel", [1, 2])
def test_small_questions_pass_a_large_one_between_its_steps(parallel):
    engine = Stepping()
    order = []

    async def noted(batcher, rows):
        answer = await batcher.ask(question(rows))
        order.append(len(answer.labels))

    async def talk(batcher):
        large = asyncio.create_task(noted(batcher, 100))
        await entered(engine)
        small = asyncio.create_task(noted(batcher, 1))
        await asyncio.sleep(0)
        if parallel == 2:  # it needs no step to end
            await asyncio.wait_for(asyncio.shield(small), 10)
        engine.go_on.set()
        await asyncio.gather(large, small)

    _, passes = in_a_loop(engine, talk, parallel=parallel, batch_rows=8)
    assert order == [1, 100]
    assert (passes.count, passes.requests, passes.rows) == (2, 2, 101)


def test_large_questions_take_turns():
    engine = Stepping()
    engine.go_on.set()

    async def talk(batcher):
        await asyncio.gather(*(batcher.ask(question(100)) for _ in range(2)))

    in_a_loop(engine, talk, parallel=1, batch_rows=8)
    assert engine.answered_in[:4] == [0, 0, 1, 1]


def test_nobody_goes_on_with_the_question_of_who_left():
    engine = Stepping()

    async def talk(batcher):
        large = asyncio.create_task(batcher.ask(question(100)))
        await entered(engine)
        large.cancel()
        await asyncio.gather(large, return_exceptions=True)
        engine.go_on.set()
        await batcher.ask(question(1))

    in_a_loop(engine, talk, parallel=1, batch_rows=8)
    assert 2 not in engine.answered_in  # at most the step that had begun
    assert engine.passes == [[1]]


def test_a_large_question_whose_time_is_over_is_not_begun():
    engine = Stepping()

    async def talk(batcher):
        first = asyncio.create_task(batcher.ask(question(100)))
        await entered(engine)
        late = asyncio.create_task(batcher.ask(question(100), timeout=1e-6))
        await asyncio.sleep(0.001)
        engine.go_on.set()
        return await asyncio.gather(first, late)

    (_, late), _ = in_a_loop(engine, talk, parallel=1, batch_rows=8)
    assert isinstance(late, DeadlineExceeded)
    assert engine.passes == [[100]]
