"""Folders for work: none is left, none is taken from whoever works in it."""

import subprocess
import sys

import pytest
from daemon_process import DaemonProcess

from storage.work_folder import PREFIX, remove_abandoned, work_folder

WORK = """
import sys
from pathlib import Path
from storage.work_folder import work_folder
with work_folder(Path(sys.argv[1])) as folder:
    (folder / "copy").write_text("half")
    print(folder, flush=True)
    sys.stdin.read()
"""


def names(folder):
    return [path.name for path in folder.iterdir()]


@pytest.fixture
def at_work(tmp_path):
    """A process that works in a folder of tmp_path until its input ends."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WORK, tmp_path], **pipes) as process:
        process.stdout.readline()
        yield process
        process.kill()


def test_a_folder_is_private_and_goes_with_its_work(tmp_path):
    with work_folder(tmp_path) as folder:
        (folder / "below").mkdir()
        assert (folder.stat().st_mode & 0o777, names(tmp_path)) == (0o700, [folder.name])
    assert names(tmp_path) == []


def test_what_a_killed_process_left_goes_with_the_next_work(tmp_path, at_work):
    at_work.kill()
    at_work.wait()
    assert len(names(tmp_path)) == 1
    with work_folder(tmp_path) as folder:
        assert names(tmp_path) == [folder.name]


def test_a_folder_at_work_is_left_alone(tmp_path, at_work):
    remove_abandoned(tmp_path)
    with work_folder(tmp_path):
        assert len(names(tmp_path)) == 2
    at_work.communicate()
    assert (at_work.returncode, names(tmp_path)) == (0, [])


def test_a_link_with_such_a_name_is_not_followed(tmp_path):
    target = tmp_path / "kept"
    target.mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    remove_abandoned(tmp_path)
    assert target.exists()


def test_work_in_no_folder_says_which(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"), work_folder(tmp_path / "none"):
        pass


def test_a_start_removes_what_killed_backups_left(tmp_path):
    with DaemonProcess(tmp_path) as daemon:
        left = [daemon.state / f"{PREFIX}1", daemon.state / "backup" / f"{PREFIX}2"]
        for folder in left:
            folder.mkdir(parents=True, mode=0o700)
        daemon.state.chmod(0o700)
        daemon.start()
        assert [folder.exists() for folder in left] == [False, False]
