"""A damaged mask takes its task out of service and nothing else, and a rollback brings it back."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from daemon_process import DaemonProcess, ask, copy_database, edit
from digits import draw, held_out
from learned_state import LAST, copy_of, learn_stream, running, versions
from learning_stream import samples_of
from test_scenarios import running as parts_of

from storage.masks import MaskCorrupt
from supsupd import operations
from supsupd.client import DaemonError
from supsupd.config import Settings
from supsupd.learning.guard import Guard
from supsupd.learning.records import Change, LabelledBatch, Member
from supsupd.sections import BankSettings, NetworkSettings, RecognitionSettings
from supsupd.serving.engine import EngineError

FLIP = (
    "UPDATE mask_version SET bits = CAST(? || substr(bits, 2) AS BLOB)"
    " WHERE task_id = ? AND version = (SELECT max(version) FROM mask_version WHERE task_id = ?)"
)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return learn_stream(tmp_path_factory.mktemp("learned"))


@pytest.fixture
def settings(learned, tmp_path):
    return copy_of(learned, tmp_path / "copy")


def damage(state, task):
    """Another first byte in the newest mask of a task, as a bad disk would leave it."""
    edit(state, FLIP, b"\x5a", task, task)


def whole(settings, task):
    """The newest version of a task's mask before the last one."""
    return versions(settings, task)[-2][0]


def refusal(run, task, letter):
    with pytest.raises(EngineError) as caught:
        run.answers(task, letter)
    return caught.value.status, caught.value.text


def mask_bytes(settings):
    with running(settings) as run:
        return run.worker.masks_in_memory["bytes"] // 3


@pytest.fixture
def cold(settings):
    """Settings with room for the mask of one task in memory."""
    return settings.model_copy(update={"bank": BankSettings(memory_bytes=mask_bytes(settings), ready_bytes=1)})


def test_at_the_start_the_other_tasks_answer_and_learn_as_if_nothing_had_happened(settings):
    with running(settings) as run:
        kept = run.answers(1, "A"), run.answers(3, "C")
    damage(settings.state, 2)
    with running(settings) as run:
        assert (run.answers(1, "A"), run.answers(3, "C")) == kept
        assert run.service.ready()
        assert refusal(run, 2, "B")[0] == refusal(run, "task-2", "B")[0] == 503
        assert refusal(run, 2, "B")[1].startswith("mask_corrupt: mask of task 2, version ")
        assert run.inferred("B") <= {1, 3}
        assert run.learn("A", 600)[1:] == ("committed", 1)
        shown = {row["task"]: row["problem"] for row in run.service.tasks()}
        assert shown == {1: None, 2: run.worker.engine.out_of_service[2], 3: None}
        (problem,) = run.service.status()["problems"]
        assert (problem["who"], problem["kind"], problem["text"]) == ("task 2", "mask_corrupt", shown[2])


def test_a_rollback_brings_the_task_back_and_decides_what_waited_for_it(settings):
    damage(settings.state, 2)
    with running(settings) as run:
        batch, state, task = run.learn("B", 601)
        assert (state, task) == ("unsure", None)
        operations.rollback(run.worker, 2, whole(settings, 2))
        assert ask(settings.state, f"SELECT state, task_id FROM batch WHERE id = {batch}") == [("committed", 2)]
        assert run.inferred("B") == {2}
        assert run.worker.engine.out_of_service == {}
        assert run.service.tasks()[1]["problem"] is None
        back = run.answers(2, "B")
    with running(settings) as run:
        assert run.answers(2, "B") == back


