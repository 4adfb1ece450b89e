"""Folders for work that may be killed. Whoever works in one holds a lock on it: those of the dead can be told."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".supsupd-"


@contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """A private folder in `parent` that goes away with all that is in it, as do those left there. Raises OSError."""
    if not parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(parent))
    remove_abandoned(parent)
    folder, descriptor = _made(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def remove_abandoned(parent: Path) -> None:
    """Removes what a killed process left in `parent`, if it is the user's own. What cannot be removed stays."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            descriptor = _opened(folder)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def _made(parent: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor that holds it; another one where somebody took it for abandoned first."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        with suppress(FileNotFoundError):
            descriptor = _opened(folder)
            with suppress(OSError):  # a file system without locks, where nobody else gets one either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.exists():
                return folder, descriptor
            os.close(descriptor)


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
