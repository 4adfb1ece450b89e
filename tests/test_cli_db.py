"""`supsupd db`: one line and an exit code for everything that can go wrong, and what was asked for otherwise."""

import sqlite3

import pytest
from daemon_process import DaemonProcess, edit
from digits import draw
from stores import postgresql_target
from test_cli import one_line, run

from storage import packing
from storage.lock import StateLock
from storage.spool import Spool


def db(*command, **environment):
    return run("supsupd", "db", *command, **environment)


def learned(state):
    with sqlite3.connect(f"file:{state / 'supsup.db'}?mode=ro", uri=True) as connection:
        return connection.execute("SELECT sha256 FROM mask_version ORDER BY task_id, version").fetchall()


def test_the_database_is_upgraded_and_verified(tmp_path):
    state = tmp_path / "state"
    missing = db("verify", "--state", state)
    assert missing.returncode == 66
    assert "there is no database at" in one_line(missing)
    assert not state.exists()
    assert db("upgrade", "--state", state).stdout == "upgraded: 0001, 0002, 0003, 0004, 0005, 0006\n"
    assert db("upgrade", SUPSUPD_STATE=str(state)).stdout == "already up to date\n"
    assert db("verify", "--state", state).stdout == "ok\n"
    (state / "supsup.db").write_bytes(b"not a database" * 1000)
    broken = db("verify", "--state", state)
    assert broken.returncode == 65
    assert "not a database" in one_line(broken)


def test_a_backup_without_a_place_and_a_restore_over_something_say_why(tmp_path):
    state, file = tmp_path / "state", tmp_path / "b.tar"
    db("upgrade", "--state", state)
    nowhere = db("backup", tmp_path / "none" / "b.tar", "--state", state)
    assert (nowhere.returncode, one_line(nowhere)) == (66, f"{tmp_path / 'none'}: there is no such folder\n")
    folder = db("backup", tmp_path, "--state", state, "--force")
    assert (folder.returncode, one_line(folder)) == (1, f"{tmp_path}: it is a folder, expected a file to write\n")
    Spool(state / "spool").store({packing.sha256(b"x"): b"x"})
    assert db("backup", file, "--state", state).returncode == 0
    again = db("restore", file, "--state", state)
    assert (again.returncode, one_line(again)) == (1, f"{state / 'spool'}: is not empty; --force replaces it\n")


@pytest.mark.parametrize("command", ["upgrade", "downgrade", "restore x.tar", "prune --keep 1"])
def test_a_store_in_use_is_not_changed(tmp_path, command):
    with StateLock.acquire(tmp_path):
        result = db(*command.split(), "--state", tmp_path)
    assert result.returncode == 1
    assert "is used by another supsupd" in one_line(result)


def test_a_wrong_url_is_told_without_its_password(tmp_path):
    for url in ("mysql://user:s3cr3t@host/db", "postgresql://user:s3cr3t@[::bad/db"):
        result = db("verify", "--state", tmp_path, "--database", url)
        assert result.returncode == 78
        assert "s3cr3t" not in one_line(result)


def test_a_server_that_is_away_is_told(tmp_path):
    result = db("upgrade", "--state", tmp_path, "--database", "postgresql://user:s3cr3t@127.0.0.1:1/db")
    assert result.returncode == 1
    assert "s3cr3t" not in one_line(result)


def test_the_same_commands_look_after_postgresql(tmp_path):
    with postgresql_target() as url:
        given = {"SUPSUPD_DATABASE": url, "SUPSUPD_STATE": str(tmp_path / "state")}
        assert db("verify", **given).returncode == 66
        assert db("upgrade", **given).stdout == "upgraded: 0001, 0002, 0003, 0004, 0005, 0006\n"
        assert db("verify", **given).stdout == "ok\n"
        made = db("backup", tmp_path / "b.tar", **given)
        assert made.stdout.startswith("backed up schema 0006, 0 tasks,"), made.stderr
        assert db("downgrade", **given).stdout == "downgraded: 0006 to 0005\n"
        assert "revision 0006 is not applied" in db("verify", **given).stderr
        assert db("restore", tmp_path / "b.tar", **given).stdout.startswith("restored schema 0006")
        assert db("prune", "--keep", "3", **given).stdout == "removed 0 mask versions, 0 spooled files\n"
        assert db("verify", **given).stdout == "ok\n"


def test_a_daemon_does_not_start_on_a_damaged_database(tmp_path):
    state = tmp_path / "state"
    db("upgrade", "--state", state)
    (watched := tmp_path / "in").mkdir()
    content = bytearray((state / "supsup.db").read_bytes())
    content[4096:8192] = bytes(4096)
    (state / "supsup.db").write_bytes(content)
    result = run("supsupd", "start", "--state", state, "--watch", watched, "--socket", tmp_path / "s")
    assert result.returncode == 65
    assert "supsup.db is damaged: " in one_line(result)
    assert (state / "supsup.db").read_bytes() == content


@pytest.mark.slow
def test_what_a_daemon_learned_is_backed_up_beside_it_restored_verified_and_pruned(tmp_path):
    with DaemonProcess(tmp_path) as daemon:
        for turn in range(4):
            daemon.drop(f"{turn}", **draw(0, turn))
        daemon.start()
        assert daemon.cli("wait", "--timeout", "150").returncode == 0
        state = daemon.state
        assert db("verify", "--state", state).stdout.splitlines()[-1] == "ok"
        made = db("backup", tmp_path / "b.tar", "--state", state)
        assert made.returncode == 0, made.stderr
        assert "is not overwritten" in one_line(again := db("backup", tmp_path / "b.tar", "--state", state))
        assert again.returncode == 1
        assert daemon.stop() == 0
    masks = learned(state)
    refused = db("restore", tmp_path / "b.tar", "--state", state)
    assert (refused.returncode, "--force" in one_line(refused)) == (1, True)
    new = tmp_path / "new"
    assert db("restore", tmp_path / "b.tar", "--state", new).returncode == 0
    assert learned(new) == masks
    assert db("verify", "--state", new).stdout == "ok\n"
    Spool(new / "spool").store({packing.sha256(b"x"): b"x"})
    assert db("verify", "--state", new).stdout == f"stray: spool/{packing.sha256(b'x')}\nok\n"
    told = db("prune", "--keep", "1", "--dry-run", "--state", new).stdout
    assert learned(new) == masks
    assert db("prune", "--keep", "1", "--state", new).stdout == told.replace("would remove", "removed")
    assert learned(new) == masks[-1:]
    edit(new, "UPDATE network SET seed = seed + 1")
    broken = db("verify", "--state", new)
    assert (broken.returncode, "network: seed" in one_line(broken)) == (65, True)
