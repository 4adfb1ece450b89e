"""An operator can drop whatever still has its bytes, with the daemon and without it; what goes on goes on as if it had
never been there."""

import subprocess

import pytest
from daemon_process import BIN, DaemonProcess, ask, edit
from digits import draw, held_out
from test_worker import learn_all, new_store, stage, states, worker_of  # noqa: F401  # a fixture

from storage import ledger
from storage.ledger import LedgerConflict
from supsupd.learning.device import use_threads


@pytest.fixture(autouse=True)
def one_thread():
    use_threads(1)


def dropped(worker, batch):
    """As the learning thread does it, between two batches."""
    worker._lessons.drop(batch)


def provisionals(worker):
    """What is in memory of each, but for its number: members, bits and what it has proved."""
    return [
        ([m.batch.batch_id for m in p.members], p.mask.packed.tobytes(), round(p.wealth(), 6))
        for p in worker.engine.learner.provisionals.values()
    ]


def two_tasks_in_the_making():
    """A task, then single batches of others, each too little to found one."""
    known = [draw(0, turn) for turn in range(4)]
    new = [draw(task, turn, rows=16) for turn in range(2) for task in (1, 2)]
    return [*known, *new]


@pytest.mark.parametrize("member", range(4))
def test_a_provisional_task_goes_on_without_a_dropped_member_as_after_a_restart(new_store, member):  # noqa: F811
    settings = new_store()
    with worker_of(settings, batches=two_tasks_in_the_making()) as worker:
        learn_all(worker)
        unsure = [batch for (batch,) in ask(settings.state, "SELECT id FROM batch WHERE state = 'unsure' ORDER BY id")]
        before = provisionals(worker)
        assert len(unsure) == 4
        assert len(before) == 2
        dropped(worker, unsure[member])
        after = provisionals(worker)
        assert sorted(m for members, *_ in after for m in members) == sorted(set(unsure) - {unsure[member]})
        assert len(worker.spool.names()) >= 3
    with worker_of(settings) as again:
        again.load()
        assert provisionals(again) == after
        stage(settings, again.database, [draw(1, turn) for turn in range(5, 9)])
        while again.step():
            pass
        assert states(settings)[-1] == "committed"


def test_the_last_member_takes_its_provisional_task_with_it(new_store):  # noqa: F811
    settings = new_store()
    with worker_of(settings, batches=[draw(0, 0, rows=16)]) as worker:
        learn_all(worker)
        assert len(provisionals(worker)) == 1
        dropped(worker, 1)
        assert provisionals(worker) == []
        assert worker.spool.names() == set()


def test_what_a_failure_left_in_training_can_be_dropped_and_the_rest_is_rebuilt(new_store):  # noqa: F811
    settings = new_store()
    with worker_of(settings, batches=two_tasks_in_the_making()) as worker:
        worker.load()
        for _ in range(4):
            worker.step()
        with worker.database.write() as session:
            stuck = ledger.claim(session).id
        worker._knowledge.stale = True
        dropped(worker, stuck)
        assert worker._knowledge.stale  # a failure before it is still to be mended
        learn_all(worker)
        assert states(settings)[stuck - 1] == "dropped"
        assert "staged" not in states(settings)


def test_what_is_done_says_why_it_cannot_be_dropped(new_store):  # noqa: F811
    settings = new_store()
    with worker_of(settings, batches=[*(draw(0, turn) for turn in range(3)), {"x": held_out(0)[0][:5]}]) as worker:
        learn_all(worker)
        for batch, state in enumerate(states(settings), 1):
            with pytest.raises(LedgerConflict, match=f"batch {batch} is {state}: only what waits or was rejected"):
                dropped(worker, batch)


# -- the command lines ------------------------------------------------------------------------------------------------


def offline(state, *command):
    line = [BIN / "supsupd", "batches", *map(str, command), "--state", state]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


def test_batches_are_dropped_with_the_daemon_and_without_it(tmp_path):
    with DaemonProcess(tmp_path) as daemon:
        daemon.drop("first", **draw(0, 0, rows=16))
        daemon.drop("second", **draw(1, 1, rows=16))
        daemon.start().wait()
        assert [row["state"] for row in daemon.client.batches()] == ["unsure", "unsure"]
        busy = offline(daemon.state, "drop", 2)
        assert (busy.returncode, "is used by another supsupd" in busy.stderr) == (1, True)
        assert offline(daemon.state, "list", "--in", "unsure").stdout.count("provisional task") == 2
        assert daemon.cli("batches", "drop", "1").stdout == "batch 1 is dropped\n"
        again = daemon.cli("batches", "drop", "1")
        assert again.stderr == "batch 1 is dropped: only what waits or was rejected can be dropped\n"
        assert daemon.stop() == 0
        edit(daemon.state, "UPDATE batch SET state = 'training' WHERE id = 2")
        done = offline(daemon.state, "drop", 2, 1)
        assert (done.returncode, done.stdout) == (1, "batch 2 is dropped\n")
        assert done.stderr == "batch 1 is dropped: only what waits or was rejected can be dropped\n"
        assert offline(daemon.state, "drop", 9).stderr == "there is no batch 9\n"
        assert list((daemon.state / "spool").iterdir()) == []
        for turn in range(3):
            daemon.drop(f"good {turn}", **draw(0, 10 + turn))
        daemon.start().wait()
        assert daemon.client.status()["batches"]["committed"] == 3
        assert daemon.client.status()["batches"]["dropped"] == 2
