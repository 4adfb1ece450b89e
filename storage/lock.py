"""One daemon for one state directory: an advisory lock that the kernel drops with the process."""

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self


class StateLocked(RuntimeError):
    """Another process holds the state directory."""


class StateLock:
    """The lock on a state directory, held until `release` or the end of the process.

    The file is never removed: a lock on a file that someone else just unlinked would protect nothing.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    @classmethod
    def acquire(cls, state_dir: Path) -> Self:
        """Take the lock `state_dir`/lock, creating the directory (0700) and the file (0600) where needed.

        Raises StateLocked when another process (or another lock object of this one) has it.
        """
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(state_dir / "lock", flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise StateLocked(f"{state_dir} is used by another supsupd (pid {owner})") from None
        except OSError:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def release(self) -> None:
        """Give the lock back. A second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
