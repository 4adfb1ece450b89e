"""What an operator does to tasks: nothing is lost, nothing else changes, and all of it survives a restart."""

import shutil
import threading

import pytest
from daemon_process import DaemonProcess, ask, mask_hashes, what_was_learned
from digits import draw, held_out
from learned_state import LAST, STREAM, copy_of, learn_stream, running, settings_in, versions
from test_worker import FullDisk

from storage import ledger, masks, tasks
from storage.db import StoreError, verify
from storage.masks import MaskUnknown
from supsupd import operations
from supsupd.client import DaemonError
from supsupd.commands import CommandQueue, CommandRefused
from supsupd.serving.engine import EngineError


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return learn_stream(tmp_path_factory.mktemp("learned"))


@pytest.fixture
def settings(learned, tmp_path):
    return copy_of(learned, tmp_path / "copy")


def history(settings):
    """All that is written once and kept."""
    return [
        set(ask(settings.state, "SELECT task_id, version, batch_id, sha256, reason FROM mask_version")),
        set(ask(settings.state, "SELECT id, batch_id, kind, task_id, evidence, reason FROM decision")),
    ]


OPERATIONS = {
    "retire": lambda worker: operations.retire(worker, 2),
    "merge": lambda worker: operations.merge(worker, 1, 2),
    "split": lambda worker: operations.split(worker, 2, LAST["B"]),
    "rollback": lambda worker: operations.rollback(worker, 2, 1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_other_tasks_stay_as_they_were_bit_for_bit(settings, name):
    with running(settings) as run:
        before = mask_hashes(settings.state)[3], run.answers(3, "C")
        kept = run.answers(1, "A")
        OPERATIONS[name](run.worker)
        assert (mask_hashes(settings.state)[3], run.answers(3, "C")) == before
        assert run.answers(1, "A") == kept
    with running(settings) as run:
        assert (mask_hashes(settings.state)[3], run.answers(3, "C")) == before
        assert run.answers(1, "A") == kept


@pytest.mark.parametrize("name", OPERATIONS)
def test_history_is_only_added_to_and_the_ledger_adds_up(settings, name):
    before = history(settings)
    with running(settings) as run:
        OPERATIONS[name](run.worker)
    for kept, now in zip(before, history(settings), strict=True):
        assert kept <= now
    assert verify(settings.store) == []
    counted = "SELECT task_id, count(*) FROM batch WHERE state = 'committed' GROUP BY task_id"
    recorded = "SELECT id, batches FROM task WHERE merged_into IS NULL"
    assert ask(settings.state, counted) == ask(settings.state, recorded)
    assert ask(settings.state, "SELECT sum(samples) FROM task WHERE merged_into IS NULL") == [(64 * len(STREAM),)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_restart_changes_nothing_of_it(settings, name):
    with running(settings) as run:
        OPERATIONS[name](run.worker)
        served = [(task.task_id, task.version, task.packed.tobytes()) for task in run.worker.predictor.tasks]
        known = {task_id: (t.version, t.batches, t.samples) for task_id, t in run.worker.engine.learner.tasks.items()}
        after = run.learn("A", 100)
    with running(settings) as run:
        again = {task_id: (t.version, t.batches, t.samples) for task_id, t in run.worker.engine.learner.tasks.items()}
        assert {i: t for i, t in again.items() if i != 1} == {i: t for i, t in known.items() if i != 1}
        assert [(t.task_id, t.version, t.packed.tobytes()) for t in run.worker.predictor.tasks][1:] == served[1:]
        assert after[1:] == ("committed", 1)


@pytest.mark.parametrize("name", [*OPERATIONS, "reopen"])
def test_a_transaction_that_fails_leaves_nothing_of_it(settings, name):
    operation = OPERATIONS.get(name, lambda worker: operations.reopen(worker, 2))
    with running(settings) as run:
        if name == "reopen":
            operations.retire(run.worker, 2)
    before = what_was_learned(settings.state), history(settings), ask(settings.state, "SELECT * FROM task")
    with running(settings, FullDisk) as run:
        served, known = run.worker.predictor, dict(run.worker.engine.learner.tasks)
        run.worker.database.full = range(10**9)
        with pytest.raises(StoreError, match="disk full"):
            operation(run.worker)
        assert run.worker.predictor is served
        assert run.worker.engine.learner.tasks == known
    assert (what_was_learned(settings.state), history(settings), ask(settings.state, "SELECT * FROM task")) == before
    assert verify(settings.store) == []


@pytest.mark.parametrize("name", [*OPERATIONS, "retire and reopen"])
def test_a_crash_after_the_transaction_changes_no_bit_of_what_is_learned_next(settings, tmp_path, name):
    """What goes on in memory and what is loaded from the store after a crash must be the same."""

    def operate(worker):
        for part in name.split(" and "):
            OPERATIONS.get(part, lambda worker: operations.reopen(worker, 2))(worker)

    shutil.copytree(settings.state.parent, tmp_path / "other")
    other = settings_in(tmp_path / "other")
    with running(settings) as run:
        operate(run.worker)
        for turn, letter in enumerate("ABC"):
            run.learn(letter, 200 + turn)
    with running(other) as run:
        operate(run.worker)
    for turn, letter in enumerate("ABC"):
        with running(other) as run:
            run.learn(letter, 200 + turn)
    expected = what_was_learned(settings.state)
    for part, value in what_was_learned(other.state).items():
        assert value == expected[part], part


# -- retire and reopen ------------------------------------------------------------------------------------------------


def test_a_retired_task_is_neither_served_nor_recognised_nor_trained(settings):
    with running(settings) as run:
        before = mask_hashes(settings.state)[2]
        assert run.inferred("B") == {2}
        operations.retire(run.worker, 2)
        assert run.inferred("B") <= {1, 3}
        for task in (2, "task-2", "2"):
            with pytest.raises(EngineError, match="task 2 is retired") as caught:
                run.answers(task, "B")
            assert caught.value.status == 404
        assert [row["task"] for row in run.service.tasks()] == [1, 3]
        assert [row["task"] for row in run.service.tasks(retired=True)] == [1, 2, 3]
        assert run.learn("B", 300)[1:] == ("unsure", None)
        assert mask_hashes(settings.state)[2] == before
        shown = run.service.task(2)
        assert shown["retired"]
        assert len(shown["decisions"]) == STREAM.count("B")


def test_a_reopened_task_predicts_bit_for_bit_as_before_and_goes_on(settings):
    with running(settings) as run:
        before, state = run.answers(2, "B"), run.worker.engine.learner.tasks[2].state
        operations.retire(run.worker, 2)
    with running(settings) as run:
        operations.reopen(run.worker, 2)
        assert run.answers(2, "B") == before
        again = run.worker.engine.learner.tasks[2].state
        assert again.to_bytes() == state.to_bytes()
        assert run.inferred("B") == {2}
        assert run.learn("B", 301)[1:] == ("committed", 2)


def test_when_every_task_is_retired_that_is_said(settings):
    with running(settings) as run:
        for task in (1, 2, 3):
            operations.retire(run.worker, task)
        with pytest.raises(EngineError, match="every task is retired"):
            run.answers(None, "A")
        assert not run.service.ready()
        operations.reopen(run.worker, 3)
        assert run.inferred("A") == {3}


# -- merge ------------------------------------------------------------------------------------------------------------


def test_merged_tasks_answer_under_every_name_and_keep_their_history(settings):
    with running(settings) as run:
        with run.worker.database.write() as session:
            tasks.rename(session, 2, "shuffled")
            tasks.set_key(session, 2, "day/2")
        counts = [run.service.task(task)["batches"] for task in (1, 2)]
        old, kept = run.service.task(2)["decisions"], run.answers(1, "A")
        operations.merge(run.worker, 1, 2)
    with running(settings) as run:
        for reference in (1, 2, "2", "id:2", "shuffled", "day/2", "task-1"):
            assert run.answers(reference, "A") == kept
            shown = run.service.task(reference)
            assert (shown["task"], shown["batches"]) == (1, sum(counts))
            assert [other["task"] for other in shown["merged"]] == [2]
        assert all(row in shown["decisions"] for row in old)
        assert len(versions(settings, 2)) == len(mask_hashes(settings.state)[2]) > 0
        with run.worker.database.read() as session:
            assert masks.load_mask(session, 2).version == versions(settings, 2)[-1][0]


def test_a_chain_of_merges_ends_at_the_one_in_use(settings):
    with running(settings) as run:
        operations.merge(run.worker, 2, 3)
        operations.merge(run.worker, 1, 2)
        kept = run.answers(1, "A")
        assert run.answers(3, "A") == run.answers(2, "A") == kept
        assert [row["batches"] for row in run.service.tasks()] == [len(STREAM)]
    with running(settings) as run:
        assert run.answers(3, "A") == run.answers(2, "A") == kept


@pytest.mark.parametrize(
    ("operation", "given", "why"),
    [
        ("merge", (1, 1), "with itself"),
        ("merge", (1, 2), "task 2 is retired"),
        ("merge", (2, 1), "task 2 is retired"),
        ("merge", (3, 4), "merged into task 3"),
        ("merge", (4, 1), "merged into task 3"),
        ("reopen", (4,), "merged into task 3 and cannot be reopened"),
        ("reopen", (1,), "task 1 is not retired"),
        ("retire", (2,), "task 2 is retired"),
        ("retire", (4,), "merged into task 3"),
        ("split", (2, 5), "task 2 is retired"),
        ("split", (1, 1), "had no mask before batch 1: nothing would be left"),
        ("split", (1, 10_000), "has learned no batch from 10000 on"),
        ("split", (99, 1), "there is no task 99"),
        ("merge", (1, 99), "there is no task 99"),
        ("retire", (99,), "there is no task 99"),
        ("rollback", (99, 1), "there is no task 99"),
        ("rollback", (2, 1), "task 2 is retired"),
        ("rollback", (4, 1), "merged into task 3"),
        ("rollback", (1, "newest"), "version [0-9]+ is the newest of task 1"),
        ("rollback", (1, 10_000), "task 1 has no mask version 10000"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(settings, operation, given, why):
    with running(settings) as run:
        assert operations.split(run.worker, 3, LAST["C"]) == 4
        operations.merge(run.worker, 3, 4)
        operations.retire(run.worker, 2)
        before = what_was_learned(settings.state), history(settings)
        given = [versions(settings, 1)[-1][0] if value == "newest" else value for value in given]
        with pytest.raises((tasks.TaskConflict, tasks.TaskUnknown, MaskUnknown), match=why):
            getattr(operations, operation)(run.worker, *given)
        assert (what_was_learned(settings.state), history(settings)) == before


# -- split ------------------------------------------------------------------------------------------------------------


def test_a_split_restores_the_earlier_bits_and_the_new_task_has_the_newest(settings):
    start = [turn + 1 for turn, letter in enumerate(STREAM) if letter == "A"][-2]
    with running(settings) as run, run.worker.database.read() as session:
        before = masks.load_mask(session, 1, masks.find_before(session, 1, start))
        newest, answers = masks.load_mask(session, 1), run.answers(1, "A")
        state = run.worker.engine.learner.tasks[1].state
        new = operations.split(run.worker, 1, start)
        assert run.answers(new, "A")[0] == answers[0]
        assert run.answers(new, "A")[1] == answers[1]
        assert run.worker.engine.learner.tasks[1].state is None
        assert run.worker.engine.learner.tasks[new].state.to_bytes() == state.to_bytes()
    with running(settings) as run, run.worker.database.read() as session:
        old = masks.load_mask(session, 1)
        assert (old.version, old.packed) == (newest.version + 1, before.packed)
        assert old.reason == f"split at batch {start}: the bits of version {before.version}"
        assert tasks.load_task(session, 1).reference == before.reference
        made = masks.load_mask(session, new)
        assert (made.version, made.packed, made.reference) == (1, newest.packed, newest.reference)
        assert made.reason == f"split from task 1 at batch {start}"
        moved = [turn + 1 for turn, letter in enumerate(STREAM) if letter == "A" and turn + 1 >= start]
        assert [row.id for row in ledger.list_committed(session, new)] == moved
        assert run.service.task(new)["batches"] == 2
        assert run.service.task(1)["batches"] == STREAM.count("A") - 2
        assert run.service.task(new)["last_seen"] == run.service.task(1)["last_seen"]


def test_a_split_can_be_split_again_and_merged_back(settings):
    parts = [turn + 1 for turn, letter in enumerate(STREAM) if letter == "A"]
    with running(settings) as run:
        new = operations.split(run.worker, 1, parts[-1])
        assert operations.split(run.worker, 1, parts[-2]) == new + 1
        operations.merge(run.worker, 1, new)
        operations.merge(run.worker, 1, new + 1)
        assert run.service.task(1)["batches"] == len(parts)
        told = [row["evidence"].get("operation") for row in run.service.why(parts[-1])["decisions"]]
        assert told == [None, "split", "merge"]
        with pytest.raises(tasks.TaskConflict, match="merged into task 1"):
            operations.split(run.worker, new, parts[-1])


# -- rollback and history ---------------------------------------------------------------------------------------------


def test_a_rollback_brings_back_bits_record_and_predictions_and_says_what_it_undoes(settings):
    with running(settings) as run, run.worker.database.read() as session:
        first, newest = masks.load_mask(session, 1, 1), masks.load_mask(session, 1)
        counts = run.service.task(1)["batches"], run.service.task(1)["last_seen"]
        operations.rollback(run.worker, 1, 1, by="ann (1000)")
        back = run.answers(1, "A")
        assert run.worker.engine.learner.tasks[1].state is None
    with running(settings) as run, run.worker.database.read() as session:
        now = masks.load_mask(session, 1)
        assert (now.version, now.packed, now.reference) == (newest.version + 1, first.packed, first.reference)
        makers = [batch for version, batch, _, _ in versions(settings, 1) if 1 < version <= newest.version]
        assert now.reason == (
            f"rolled back to version 1: the training by batches {', '.join(map(str, makers))} is undone"
        )
        assert now.made_by == "ann (1000)"
        assert run.answers(1, "A") == back
        assert (run.service.task(1)["batches"], run.service.task(1)["last_seen"]) == counts
        assert tasks.load_task(session, 1).reference == first.reference
        assert run.learn("A", 500)[1:] == ("committed", 1)
        operations.rollback(run.worker, 1, newest.version)
        assert run.worker.engine.learner.tasks[1].packed.tobytes() == newest.packed


def test_the_history_tells_when_by_whom_and_why_each_version_was_made(settings):
    with running(settings) as run:
        operations.rollback(run.worker, 2, 1, by="ann (1000)")
        operations.split(run.worker, 1, LAST["A"], by="ben (1001)")
        told = {task: run.service.history(task) for task in (1, 2, 3, 4)}
        decided = {row["batch"]: row["reason"] for row in run.service.task(3)["decisions"]}
    for task, rows in told.items():
        assert [row["version"] for row in rows] == [version for version, *_ in versions(settings, task)]
        assert [row["sha256"] for row in rows] == mask_hashes(settings.state)[task]
        assert [row["served"] for row in rows] == [False] * (len(rows) - 1) + [True]
        assert all(row["bytes"] > 0 and 0 < row["density"] < 1 and row["created"] for row in rows)
    assert [(row["made_by"], row["reason"]) for row in told[3]] == [
        ("daemon", decided[row["batch"]]) for row in told[3]
    ]
    assert told[2][-1]["made_by"] == "ann (1000)"
    assert told[2][-1]["reason"].startswith("rolled back to version 1")
    assert told[1][-1]["made_by"] == told[4][-1]["made_by"] == "ben (1001)"
    with pytest.raises(EngineError, match="there is no task 99"):
        run.service.history(99)


# -- why --------------------------------------------------------------------------------------------------------------


def test_the_story_of_a_batch_is_told_with_its_margins_and_what_followed(settings):
    with running(settings) as run:
        first = run.service.why(1)["words"]
        assert first[0].startswith("batch 1, 0 (64 rows, labelled): committed, task 1: ")
        assert any("there was no task to compare with" in line for line in first)
        assert any("short" in line for line in first)
        assert any("it was decided when batch 2 came" in line for line in first)
        operations.split(run.worker, 1, LAST["A"])
        story = run.service.why(LAST["A"])
        words = "\n".join(story["words"])
        assert [row["decision"] for row in story["decisions"]] == ["known", "known"]
        for told in ("all 64 rows were taken", "inside", "nats for knowing the labels", "-> its own", "held out from"):
            assert told in words
        assert f"an operator split task 1 at batch {LAST['A']}; task 4 has this batch from then on" in words
        assert "afterwards: version" in words
        with pytest.raises(EngineError, match="there is no batch 999"):
            run.service.why(999)


# -- the thread that operates -----------------------------------------------------------------------------------------


def test_commands_run_in_the_learning_thread_and_are_refused_when_it_ends(settings):
    with running(settings) as run:
        stopping = threading.Event()
        thread = threading.Thread(target=run.worker.loop, args=(stopping,))
        thread.start()
        assert run.worker.call(threading.current_thread) is thread
        with pytest.raises(EngineError, match="there is no task 99") as caught:
            run.service.retire(99)
        assert caught.value.status == 404
        assert run.service.retire("task-2")["retired"]
        stopping.set()
        run.worker.notify()
        thread.join(30)
        with pytest.raises(EngineError, match="shutting down; nothing was changed") as caught:
            run.service.reopen(2)
        assert caught.value.status == 503
        assert run.service.task(2)["retired"]


def test_a_command_whose_turn_does_not_come_is_never_run():
    queue, done = CommandQueue(lambda: None), []
    with pytest.raises(CommandRefused, match="no turn within"):
        queue.call(lambda: done.append(1), seconds=0.01)
    queue.run_waiting()
    assert done == []


def test_what_a_command_raises_reaches_its_caller_and_not_the_thread_that_runs_it():
    queue, caught = CommandQueue(lambda: None), []

    def ask_for(command):
        try:
            queue.call(command, seconds=30)
        except (ZeroDivisionError, TimeoutError) as error:
            caught.append(type(error))

    def time_out():
        raise TimeoutError

    for command in (lambda: 1 / 0, time_out):
        thread = threading.Thread(target=ask_for, args=(command,))
        thread.start()
        while thread.is_alive():
            queue.run_waiting()
        thread.join()
    assert caught == [ZeroDivisionError, TimeoutError]


# -- end to end -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_operators_day_with_a_real_daemon_that_dies(tmp_path):
    x = held_out(0)[0][:40]
    with DaemonProcess(tmp_path) as daemon:
        for turn, letter in enumerate("AABBA"):
            daemon.drop(f"{turn}-{letter}", **draw("AB".index(letter), turn))
        daemon.start().wait()
        assert [row["task"] for row in daemon.listing("tasks", "list")] == [1, 2]
        before = daemon.infer(x, task=1)
        assert daemon.cli("tasks", "retire", "1").stdout == "task 1 is retired\n"
        with pytest.raises(DaemonError, match="task 1 is retired"):
            daemon.client.predict(x, task="task-1")
        assert daemon.cli("tasks", "reopen", "task-1").stdout == "task 1 is in use again\n"
        assert daemon.infer(x, task=1) == before
        last = daemon.row("4-A")["batch"]
        assert daemon.cli("tasks", "split", "1", "--from", str(last)).stdout == f"task 3 has 1 batches from {last} on\n"
        assert daemon.cli("tasks", "merge", "2", "3").stdout == "task 2 answers for 3 too: 3 batches\n"
        daemon.client.retire(1)
        daemon.kill()
        daemon.start()
        assert [row["task"] for row in daemon.listing("tasks", "list")] == [2]
        assert [row["task"] for row in daemon.client.tasks(retired=True)] == [1, 2, 3]
        assert {row["task"] for row in daemon.client.predict(x, task=3)} == {2}
        told = daemon.cli("tasks", "why", str(last)).stdout
        assert f"an operator split task 1 at batch {last}; task 3" in told
        assert "an operator merged task 3 into task 2" in told
        assert daemon.stop() == 0
