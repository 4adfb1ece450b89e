"""The tests of durability are tested: each of five planted bugs is caught by one of them."""

import pytest
from daemon_process import QUICK
from failpoint_lane import Uninterrupted
from feeding import Feeder, drive
from forked_daemon import ForkedDaemon, Nursery
from oracle import violations
from order_lane import violations_of_life
from planted_bugs import drop_unique_content
from syscalls import require_strace

from storage.db import upgrade

pytestmark = pytest.mark.slow


def test_a_removed_fsync_is_caught_by_the_order_of_calls(tmp_path):
    require_strace()
    _, problems = violations_of_life(tmp_path, 2, bug="fsync_removed")
    assert any("renamed before its bytes were synced" in problem for problem in problems)
    assert any("folder was not synced" in problem for problem in problems)


@pytest.mark.parametrize("broker", ["nats", "redis"])
def test_an_early_acknowledgement_is_caught_by_the_order_of_calls(broker, tmp_path):
    require_strace()
    _, problems = violations_of_life(tmp_path, 2, broker, bug="ack_early")
    assert any("acknowledged before its row was durable" in problem for problem in problems)


def test_a_dropped_unique_constraint_is_caught_by_the_judge(tmp_path):
    upgrade(tmp_path / "supsup.db")
    assert violations(tmp_path) == []
    drop_unique_content(tmp_path / "supsup.db")
    assert any("dedupe_key" in problem for problem in violations(tmp_path))


def test_a_mask_outside_the_transaction_is_caught_by_a_kill_between_the_two(tmp_path):
    with Nursery("mask_outside_the_transaction") as nursery, ForkedDaemon(nursery, tmp_path, QUICK) as daemon:
        feeder = Feeder(daemon, arm=lambda fired: "learn.committed:2:kill")
        feeder.put(0)
        feeder.start()
        daemon.process.wait(60)
        assert feeder.fired() == ["learn.committed"]
        problems = violations(daemon.state, killed=True)
        assert any("half done" in problem for problem in problems), problems


def test_an_ignored_rollback_is_caught_by_the_comparison_with_an_uninterrupted_run(tmp_path):
    with Nursery() as nursery:
        clean = Uninterrupted(nursery, tmp_path / "clean").learned(1)
    with Nursery("rolled_back_transaction_ignored") as nursery, ForkedDaemon(nursery, tmp_path / "bad") as daemon:
        feeder, _ = drive(daemon, 1)
        feeder.end()
        problems = violations(daemon.state, feeder.accepted, clean)
        assert any("different: masks" in problem for problem in problems)
