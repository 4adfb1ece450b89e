"""One process for one state directory."""

import os
import stat
import subprocess
import sys

import pytest

from storage.lock import StateLock, StateLocked

TRY = """
import sys
from pathlib import Path
from storage.lock import StateLock, StateLocked
try:
    StateLock.acquire(Path(sys.argv[1]))
except StateLocked as error:
    sys.exit(str(error))
"""
HOLD = TRY + "print('held', flush=True)\nsys.stdin.read()\n"


def try_elsewhere(state):
    return subprocess.run([sys.executable, "-c", TRY, state], capture_output=True, text=True, timeout=30)


def test_a_second_process_is_refused_and_told_who_holds_the_lock(tmp_path):
    with StateLock.acquire(tmp_path):
        second = try_elsewhere(tmp_path)
    assert second.returncode == 1
    assert second.stderr.strip() == f"{tmp_path} is used by another supsupd (pid {os.getpid()})"


def test_a_released_lock_is_free(tmp_path):
    lock = StateLock.acquire(tmp_path)
    lock.release()
    lock.release()
    assert try_elsewhere(tmp_path).returncode == 0


def test_the_lock_dies_with_its_process(tmp_path):
    command = [sys.executable, "-c", HOLD, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StateLocked, match=f"pid {holder.pid}"):
            StateLock.acquire(tmp_path)
        holder.kill()
        holder.wait(timeout=30)
    with StateLock.acquire(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_second_lock_in_the_same_process_is_refused_too(tmp_path):
    with StateLock.acquire(tmp_path), pytest.raises(StateLocked):
        StateLock.acquire(tmp_path)


def test_a_refused_process_changes_nothing(tmp_path):
    with StateLock.acquire(tmp_path):
        before = (tmp_path / "lock").read_text()
        try_elsewhere(tmp_path)
        assert (tmp_path / "lock").read_text() == before
        assert try_elsewhere(tmp_path).returncode == 1


def test_the_directory_and_the_file_are_private(tmp_path):
    state = tmp_path / "new"
    with StateLock.acquire(state):
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        assert stat.S_IMODE((state / "lock").stat().st_mode) == 0o600


def test_a_symbolic_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        StateLock.acquire(tmp_path)
    assert not (tmp_path / "elsewhere").exists()
