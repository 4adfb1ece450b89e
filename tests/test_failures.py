"""Whatever fails around a daemon, it says so, loses and doubles nothing, and goes on by itself once that is mended."""

import os
import random
import signal
import time
from contextlib import ExitStack, suppress

import numpy as np
import pytest
import stores
from daemon_process import STOP_SECONDS, DaemonProcess, ask, until, what_was_learned
from digits import draw, held_out
from failures import (
    begun_request,
    codes,
    config_of,
    counts,
    cut,
    decided,
    decoder_of_learning,
    decoders,
    learned,
    learning_held,
    locked,
    named,
    next_in_line,
    open_files,
    problems,
    put,
    resident_bytes,
    rows,
    said,
    strike,
)
from feeding import payload_of
from forked_daemon import ForkedDaemon, Nursery
from jumping_clock import JumpingClock

from storage.verification import verify

STREAM = "AAABBBACCCABCABBCAAC"
LIVES, SEED, BUSY_SECONDS = 5, 20_261_123, 0.4
YEARS = 10 * 365 * 86_400


@pytest.fixture(scope="module")
def clock(tmp_path_factory):
    return JumpingClock(tmp_path_factory.mktemp("clock"))


@pytest.fixture(scope="module")
def nursery(clock):
    with clock.worn():
        nursery = Nursery()
    with nursery:
        yield nursery


@pytest.fixture(scope="module")
def uninterrupted(nursery, tmp_path_factory):
    """What is learned of STREAM when nothing fails."""
    with ForkedDaemon(nursery, tmp_path_factory.mktemp("uninterrupted")) as daemon:
        put(daemon, STREAM)
        daemon.start().wait()
        assert daemon.stop() == 0
        return what_was_learned(daemon.state)


# -- its end -----------------------------------------------------------------------------------------------------------


