"""kill -9 at any moment loses nothing, doubles nothing, and changes no bit of what is learned."""

import random
import shutil
import time

import numpy as np
import pytest
from daemon_process import DaemonProcess, ask, until, what_was_learned
from digits import draw

from storage.verification import verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

STREAM = "AAAAABBBBABCCCCACBADDDDDABCD" * 5
KILLS, SEED = 20, 20_260_101
STREAM_SECONDS = 1200
"""Patience with all of STREAM: whoever learns gives way to all other work of the machine."""
SHORTEST_LIFE = 0.8
"""Seconds after its first answer in which a daemon is killed at the latest, or longer on a slow machine."""


def stream_batch(turn):
    """Most are 64 rows of one task; some are small, have no labels, or straddle two tasks."""
    task, following = (ord(letter) for letter in (STREAM[turn], (STREAM + "A")[turn + 1]))
    batch = draw(task, turn, rows=16 if turn % 7 == 3 else 64)
    if task != following and turn % 2:
        other = draw(following, turn)
        batch = {key: np.concatenate([batch[key][:32], other[key][:32]]) for key in batch}
    if turn % 11 == 5:
        del batch["y"]
    return batch


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The stream, in order."""
    writer = DaemonProcess(tmp_path_factory.mktemp("files"))
    return [writer.drop(f"{turn:03}", **stream_batch(turn)) for turn in range(len(STREAM))]


def put(file, folder):
    temporary = folder / f".{file.name}.tmp"
    shutil.copy2(file, temporary)  # with its time, which orders it
    temporary.rename(folder / file.name)


@pytest.fixture(scope="module")
def uninterrupted(files, tmp_path_factory):
    """What one life learns from the files, the seconds until it answers, and those of one life among KILLS."""
    with DaemonProcess(tmp_path_factory.mktemp("uninterrupted")) as daemon:
        for file in files:
            put(file, daemon.watch)
        launched = time.monotonic()
        answers = daemon.start() and time.monotonic()
        daemon.wait(STREAM_SECONDS)
        share = (time.monotonic() - answers) / KILLS
        assert daemon.stop() == 0
        return what_was_learned(daemon.state), answers - launched, max(SHORTEST_LIFE, 2 * share)


def live_and_die(daemon, chance, start_seconds, busy_seconds):
    """One life: killed while it starts, or while it learns. Returns what was going on, in words."""
    daemon.launch()
    if chance.random() < 0.2:
        delay = chance.uniform(0, start_seconds)
        time.sleep(delay)  # the moment is the test
        daemon.kill()
        return f"{delay:.2f} s after launch"
    until(daemon.answers)
    delay = chance.uniform(0, busy_seconds)
    time.sleep(delay)
    daemon.kill()
    states = dict(ask(daemon.state, "SELECT state, count(*) FROM batch GROUP BY state"))
    return f"{delay:.2f} s after its first answer, with {states}"


def test_twenty_kills_lose_and_double_nothing_and_change_no_bit(files, uninterrupted, tmp_path):
    chance = random.Random(SEED)
    expected, *seconds = uninterrupted
    deaths = []
    with DaemonProcess(tmp_path) as daemon:
        for life in range(KILLS):
            for file in files[life * len(files) // KILLS : (life + 1) * len(files) // KILLS]:
                put(file, daemon.watch)
            deaths.append(live_and_die(daemon, chance, *seconds))
            print(f"seed {SEED}, life {life}: killed {deaths[-1]}")  # noqa: T201 - shown when the test fails
        daemon.start().wait(STREAM_SECONDS)
        assert daemon.stop() == 0
        assert any("'training'" in death for death in deaths), "no kill came while a batch was trained"

        assert ask(daemon.state, "PRAGMA integrity_check") == [("ok",)]
        assert verify(daemon.state / "supsup.db", daemon.state / "spool") == []
        learned = what_was_learned(daemon.state)
        assert [name for _, name, *_ in learned["ledger"]] == [file.name for file in files]  # each once, in order
        assert not list((daemon.state / "spool").iterdir()) or any(row[3] == "unsure" for row in learned["ledger"])
        for part, value in expected.items():
            assert learned[part] == value, part
