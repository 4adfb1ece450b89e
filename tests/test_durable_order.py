"""Bytes synced, then named, then the name synced, then the row logged and synced, then acknowledged: in this order."""

import pytest
from daemon_process import BIN, DaemonProcess
from digits import draw
from order_lane import violations_of_life
from syscalls import order_violations, parse, require_strace, unsafe_moves
from traced_daemon import trace_command

SHA = "ab" * 32
TMP, FINAL = f"/s/spool/{SHA}.77.tmp", f"/s/spool/{SHA}"
STEPS = {
    "write": f'7 write(9<{TMP}>, "payload", 7) = 7',
    "sync": f"7 fsync(9<{TMP}>) = 0",
    "rename": f'7 rename("{TMP}", "{FINAL}") = 0',
    "sync the folder": "7 fsync(9</s/spool>) = 0",
    "log": f'7 pwrite64(5</s/supsup.db-wal>, "\\0\\1{SHA}npz", 4096, 56) = 4096',
    "sync the log": "7 fdatasync(5</s/supsup.db-wal>) = 0",
    "tell": '7 sendto(6<TCP:[127.0.0.1:1->127.0.0.1:2]>, "ACK 1", 5, 0, NULL, 0) = 5',
}


@pytest.fixture
def spool(tmp_path):
    return type(tmp_path)("/s/spool")


def found(steps, spool):
    return order_violations(parse(steps), spool, {SHA: "ACK 1"})


def test_the_right_order_has_no_violation(spool):
    assert found(STEPS.values(), spool) == []
    assert unsafe_moves(parse(STEPS.values()), spool) == (1, [])


@pytest.mark.parametrize("left_out", STEPS)
def test_a_step_that_is_missing_is_found(left_out, spool):
    steps = [line for name, line in STEPS.items() if name != left_out]
    assert (found(steps, spool) == []) == (left_out == "write")  # an empty payload has nothing to write


@pytest.mark.parametrize("first", list(STEPS)[1:])
def test_a_step_that_comes_too_early_is_found(first, spool):
    names = list(STEPS)
    place = names.index(first)
    names[place - 1], names[place] = names[place], names[place - 1]
    assert found([STEPS[name] for name in names], spool) != []


def test_a_sync_that_has_only_begun_is_none(spool):
    lines = list(STEPS.values())
    begun, ended = "7 fdatasync(5</s/supsup.db-wal> <unfinished ...>", "7 <... fdatasync resumed>) = 0"
    assert found([*lines[:5], begun, ended, STEPS["tell"].replace("7", "8", 1)], spool) == []
    early = [*lines[:5], begun, STEPS["tell"].replace("7", "8", 1), ended]
    assert found(early, spool) == ["abababab…: it was acknowledged before its row was durable"]


def test_a_sync_that_failed_is_none(spool):
    lines = [
        line.replace("= 0", "= -1 EIO (Input/output error)") if "fsync(9</s/spool>" in line else line
        for line in STEPS.values()
    ]
    assert found(lines, spool) == ["abababab…: its folder was not synced in time"]


def test_what_was_never_seen_is_a_violation(spool):
    assert order_violations([], spool, {SHA: None}) == ["abababab…: no row was logged"]


@pytest.mark.slow
@pytest.mark.parametrize("broker", ["nats", "redis"])
def test_a_daemon_promises_only_what_is_durable(broker, tmp_path):
    require_strace()
    count, problems = violations_of_life(tmp_path, 4, broker)
    assert count == 4 + 1 + 1 + 4 + 1
    assert problems == []


@pytest.mark.slow
def test_what_commands_write_is_durable_before_it_has_its_name(tmp_path):
    require_strace()
    with DaemonProcess(tmp_path / "home") as daemon:
        for turn in range(3):
            daemon.drop(f"{turn}", **draw(1, turn))
        daemon.start().wait()
        assert daemon.stop() == 0
        state, out = daemon.state, tmp_path / "out"
    out.mkdir()
    code, calls = trace_command(tmp_path, BIN / "supsupd", "db", "backup", out / "backup.tar", "--state", state)
    assert (code, unsafe_moves(calls, out)) == (0, (1, []))
