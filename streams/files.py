"""Reading a file that someone else may still be writing, or may have put there to trap us."""

import contextlib
import errno
import fcntl
import os
import signal
import stat
from collections.abc import Iterator

from streams.batch import BatchRejected

UNREADABLE = "unreadable"
_GONE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ESTALE))  # or something else in place
_SHORT = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN))
_PART_OF_THE_WAY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class StillChanging(Exception):
    """The file is open for writing, has changed, or has gone."""


def fingerprint(seen: os.stat_result) -> str:
    """Equal for two looks at a path exactly when nothing has happened to its file between them.

    Without the numbers of device and inode: they change when a file system is mounted again, and on some at any time;
    what is renamed over the file has another ctime.
    """
    return f"{seen.st_size}:{seen.st_mtime_ns}:{seen.st_ctime_ns}"


@contextlib.contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    """A descriptor of an absolute path of any length, closed at the end. No link is followed, in no part of the path:
    who may write to a folder on the way can't lead us to what is theirs not to read.

    Raises OSError, ENOTDIR or ELOOP for a link.
    """
    *folders, last = path.strip("/").split("/")
    fd = os.open("/", _PART_OF_THE_WAY)
    try:
        for folder in folders:
            fd = _step(fd, folder, _PART_OF_THE_WAY)
        fd = _step(fd, last or ".", flags | os.O_NOFOLLOW | os.O_CLOEXEC)
        yield fd
    finally:
        os.close(fd)


def folder_opened(path: str) -> contextlib.AbstractContextManager[int]:
    """As `opened`, to list the folder."""
    return opened(path, os.O_RDONLY | os.O_DIRECTORY)


def find_link(path: str) -> str | None:
    """The first part of an absolute path that is a symbolic link, as a path; None where there is none."""
    parts = path.strip("/").split("/")
    for end in range(1, len(parts) + 1):
        with contextlib.suppress(OSError), opened("/" + "/".join(parts[:end]), os.O_PATH) as fd:
            if stat.S_ISLNK(os.fstat(fd).st_mode):
                return "/" + "/".join(parts[:end])
    return None


def _step(fd: int, name: str, flags: int) -> int:
    """Opens `name` in the folder `fd`, which is closed then."""
    found = os.open(name, flags, dir_fd=fd)
    os.close(fd)
    return found


def read_file(path: str, expected: str, max_bytes: int, leases: bool = True) -> bytes:
    """The bytes of the regular file that was seen with the fingerprint `expected`.

    leases: the system knows who has the file open, as it does on a local file system.
    Raises StillChanging, or BatchRejected too_large or unreadable. Never blocks and follows no link.
    """
    try:
        with opened(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY) as fd:
            size = _check_still(fd, expected, leases)
            if size > max_bytes:
                raise BatchRejected("too_large", f"{size} bytes, at most {max_bytes} expected")
            data = _read_all(fd, size)
            _check_still(fd, expected, leases)
    except OSError as error:
        raise (unreadable(error) or StillChanging()) from error
    if len(data) != size:
        raise StillChanging
    return data


def unreadable(error: OSError) -> BatchRejected | None:
    """A rejection where the file is to blame; None where a later look may fare better (gone, no free fd)."""
    if error.errno is None or error.errno in _GONE | _SHORT:
        return None
    return BatchRejected(UNREADABLE, f"{errno.errorcode[error.errno]}, expected what the daemon may read")


def is_gone(error: OSError) -> bool:
    """Whether what was seen is no longer there, or something else is in its place."""
    return error.errno in _GONE


def _read_all(fd: int, size: int) -> bytes:
    """Up to `size` bytes, and one more where there is more: one call for all but huge files."""
    data = os.read(fd, size + 1)
    if len(data) >= size:
        return data
    parts, left = [data], size + 1 - len(data)
    while part := os.read(fd, left):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _check_still(fd: int, expected: str, leases: bool) -> int:
    """The size of the file."""
    now = os.fstat(fd)
    if not stat.S_ISREG(now.st_mode) or fingerprint(now) != expected or (leases and _has_writer(fd)):
        raise StillChanging
    return now.st_size


def _has_writer(fd: int) -> bool:
    """Whether anyone has the file open for writing, as far as the system tells us.

    Linux grants a read lease only on a file without writers. It may refuse for other reasons (another
    owner); then only the quiet time speaks.
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
