"""The paper's rule: ν from inputs alone, a check now and then, the same after a restart."""

import numpy as np
import pytest
import torch
from digits import draw, held_out
from learning_stream import Stream, small_network
from test_worker import learn_all, new_store, one_thread, worker_of  # noqa: F401 - fixtures

from supsupd.learning.bank import Masks
from supsupd.learning.inference import Scorer, Slopes
from supsupd.learning.paper_rule import LEAST_MASKS
from supsupd.sections import RecognitionSettings


def paper(every=5, epsilon=0.125):
    return RecognitionSettings(rule="paper", check_batches=every, paper_epsilon=epsilon)


def test_between_checks_every_batch_trains_the_current_mask():
    stream = Stream(recognition=paper(every=6))
    kinds = [stream.feed(**draw(task, seed)) for task, seed in zip([0, 0, 1, 1, 2, 2], range(6), strict=True)]
    assert kinds == ["new", *["known"] * 5]
    assert set(stream.task_of.values()) == {1}
    assert [c.evidence["paper"].get("next_check_after") for c in stream.changes] == [None, 5, 4, 3, 2, 1]


def test_a_check_takes_the_arg_max_of_nu_or_makes_a_mask_by_its_height():
    stream = Stream(recognition=paper(every=1))
    for seed in range(30):
        stream.feed(**draw(0, seed))
    for change in stream.changes[1:]:
        told = change.evidence["paper"]
        assert told["masks"] >= LEAST_MASKS
        assert told["margin"] == pytest.approx(told["k_max_nu"] - told["threshold"], abs=1e-4)
        if change.kind == "known":
            assert told["k_max_nu"] >= told["threshold"]
            assert change.task.task_id == told["nu"][0]["task"]


def test_nu_is_the_softmax_of_the_one_shot_slopes_over_the_masks_and_those_not_trained_yet():
    stream = Stream(recognition=paper(every=1))
    stream.feed(**draw(0, 0))
    stream.feed(**draw(0, 1))
    learner = stream.learner
    masks = [learner.tasks[i].packed for i in sorted(learner.tasks)]
    untrained = [learner.learner.packed(learner.learner.fresh(f"paper {i}")) for i in range(len(masks) + 1, 6)]
    bank = Masks.of([*masks, *untrained])
    assert len(bank) == LEAST_MASKS
    stream.feed(**draw(0, 2))
    x = stream.changes[-1].assigned[0].batch.samples.x.numpy()
    slopes = torch.from_numpy(Slopes(Scorer(small_network(), 1), bank, "entropy", 10).descent(x, np.arange(5)))
    nu = torch.softmax(slopes.double(), dim=0)
    assert stream.changes[-1].evidence["paper"]["k_max_nu"] == pytest.approx(5 * float(nu.max()), abs=1e-4)


def test_a_height_that_nothing_reaches_makes_a_mask_at_every_check():
    stream = Stream(recognition=paper(every=3, epsilon=100.0))
    assert [stream.feed(**draw(0, seed)) for seed in range(9)] == ["new", "known", "known"] * 3


def test_labels_decide_nothing():
    told = []
    for shift in (0, 3):
        stream = Stream(recognition=paper(every=1))
        stream.feed(**draw(0, 0))
        second = draw(0, 1)
        stream.feed(second["x"], (second["y"] + shift) % 10)
        told.append((stream.changes[-1].kind, stream.changes[-1].evidence["paper"]))
    assert told[0] == told[1]


def test_learning_by_the_papers_rule_leaves_every_other_mask_bit_for_bit():
    stream = Stream(recognition=paper(every=3, epsilon=100.0))
    for seed in range(3):
        stream.feed(**draw(0, seed))
    mask = stream.learner.tasks[1].packed.copy()
    for seed in range(6):
        stream.feed(**draw(1, seed))
    assert np.array_equal(stream.learner.tasks[1].packed, mask)
    assert stream.accuracy(1, *held_out(0)) > 0.5


def test_a_restart_changes_nothing(new_store):  # noqa: F811
    batches = [draw(turn // 4 % 3, turn) for turn in range(12)]
    found = []
    for lives in ([12], [5, 12]):
        settings = new_store().model_copy(update={"recognition": paper(every=4)})
        for life, until in enumerate(lives):
            with worker_of(settings, batches=batches[:until] if not life else batches[lives[0] : until]) as worker:
                learn_all(worker)
                tasks = worker.engine.learner.tasks
                last = {task_id: (task.packed.tobytes(), task.batches) for task_id, task in tasks.items()}
        found.append((last, list(tasks)))
    assert found[0] == found[1]
