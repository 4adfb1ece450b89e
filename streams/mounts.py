"""Whether a folder lies on this machine alone, or others may write to it unseen."""

import contextlib
import re
from pathlib import Path

_REMOTE = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "coda", "9p", "virtiofs", "vboxsf", "prl_fs", "fuse"),
        *("beegfs", "ceph", "gfs2", "glusterfs", "gpfs", "lustre", "ocfs2", "orangefs", "pvfs2"),
    }
)
_OCTAL = re.compile(r"\\([0-7]{3})")


def remote_kind(folder: Path) -> str | None:
    """The kind of network or user-space file system that holds `folder` or is mounted below it; None: all local."""
    table = ""
    with contextlib.suppress(OSError):  # no /proc: nothing can be told
        table = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    return find_remote(str(folder.resolve()), table)


def find_remote(folder: str, table: str) -> str | None:
    """As `remote_kind`, by a `table` of mounts as in /proc/self/mountinfo; `folder` is absolute, without links."""
    holder, kind = "", ""
    below = []
    for line in table.splitlines():
        place, _, system = line.partition(" - ")
        point = _OCTAL.sub(lambda found: chr(int(found[1], 8)), place.split()[4])
        name = system.split()[0]
        if _is_below(folder, point) and len(point) >= len(holder):  # the last mount at a point covers the others
            holder, kind = point, name
        elif _is_below(point, folder):
            below.append(name)
    return next((name for name in [kind, *below] if _is_remote(name)), None)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _is_remote(kind: str) -> bool:
    return kind in _REMOTE or kind.startswith("fuse.")
