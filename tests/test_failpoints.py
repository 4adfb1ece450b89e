"""Killed at every marked place, or refused there by the system: nothing is lost, doubled, or learned differently."""

import pytest
from failpoint_lane import ACTIONS, Uninterrupted, survive
from forked_daemon import Nursery

from storage.failpoints import POINTS, FailpointsInvalid, parse


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def uninterrupted(nursery, tmp_path_factory):
    return Uninterrupted(nursery, tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("action", ACTIONS)
def test_every_point_is_reached_and_survived(action, nursery, uninterrupted, tmp_path):
    lives, problems = survive(nursery, tmp_path, action, 1, uninterrupted)
    assert problems == []
    assert lives >= (len(POINTS) if action == "kill" else 2)


@pytest.mark.parametrize("text", ["nowhere:1:kill", "spool.sync:0:kill", "spool.sync:1:burn", "spool.sync", ":"])
def test_what_is_no_failpoint_is_refused(text):
    with pytest.raises(FailpointsInvalid, match="expected name:nth:kill"):
        parse(text)