@pytest.mark.parametrize("task", [1, 2, 3])
def test_a_mask_that_is_damaged_while_it_is_only_in_the_store_is_found_by_a_query(cold, task):
    with running(cold) as run:
        kept = {number: run.answers(number, letter) for number, letter in enumerate("ABC", start=1)}
        run.worker.engine.bank.drop(task)
        for served in run.worker.predictor.tasks:
            if served.task_id == task:
                served.mask.hot = None
        damage(cold.state, task)
        assert run.inferred("ABC"[task - 1]) <= {1, 2, 3} - {task}
        assert list(run.worker.engine.out_of_service) == [task]
        assert refusal(run, task, "A")[0] == 503
        assert {n: run.answers(n, "ABC"[n - 1]) for n in kept if n != task} == {
            n: answer for n, answer in kept.items() if n != task
        }
        operations.rollback(run.worker, task, whole(cold, task))
        assert run.inferred("ABC"[task - 1]) == {task}


def test_a_mask_that_is_found_damaged_in_learning_costs_no_batch(cold):
    with running(cold) as run:
        run.worker.engine.bank.drop(2)
        run.worker.engine.learner.tasks[2].mask.hot = None
        damage(cold.state, 2)
        assert run.learn("A", 602)[1:] == ("committed", 1)
        assert list(run.worker.engine.out_of_service) == [2]
        assert 2 not in run.worker.engine.learner.tasks
        assert [task.task_id for task in run.worker.predictor.tasks] == [1, 3]
        assert run.learn("C", 603)[1:] == ("committed", 3)


def test_a_damaged_earlier_mask_that_a_guard_would_go_back_to_is_forgotten_and_the_task_goes_on(settings):
    statement = "UPDATE mask_version SET bits = CAST(? || substr(bits, 2) AS BLOB) WHERE task_id = 1 AND version = 1"
    edit(settings.state, statement, b"\x5a")
    with running(settings) as run:
        learner, bank = run.worker.engine.learner, run.worker.engine.bank
        newest = learner.tasks[1]
        samples = samples_of(**draw(0, 604))
        member = Member(LabelledBatch(0, "0" * 64, samples), 0, len(samples))
        earlier = replace(newest, version=1, mask=bank.cold((1, 1), newest.mask.nbytes))
        suspicious = Guard(earlier, (member,), np.zeros(64, np.int64), np.zeros(64), log_wealth=1.0)
        learner.apply(Change("known", {}, task=newest, guard=suspicious))
        assert run.learn("A", 605)[1:] == ("committed", 1)
        assert run.worker.engine.out_of_service == {}


def test_when_every_mask_is_damaged_that_is_said_and_each_can_be_mended(settings):
    for task in (1, 2, 3):
        damage(settings.state, task)
    with running(settings) as run:
        assert not run.service.ready()
        assert refusal(run, None, "A")[1].startswith("mask_corrupt: ")
        for task, letter in enumerate("ABC", start=1):
            operations.rollback(run.worker, task, whole(settings, task))
            assert len(run.answers(task, letter)[0]) == len(held_out(0)[0])
        assert run.service.ready()


def test_a_missing_mask_is_a_damaged_one(settings):
    newest = versions(settings, 2)[-1][0]
    edit(settings.state, "DELETE FROM mask_version WHERE task_id = 2 AND version = ?", newest)
    with running(settings) as run:
        assert run.worker.engine.out_of_service == {2: f"mask of task 2, version {newest}: it is missing"}
        operations.rollback(run.worker, 2, newest - 1)
        assert run.inferred("B") == {2}


def test_an_operator_can_retire_or_merge_away_a_damaged_task_but_not_build_on_it(settings):
    damage(settings.state, 2)
    with running(settings) as run:
        with pytest.raises(operations.TaskConflict, match="task 2 is out of service: mask of task 2"):
            operations.merge(run.worker, 2, 1)
        with pytest.raises(MaskCorrupt):
            operations.split(run.worker, 2, LAST["B"])
        operations.retire(run.worker, 2)
        assert run.worker.engine.out_of_service == {}
        with pytest.raises(MaskCorrupt):
            operations.reopen(run.worker, 2)
        assert run.service.task(2)["retired"]