def test_sigterm_at_any_moment_of_a_busy_stream_is_an_orderly_end(nursery, uninterrupted, tmp_path):
    chance = random.Random(SEED)
    with ForkedDaemon(nursery, tmp_path) as daemon:
        for life in range(LIVES):
            start, end = (len(STREAM) * turn // LIVES for turn in (life, life + 1))
            put(daemon, STREAM[start:end], start)
            daemon.start()
            time.sleep(chance.uniform(0, BUSY_SECONDS))  # the moment is the test
            assert daemon.stop() == 0
            assert not daemon.socket.exists()
            assert ask(daemon.state, "SELECT id FROM batch WHERE state = 'training' OR crashes > 0") == []
        daemon.start().wait()
        assert daemon.stop() == 0
        assert said(daemon) == []
        assert what_was_learned(daemon.state) == uninterrupted


def test_a_second_sigterm_ends_it_at_once_and_the_store_is_whole(nursery, uninterrupted, tmp_path):
    with ForkedDaemon(nursery, tmp_path) as daemon:
        put(daemon, STREAM[:4])
        daemon.start().wait()
        with learning_held(daemon):
            put(daemon, STREAM[4:], 4)
            until(lambda: counts(daemon.state).get("training"))
            daemon.process.send_signal(signal.SIGTERM)
            until(lambda: daemon.events("stopping"))
            assert daemon.stop() == 128 + signal.SIGTERM
        assert not daemon.events("stopped")
        assert verify(daemon.state / "supsup.db", daemon.state / "spool") == []
        daemon.start().wait()
        assert daemon.stop() == 0
        assert what_was_learned(daemon.state) == uninterrupted


@pytest.mark.slow
def test_sigterm_waits_for_a_request_in_progress_and_not_for_a_training_without_end(nursery, tmp_path):
    with ForkedDaemon(nursery, tmp_path) as daemon:
        put(daemon, "AAA")
        daemon.start().wait()
        with learning_held(daemon):
            put(daemon, "A", 3)
            until(lambda: counts(daemon.state).get("training"))
            with begun_request(daemon) as finish:
                daemon.process.send_signal(signal.SIGTERM)
                until(lambda: daemon.events("stopping"))
                assert finish() in (200, 503)
            assert daemon.process.wait(STOP_SECONDS) == 0
        assert daemon.events("stopped")[0]["unfinished"] == ["learn"]
        assert not daemon.socket.exists()
        assert ask(daemon.state, "SELECT id FROM batch WHERE state = 'training' OR crashes > 0") == []


# -- its store --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def with_store(request, nursery, tmp_path):
    """A daemon that has learned a little, over each kind of store, and what locks that."""
    with ExitStack() as stack:
        daemon = stack.enter_context(ForkedDaemon(nursery, tmp_path))
        if request.param == "postgresql":
            url = stack.enter_context(stores.postgresql_target())
            daemon.flags = ("--database", url)
            stack.callback(daemon.kill)  # before its schema goes
        daemon.store = daemon.state / "supsup.db" if request.param == "sqlite" else url
        yield daemon


def test_a_locked_store_is_told_and_all_goes_on_once_it_is_free(with_store, uninterrupted):
    daemon = with_store
    x, _ = held_out(0)
    put(daemon, STREAM[:4])
    daemon.start().wait()
    with locked(daemon.store):
        put(daemon, STREAM[4:], 4)
        who = until(lambda: problems(daemon))
        assert set(who.values()) == {"store_unavailable"}
        assert "store_unavailable" in daemon.cli("status").stdout
        assert daemon.client.predict(x[:4])
        assert len(daemon.client.batches()) == 4
    daemon.wait()
    assert problems(daemon) == {}
    told = {(line["who"], line["kind"]) for line in daemon.events("problem")}
    assert told == {(line["who"], line["kind"]) for line in daemon.events("problem_over")} >= set(who.items())
    assert daemon.stop() == 0
    assert learned(daemon.store) == uninterrupted


@pytest.mark.slow
def test_sigterm_while_the_store_is_locked_is_an_orderly_end(with_store, uninterrupted):
    daemon = with_store
    put(daemon, STREAM[:4])
    daemon.start().wait()
    with locked(daemon.store):
        put(daemon, STREAM[4:], 4)
        until(lambda: problems(daemon))
        assert daemon.stop() == 0
    daemon.start().wait()
    assert daemon.stop() == 0
    assert learned(daemon.store) == uninterrupted


def test_postgresql_connections_that_are_cut_amid_learning_cost_nothing(nursery, uninterrupted, tmp_path):
    with stores.postgresql_target() as url, ForkedDaemon(nursery, tmp_path) as daemon:
        daemon.flags = ("--database", named(url, tmp_path.name))
        daemon.start()
        for turn, letter in enumerate(STREAM):
            put(daemon, letter, turn)
            if turn % 3 == 2:
                until(lambda turn=turn: decided(url) >= turn)
                cut(tmp_path.name)
        daemon.wait()
        assert daemon.events("store_connection_lost") or daemon.events("problem")
        assert problems(daemon) == {}
        assert daemon.stop() == 0
        assert learned(url) == uninterrupted


@pytest.mark.slow
def test_a_postgresql_store_is_one_daemons_and_who_lost_it_ends(nursery, tmp_path):
    with stores.postgresql_target() as url, ForkedDaemon(nursery, tmp_path / "first") as first:
        name = tmp_path.name
        first.flags = ("--database", named(url, name))
        put(first, "AAA")
        first.start().wait()
        with DaemonProcess(tmp_path / "second", "--database", url) as second:
            code, (line,) = second.refusal()
            assert (code, "is used by another supsupd" in line) == (75, True)
        assert first.client.status()["problems"] == []
        with next_in_line(url) as took:
            cut(name)
            took.wait(60)
            put(first, "A", 3)
            assert first.process.wait(60) == 75
        assert {line["kind"] for line in first.events("problem")} == {"store_taken"}
        (line,) = said(first)
        assert "is used by another supsupd" in line


# -- a folder that is another one ------------------------------------------------------------------------------------


def test_a_link_in_place_of_the_watched_folder_is_told_and_what_lies_there_is_not_settled(nursery, tmp_path):
    with ForkedDaemon(nursery, tmp_path) as daemon:
        put(daemon, "A")
        daemon.start().wait()
        away, secret = tmp_path / "away", tmp_path / "secret"
        secret.mkdir()
        np.savez(secret / "secret.npz", **draw(0, 7))
        daemon.watch.rename(away)
        daemon.watch.symlink_to(secret)
        with pytest.raises(TimeoutError, match="is a symbolic link now, expected the folder"):
            daemon.client.wait(3)
        daemon.watch.unlink()
        away.rename(daemon.watch)
        put(daemon, "A", 1)
        daemon.wait()
        assert [row["name"] for row in daemon.client.batches()] == ["00-A.npz", "01-A.npz"]
        assert daemon.client.status()["problems"] == []


# -- the clock ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def jumping(clock):
    if not clock.is_built:
        pytest.skip("NO cc: the clock that jumps is a few lines of C")
    return clock


def test_a_clock_that_jumps_by_years_changes_nothing(jumping, nursery, uninterrupted, tmp_path):
    with ForkedDaemon(nursery, tmp_path) as daemon:
        daemon.start()
        for turn, letter in enumerate(STREAM):
            put(daemon, letter, turn)
            until(lambda name=f"{turn:02}-{letter}": daemon.row(name))
            jumping.jump((YEARS, -2 * YEARS, YEARS, 3600, -3600)[turn % 5])
        daemon.wait()
        assert daemon.stop() == 0
        years = ask(daemon.state, "SELECT DISTINCT substr(created_at, 1, 4) FROM batch")
        assert len(years) == 3, "the clock did not jump"
        assert what_was_learned(daemon.state) == uninterrupted


@pytest.mark.parametrize("year", [1901, 1969, 2263, 9926, 30_000])
def test_a_clock_in_any_year_breaks_nothing_then_or_later(jumping, nursery, tmp_path, year):
    ahead = (year - 2026) * 365 * 86_400
    with ForkedDaemon(nursery, tmp_path) as daemon:
        put(daemon, "AA")
        daemon.start().wait()
        jumping.jump(ahead)
        put(daemon, "A", 2)
        (daemon.watch / "no.txt").write_text("no batch")
        until(lambda: ask(daemon.state, "SELECT 1 FROM batch WHERE name = 'no.txt'"))
        until(lambda: len(ask(daemon.state, "SELECT 1 FROM batch WHERE state = 'committed'")) == 3)
        assert daemon.client.predict(held_out(0)[0][:8])
        jumping.jump(-ahead)
        put(daemon, "A", 3)
        daemon.wait()
        assert daemon.client.status()["problems"] == []
        assert daemon.stop() == 0
        found = ask(daemon.state, "SELECT state FROM batch WHERE code IS NULL")
        assert [state for (state,) in found] == ["committed"] * 4
        assert verify(daemon.state / "supsup.db", daemon.state / "spool") == []


@pytest.mark.parametrize("seconds", [YEARS, -YEARS])
def test_a_jump_of_the_clock_finishes_no_file_and_forgets_no_cap(jumping, nursery, tmp_path, seconds):
    config = config_of(
        intake="settle_seconds = 0.1\nincomplete_seconds = 600", more="[recognition]\nmax_new_per_hour = 1"
    )
    whole = tmp_path / "whole.npz"
    np.savez(whole, **draw(0, 99))
    payload = whole.read_bytes()
    with ForkedDaemon(nursery, tmp_path, config) as daemon:
        put(daemon, "AAA")
        daemon.start().wait()
        growing = daemon.watch / "growing.npz"
        growing.write_bytes(payload[: len(payload) // 2])
        daemon.client.scan()
        until(lambda: daemon.client.status()["sources"][0]["pending"])
        jumping.jump(seconds)
        put(daemon, "BBB", 3)
        until(lambda: daemon.row("05-B"))  # a pass after the jump has seen both
        assert daemon.row("growing") is None
        with growing.open("ab") as file:
            file.write(payload[len(payload) // 2 :])
        os.utime(growing, (jumping.now(), jumping.now()))
        daemon.wait()
        jumping.jump(-seconds)
        found = {row["name"]: row["state"] for row in daemon.client.batches()}
        assert found.pop("growing.npz") == "committed"
        assert list(found.values()) == ["committed"] * 3 + ["unsure"] * 3
        assert "at most 1 may be" in daemon.row("05-B")["reason"]


# -- bytes that are not what they were ---------------------------------------------------------------------------------


def test_damaged_bytes_of_a_waiting_batch_are_rejected_and_may_come_again(nursery, tmp_path):
    with ForkedDaemon(nursery, tmp_path) as daemon:
        spool = daemon.state / "spool"

        def damage(name):
            path = spool / daemon.row(name)["sha256"]
            payload = bytearray(path.read_bytes())
            payload[len(payload) // 2] ^= 1
            path.write_bytes(payload)

        put(daemon, "AAA")
        daemon.start().wait()
        with learning_held(daemon):
            put(daemon, "AAAA", 3)
            until(lambda: daemon.client.status()["queue"] == 4)
            damage("04-A")
            (spool / daemon.row("05-A")["sha256"]).unlink()
        daemon.wait()
        assert codes(daemon) == {"04-A.npz": "spool_corrupt", "05-A.npz": "spool_corrupt"}
        assert {daemon.row(name)["state"] for name in ("03-A", "06-A")} == {"committed"}

        (daemon.watch / "04-A.npz").rename(daemon.watch / "again.npz")
        os.utime(daemon.watch / "05-A.npz")
        daemon.wait()
        assert daemon.row("again")["state"] == "committed"
        assert [row["state"] for row in rows(daemon, "05-A.npz")] == ["quarantined", "committed"]

        with learning_held(daemon):
            put(daemon, "AA", 7)
            until(lambda: daemon.client.status()["queue"] == 2)
            daemon.kill()
            path = spool / ask(daemon.state, "SELECT sha256 FROM batch WHERE name = '08-A.npz'")[0][0]
            path.write_bytes(path.read_bytes()[:-1])
        for expected in (["quarantined"], ["quarantined", "committed"]):
            daemon.start().wait()
            assert [row["state"] for row in rows(daemon, "08-A.npz")] == expected
            assert daemon.stop() == 0
        assert verify(daemon.state / "supsup.db", spool) == []


def test_a_damaged_database_refuses_the_start_in_one_line_and_stays_as_it_is(nursery, tmp_path):
    with ForkedDaemon(nursery, tmp_path) as daemon:
        put(daemon, "AA")
        daemon.start().wait()
        assert daemon.stop() == 0
        file = daemon.state / "supsup.db"
        damaged = bytearray(file.read_bytes())
        damaged[4096:8192] = bytes(4096)
        file.write_bytes(damaged)
        code, (line,) = daemon.refusal()
        assert code == 65
        assert line.startswith(f"supsupd: {file} is damaged: ")
        assert file.read_bytes() == damaged


# -- decoders that die -------------------------------------------------------------------------------------------------

SLOW_TABLE = "a,y\n" + "1.25,3\n" * 800_000


@pytest.mark.slow
def test_what_kills_decoders_is_rejected_with_its_bytes_and_the_next_batch_is_learned(nursery, tmp_path):
    config = config_of(intake="decode_seconds = 2\ndecode_memory_bytes = 33554432")
    with ForkedDaemon(nursery, tmp_path, config) as daemon:
        put(daemon, "AAA")
        daemon.start().wait()
        for pid in decoders(daemon):
            assert [path.partition(":")[0] for path in open_files(pid)] == ["/dev/null"] * 3 + ["socket"]

        expected = {"segv.csv": "worker_died", "kill.csv": "oom", "slow.csv": "timeout", "hog.npz": "oom"}
        for name, number in (("segv", signal.SIGSEGV), ("kill", signal.SIGKILL), ("slow", signal.SIGSTOP)):
            (daemon.watch / f"{name}.csv").write_text(SLOW_TABLE + f"{len(name)},0\n")
            strike(daemon, number)
        daemon.drop("hog", x=np.zeros((180_000, 64), np.float32))
        put(daemon, "A", 3)
        daemon.wait()
        assert codes(daemon) == expected
        assert all((daemon.state / "spool" / row["sha256"]).exists() for row in daemon.client.rejected())
        assert daemon.row("03-A")["state"] == "committed"


def test_a_batch_that_kills_the_decoders_of_learning_is_rejected_there(nursery, tmp_path):
    with ForkedDaemon(nursery, tmp_path) as daemon:
        put(daemon, "AAA")
        daemon.start().wait()
        other = decoders(daemon) - {decoder_of_learning(daemon)}
        (daemon.watch / "segv.csv").write_text(SLOW_TABLE)
        strike(daemon, signal.SIGSEGV, spared=other)
        put(daemon, "A", 3)
        daemon.wait()
        (row,) = daemon.client.rejected()
        assert (row["name"], row["code"]) == ("segv.csv", "worker_died")
        assert (daemon.state / "spool" / row["sha256"]).exists()
        assert row["batch"] in {line["batch"] for line in daemon.events("batch_staged")}  # intake could read it
        assert daemon.row("03-A")["state"] == "committed"


def test_a_source_whose_batch_is_slow_to_decode_keeps_neither_others_nor_learning_waiting(nursery, tmp_path):
    with ForkedDaemon(nursery, tmp_path) as daemon:
        put(daemon, "AAA")
        daemon.start().wait()
        (stopped,) = decoders(daemon) - {decoder_of_learning(daemon)}
        os.kill(stopped, signal.SIGSTOP)
        try:
            put(daemon, "A", 3)
            until(lambda: any("memfd:batch" in path for path in open_files(daemon.process.pid)))
            daemon.client.submit("sent.npz", payload_of("A", 99))
            until(lambda: daemon.row("sent")["state"] not in ("staged", "training"))
            assert daemon.row("03-A") is None
        finally:
            with suppress(ProcessLookupError):  # its time was over
                os.kill(stopped, signal.SIGCONT)
        daemon.wait()
        assert daemon.row("03-A")["state"] == "committed"


# -- more than it can learn --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_comes_while_nothing_is_learned_waits_where_it_is(nursery, tmp_path):
    queue, offered = 32, 1000
    with ForkedDaemon(nursery, tmp_path, config_of(intake=f"max_queue = {queue}")) as daemon:
        put(daemon, "AAA")
        daemon.start().wait()
        x, _ = held_out(0)
        before = resident_bytes(daemon.process.pid)
        with learning_held(daemon):
            for turn in range(offered):
                daemon.drop(f"offered/{turn:04}", x=x[:4] + np.float32(turn / 1e4))
            until(lambda: daemon.client.status()["queue"] >= queue // 2)  # the rest is for others
            for _ in range(20):
                assert counts(daemon.state)["staged"] <= queue
                assert daemon.client.predict(x[:4])
                assert daemon.client.status()["settled"] is False
            assert len(list((daemon.state / "spool").iterdir())) <= queue + 1
            assert resident_bytes(daemon.process.pid) - before < 64 << 20
        daemon.wait()
        assert counts(daemon.state) == {"committed": 3, "scored": offered}
        assert not any((daemon.state / "spool").iterdir())
