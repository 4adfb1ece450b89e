"""Reading a file that someone else may still be writing, or may have put there to trap us."""

import contextlib
import errno
import fcntl
import os
import signal
import stat

from streams.batch import BatchRejected


class StillChanging(Exception):
    """The file is open for writing, has changed, or has gone."""


def fingerprint(seen: os.stat_result) -> str:
    """Equal for two looks at a file exactly when nothing has happened to it between them."""
    return f"{seen.st_dev}:{seen.st_ino}:{seen.st_size}:{seen.st_mtime_ns}:{seen.st_ctime_ns}"


def read_file(path: str, expected: str, max_bytes: int) -> bytes:
    """The bytes of the regular file that was seen with the fingerprint `expected`.

    Raises StillChanging, or BatchRejected too_large or unreadable. Never blocks and follows no link.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        with os.fdopen(fd, "rb") as file:
            _check_still(fd, expected)
            size = os.fstat(fd).st_size
            if size > max_bytes:
                raise BatchRejected("too_large", f"{size} bytes, at most {max_bytes} expected")
            data = file.read(size + 1)
            _check_still(fd, expected)
    except OSError as error:
        raise (unreadable(error) or StillChanging()) from error
    if len(data) != size:
        raise StillChanging
    return data


def unreadable(error: OSError) -> BatchRejected | None:
    """A rejection where the file is to blame; None where a later look may fare better (gone, no free fd)."""
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EIO):
        return None
    return BatchRejected("unreadable", f"{errno.errorcode[error.errno]}, expected what the daemon may read")


def _check_still(fd: int, expected: str) -> None:
    now = os.fstat(fd)
    if not stat.S_ISREG(now.st_mode) or fingerprint(now) != expected or _has_writer(fd):
        raise StillChanging


def _has_writer(fd: int) -> bool:
    """Whether anyone has the file open for writing, as far as the system tells us.

    Linux grants a read lease only on a file without writers. It may refuse for other reasons (another
    owner, a network file system); then only the quiet time speaks.
    """
    # The kernel signals us when a writer comes meanwhile; the default SIGIO would end the process.
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    with contextlib.suppress(OSError):  # the kernel may have taken it back already
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