def test_a_rollback_to_a_damaged_version_is_refused_and_changes_nothing(settings):
    statement = "UPDATE mask_version SET bits = CAST(? || substr(bits, 2) AS BLOB) WHERE task_id = 1 AND version = 1"
    edit(settings.state, statement, b"\x5a")
    with running(settings) as run:
        before, kept = versions(settings, 1), run.answers(1, "A")
        with pytest.raises(MaskCorrupt, match="mask of task 1, version 1"):
            operations.rollback(run.worker, 1, 1)
        assert (versions(settings, 1), run.answers(1, "A")) == (before, kept)


def test_a_batch_that_names_a_damaged_task_waits_until_it_is_mended(tmp_path):
    (tmp_path / "watch").mkdir()
    given = Settings(
        watch=[tmp_path / "watch"],
        state=tmp_path / "state",
        socket=tmp_path / "sock",
        network=NetworkSettings(hidden=[50]),
        recognition=RecognitionSettings(scenario="GNu"),
    )

    def decided():
        found = ask(given.state, "SELECT name, state, task_id FROM batch WHERE state <> 'duplicate' ORDER BY id DESC")
        return {name: (state, task) for name, state, task in reversed(found[:3])}

    with parts_of(given) as parts:
        for turn in range(6):
            parts.drop(f"{turn}.npz", turn, **draw(turn % 2, turn), task=np.array("ab"[turn % 2]))
        parts.run()
        assert parts.keys() == {1: "a", 2: "b"}
    damage(given.state, 2)
    with parts_of(given) as parts:
        parts.drop("7.npz", 7, **draw(1, 7), task=np.array("b"))
        parts.drop("8.npz", 8, x=held_out(1)[0][:16], task=np.array("b"))
        parts.drop("9.npz", 9, **draw(0, 9), task=np.array("a"))
        parts.run()
        waiting = {"7.npz": ("unsure", None), "8.npz": ("unsure", None), "9.npz": ("committed", 1)}
        assert decided() == waiting
        ((reason,),) = ask(given.state, "SELECT reason FROM batch WHERE name = '7.npz' AND state = 'unsure'")
        assert reason.startswith("waiting until task 2 is mended: mask of task 2, version ")
    with parts_of(given) as parts:  # it waits through a restart, too
        parts.run()
        assert decided() == waiting
        operations.rollback(parts.worker, 2, 1)
        parts.run()
        assert decided() == {"7.npz": ("committed", 2), "8.npz": ("scored", 2), "9.npz": ("committed", 1)}


@pytest.mark.slow
def test_a_daemon_with_a_damaged_mask_starts_says_so_and_is_mended_by_hand(learned, tmp_path):
    with DaemonProcess(tmp_path) as daemon:
        copy_database(learned / "state", daemon.state)
        shutil.copytree(learned / "state" / "spool", daemon.state / "spool", dirs_exist_ok=True)
        damage(daemon.state, 2)
        daemon.start()
        assert [row["who"] for row in daemon.client.status()["problems"]] == ["task 2"]
        assert "mask of task 2" in daemon.cli("tasks", "list").stdout
        x = held_out(1)[0][:16]
        with pytest.raises(DaemonError, match="mask_corrupt: mask of task 2") as caught:
            daemon.client.predict(x, task=2)
        assert caught.value.status == 503
        assert {row["task"] for row in daemon.client.predict(x)} <= {1, 3}
        newest = daemon.client.history(2)[-1]["version"]
        told = daemon.cli("tasks", "rollback", "2", "--to", str(newest - 1)).stdout
        assert told == f"task 2 is as it was at version {newest - 1}, in version {newest + 1}\n"
        assert {row["task"] for row in daemon.client.predict(x)} == {2}
        assert daemon.client.status()["problems"] == []
        rows = daemon.client.history("task-2")
        assert [row["served"] for row in rows][-2:] == [False, True]
        me = daemon.listing("tasks", "history", "2")[-1]["made_by"]
        assert me.endswith(f"({os.getuid()})")
        assert daemon.stop() == 0
