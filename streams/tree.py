"""One look at a whole watched folder: names and stats only, nothing is opened."""

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from streams.batch import BatchRejected
from streams.files import fingerprint, unreadable
from streams.images import IMAGE_SUFFIXES
from streams.names import is_temporary, natural_key, printable

_SPECIAL = ((stat.S_ISLNK, "symlink"), (stat.S_ISFIFO, "FIFO"), (stat.S_ISSOCK, "socket"))


@dataclass(frozen=True, slots=True)
class Member:
    """One file as seen: its path and fingerprint, its size in bytes, its times in ns."""

    path: str
    fingerprint: str
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """What may become one arrival or refusal: a file, or a folder of class folders of images.

    relative: path below the watched folder; key: the same, printable; position: its fingerprint.
    defect: why it cannot become an arrival, where a look is enough to know.
    """

    relative: str
    key: str
    position: str
    members: tuple[Member, ...]
    is_folder: bool = False
    defect: BatchRejected | None = None

    @property
    def touched_ns(self) -> int:
        """When the system last saw it change, in ns of the wall clock; a writer cannot set ctime back."""
        return max(max(member.mtime_ns, member.ctime_ns) for member in self.members)

    @property
    def order(self) -> tuple[int, tuple[str | int, ...]]:
        return max(member.mtime_ns for member in self.members), natural_key(self.key)


def walk(root: Path) -> Iterator[Candidate]:
    """Every candidate below `root` at any depth, in no order; raises OSError when `root` cannot be listed."""
    top = str(root)
    folders = [(top, root.stat())]
    images: defaultdict[str, list[Member]] = defaultdict(list)
    while folders:
        folder, seen = folders.pop()
        try:
            entries = _list_folder(folder)
        except OSError as error:
            if folder == top:
                raise
            if defect := unreadable(error):
                yield _file(top, _member(folder, seen), defect)
            continue
        for path, seen in entries:
            if stat.S_ISDIR(seen.st_mode):
                folders.append((path, seen))
            elif stat.S_ISREG(seen.st_mode) and path.lower().endswith(IMAGE_SUFFIXES) and folder != top:
                images[folder.rpartition("/")[0]].append(_member(path, seen))
            else:
                yield _file(top, _member(path, seen), _defect(path, seen))
    for folder, members in images.items():
        yield _image_folder(top, folder, members)


def _list_folder(folder: str) -> list[tuple[str, os.stat_result]]:
    """Paths and stats of what is not temporary; links are not followed."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_temporary(entry.name):
                try:
                    found.append((entry.path, entry.stat(follow_symlinks=False)))
                except FileNotFoundError:
                    continue
    return found


def _member(path: str, seen: os.stat_result) -> Member:
    return Member(path, fingerprint(seen), seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)


def _below(root: str, path: str) -> str:
    return path[len(root) + 1 :] or "."


def _file(root: str, member: Member, defect: BatchRejected | None) -> Candidate:
    relative = _below(root, member.path)
    return Candidate(relative, printable(relative), member.fingerprint, (member,), defect=defect)


def _image_folder(root: str, folder: str, members: list[Member]) -> Candidate:
    relative = _below(root, folder)
    ordered = tuple(sorted(members, key=lambda member: member.path))
    digest = hashlib.sha256()
    for member in ordered:
        digest.update(os.fsencode(_below(root, member.path)) + b"\0" + member.fingerprint.encode() + b"\0")
    return Candidate(relative, printable(relative), digest.hexdigest(), ordered, is_folder=True)


def _defect(path: str, seen: os.stat_result) -> BatchRejected | None:
    if not stat.S_ISREG(seen.st_mode):
        kind = next((word for test, word in _SPECIAL if test(seen.st_mode)), "device")
        return BatchRejected("not_regular", f"{kind}, expected a regular file")
    if path.lower().endswith(IMAGE_SUFFIXES):
        return BatchRejected("image_rejected", "no class folder, expected <batch>/<class>/<image>")
    if not path.lower().endswith(".npz"):
        return BatchRejected("unsupported_format", "expected .npz, or <batch>/<class>/<image> of PNG or JPEG")
    return None
