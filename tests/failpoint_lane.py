"""One run through all failpoints: as many lives as it takes until each has fired, and what is wrong afterwards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daemon_process import what_was_learned
from feeding import drive
from forked_daemon import ForkedDaemon, Nursery
from oracle import violations

from storage.failpoints import POINTS

ACTIONS = ("kill", "eio", "enospc")
PORTIONS, MOST_PORTIONS = 3, 16
STARTING = ("start.upgraded", "start.released", "start.loaded", "spool.sync_folder", "spool.remove")
"""Where a start may come by, which then refuses."""
SYNCS = ("spool.sync", "spool.sync_folder")
EXIT_OS, EXIT_IO, KILLED = 71, 74, -9


class Uninterrupted:
    """What is learned of the first portions when nothing happens; each number of them is only learned once."""

    def __init__(self, nursery: Nursery, folder: Path):
        self._nursery, self._folder = nursery, folder
        self._known: dict[int, Mapping[str, Any]] = {}

    def learned(self, portions):
        if portions not in self._known:
            with ForkedDaemon(self._nursery, self._folder / str(portions)) as daemon:
                feeder, _ = drive(daemon, portions)
                status, code = feeder.end()
                assert (code, feeder.deaths) == (0, [])
                assert violations(daemon.state, feeder.accepted, status=status, log=daemon.log) == []
                self._known[portions] = what_was_learned(daemon.state)
        return self._known[portions]


def survive(nursery, folder, action, nth, uninterrupted) -> tuple[int, list[str]]:
    """Arms every point that has not fired in each life; the number of lives, and what is wrong in the end."""

    def arm(fired):
        return ",".join(f"{point}:{nth}:{action}" for point in POINTS if point not in fired)

    with ForkedDaemon(nursery, folder) as daemon:
        feeder, portions = drive(daemon, PORTIONS, arm, until_fired=POINTS, most=MOST_PORTIONS)
        _, code = feeder.end()
        problems = [f"{point} was not reached" for point in POINTS if point not in feeder.fired()]
        problems += [f"ended with {code}"] * (code != 0)
        problems += [
            f"ended with {code} after {last}" for code, last in feeder.deaths if not _explained(code, last, action)
        ]
        status, code = feeder.end()  # of one more life: bytes that could not be removed go at a start
        problems += [f"ended with {code}"] * (code != 0)
        clean = uninterrupted.learned(portions)
        problems += violations(daemon.state, feeder.accepted, clean, status=status, log=daemon.log)
        return len(feeder.deaths) + 1, problems


def _explained(code, last_fired, action):
    """Whether a daemon may end so."""
    if action == "kill":
        return code == KILLED
    if action == "eio" and last_fired in SYNCS and code == EXIT_IO:
        return True
    return last_fired in STARTING and code == EXIT_OS
