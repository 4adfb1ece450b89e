"""What a batch may cost, whatever is in it: rows, memory, the rows of others. Over a real store, in this process."""

import subprocess
import sys

import numpy as np
from daemon_process import ask
from digits import draw
from test_worker import learn_all, new_store, one_thread, worker_of  # noqa: F401 - fixtures

from supsupd.sections import LearningSettings, RecognitionSettings

SOME_ROWS = LearningSettings(steps=16, max_steps=16, minibatch=8)  # learns 128 rows of a batch at most
LOW_MEMORY = """
import resource, sys, threading
from pathlib import Path
from storage.db import Database
from storage.spool import Spool
from supsupd.config import Settings
from supsupd.learning.device import pick_device, use_threads
from supsupd.sections import NetworkSettings
from supsupd.worker import Worker
threading.stack_size(1 << 18)  # which counts as taken
root = Path(sys.argv[1])
settings = Settings(watch=[root / "watch"], state=root / "state", socket=root / "sock",
                    network=NetworkSettings(hidden=[100]))
use_threads(1)
database = Database.open(settings.store)
worker = Worker(settings, database, Spool(settings.state / "spool"), pick_device("cpu"))
worker.load()
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
print(len(worker.engine.learner.provisionals))
resource.setrlimit(resource.RLIMIT_AS, (taken + (6 << 20), resource.RLIM_INFINITY))
worker.load()
print(len(worker.engine.learner.provisionals))
"""


def ledger_of(settings):
    return ask(settings.state, "SELECT state, task_id, reason FROM batch ORDER BY id")


def decisions(settings, batches):
    with worker_of(settings, batches=batches) as worker:
        learn_all(worker)
    return ledger_of(settings)


def test_of_a_batch_with_very_many_rows_some_are_learned_and_the_same_ones_each_time(new_store):  # noqa: F811
    batches = [draw(0, 0), draw(0, 1), draw(0, 2, rows=1000)]
    masks = []
    for _ in range(2):
        settings = new_store().model_copy(update={"learning": SOME_ROWS})
        *_, (state, task, reason) = decisions(settings, batches)
        assert (state, task) == ("committed", 1)
        assert reason.endswith("; 128 of its 1000 rows were drawn to be learned")
        masks.append(ask(settings.state, "SELECT sha256 FROM mask_version ORDER BY version"))
    assert masks[0] == masks[1]
    assert ask(settings.state, "SELECT samples FROM batch WHERE id = 3") == [(1000,)]
    assert ask(settings.state, "SELECT samples FROM task") == [(256,)]


def test_unsure_batches_of_which_some_rows_are_learned_are_the_same_after_a_restart(new_store):  # noqa: F811
    unsure = RecognitionSettings(promote_error=1e-300)
    settings = new_store().model_copy(update={"learning": SOME_ROWS, "recognition": unsure})
    with worker_of(settings, batches=[draw(0, seed, rows=1000) for seed in range(3)]) as worker:
        learn_all(worker)
        (live,) = worker.engine.learner.provisionals.values()
    with worker_of(settings) as worker:
        worker.load()
        (again,) = worker.engine.learner.provisionals.values()
        assert np.array_equal(again.mask.packed, live.mask.packed)
        assert [len(m.samples) for m in again.members] == [128] * 3
    more = settings.model_copy(update={"learning": SOME_ROWS.model_copy(update={"max_steps": 32})})
    with worker_of(more) as worker:  # other rows of the same batches
        worker.load()
        (other,) = worker.engine.learner.provisionals.values()
        assert [len(m.samples) for m in other.members] == [256] * 3


def test_rows_far_outside_what_a_task_has_seen_are_left_out_whatever_their_labels_say(new_store):  # noqa: F811
    settings = new_store(normalisation="none")
    spoilt = draw(0, 4)
    spoilt["x"][::8] *= 1e6
    clean = [draw(0, seed) for seed in range(5, 25)]
    found = decisions(settings, [*(draw(0, seed) for seed in range(4)), spoilt, *clean])
    assert [(state, task) for state, task, _ in found] == [("committed", 1)] * 25
    assert found[4][2].endswith("; 8 rows among them lie far outside what it has seen")
    assert ask(settings.state, "SELECT samples FROM task") == [(25 * 64 - 8,)]


def test_rows_far_outside_do_not_spoil_a_task_in_the_making_either(new_store):  # noqa: F811
    settings = new_store(normalisation="none")
    spoilt = draw(0, 1)
    spoilt["x"][::8] *= 1e6
    found = decisions(settings, [draw(0, 0), spoilt, *(draw(0, seed) for seed in range(2, 12))])
    assert [(state, task) for state, task, _ in found] == [("committed", 1)] * 12


def test_a_batch_that_lies_outside_altogether_is_none_of_the_task(new_store):  # noqa: F811
    settings = new_store(normalisation="none")
    away = draw(0, 4)
    away["x"] = away["x"] * 1e4
    found = decisions(settings, [*(draw(0, seed) for seed in range(4)), away, draw(0, 5)])
    assert [(state, task) for state, task, _ in found[4:]] == [("unsure", None), ("committed", 1)]
    assert "64 of 64 rows lie far outside what task 1 has seen" in found[4][2]


def test_a_first_batch_whose_network_would_not_fit_is_refused_and_the_next_one_makes_it(new_store):  # noqa: F811
    rng = np.random.default_rng(0)
    hostile = {
        "a class for each row": {"x": rng.random((20_000, 4)), "y": np.arange(20_000)},
        "very wide": {"x": rng.random((2, 300_000)), "y": np.array([0, 1])},
    }
    for what, batch in hostile.items():
        settings = new_store()
        (state, _, reason), *others = decisions(settings, [batch, *(draw(0, seed) for seed in range(3))])
        assert (state, reason.partition(":")[0]) == ("quarantined", "too_large"), what
        assert "learning.memory_bytes" in reason
        assert [(state, task) for state, task, _ in others] == [("committed", 1)] * 3


def test_a_start_that_lacks_memory_sets_batches_aside_and_says_so(new_store):  # noqa: F811
    rng = np.random.default_rng(0)
    noise = [{"x": rng.random((50_000, 64)), "y": rng.integers(0, 10, 50_000)} for _ in range(2)]
    settings = new_store()
    with worker_of(settings, batches=noise) as worker:
        learn_all(worker)
    done = subprocess.run(
        [sys.executable, "-c", LOW_MEMORY, settings.state.parent], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0"
    assert {(state, reason) for state, _, reason in ledger_of(settings)} == {
        ("suspended", "no_memory: there was not enough memory to learn it")
    }
    assert "batches_suspended" in done.stdout + done.stderr
    with worker_of(settings, batches=[draw(1, 0)]) as worker:  # and all goes on
        learn_all(worker)
    assert ledger_of(settings)[-1][0] == "unsure"
