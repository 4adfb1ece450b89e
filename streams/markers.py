"""Small files beside a batch that say that it is whole: NAME.done, or NAME.sha256 as sha256sum writes it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from streams.batch import BatchRejected
from streams.images import IMAGE_SUFFIXES
from streams.names import printable

SUMS, DONE = ".sha256", ".done"
MISMATCH = "checksum_mismatch"
MAX_SUMS_BYTES = 16 << 20
_LINE = re.compile(rb"\\?([0-9a-fA-F]{64})(?: [ *](.+))?")


@dataclass(frozen=True, slots=True)
class Member:
    """One file as seen: its path and fingerprint, its size in bytes, its times in ns."""

    path: str
    fingerprint: str
    size: int
    mtime_ns: int
    ctime_ns: int

    @property
    def touched_ns(self) -> int:
        """When the system last saw it change; a writer cannot set ctime back."""
        return max(self.mtime_ns, self.ctime_ns)


@dataclass(frozen=True, slots=True)
class Marker:
    """The marker `file` and the paths of the `members` that it speaks of.

    depth: by how many last parts of their paths the members are told apart: 2, class and image, in an image folder.
    """

    file: Member
    members: frozenset[str]
    depth: int = 1

    @property
    def has_sums(self) -> bool:
        return self.file.path.endswith(SUMS)

    def vouches_for(self, member: Member) -> bool:
        """Whether it can mean this state of the member: an older marker means what was there before.

        By either clock: copies keep the times of writing, and a clock that was wrong may have set those.
        """
        if member.path not in self.members:
            return False
        return self.has_sums or self.file.mtime_ns >= member.mtime_ns or self.file.ctime_ns >= member.touched_ns


def find_marker(files: Mapping[str, Member], name: str) -> Member | None:
    """The marker of `name` among the files of its folder; sums say more than that it is done."""
    return files.get(name + SUMS) or files.get(name + DONE)


def is_marker(name: str) -> bool:
    return name.endswith((SUMS, DONE))


def check_sums(sums: bytes, marker: Marker, digests: Mapping[str, str]) -> None:
    """Raises BatchRejected MISMATCH unless `sums` is true of every member of the marker.

    digests: path to SHA-256, 64 hex digits. One sum alone is that of the one member, whatever its name is there; of an
    image folder every image is listed, and there.
    """
    listed = _parse(sums, printable(_tail(marker.file.path, 1)))
    found = {_tail(path, marker.depth): digests[path] for path in marker.members}
    if marker.depth == len(listed) == len(found) == 1:
        wanted = dict.fromkeys(found, listed[0][1])
    else:
        wanted = {_tail(name, marker.depth): digest for name, digest in listed}
    _compare(wanted, found)


def _compare(wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
    for name, digest in sorted(found.items()):
        if wanted.get(name) != digest:
            told = wanted.get(name, "no line of its own")
            raise BatchRejected(MISMATCH, f"{printable(name)}: is {digest}, its marker has {told}")
    absent = [name for name in wanted if name not in found and name.lower().endswith(IMAGE_SUFFIXES)]
    if absent:
        raise BatchRejected(MISMATCH, f"{len(absent)} images are missing, first {printable(absent[0])}")


def _parse(sums: bytes, marker: str) -> list[tuple[str, str]]:
    """Name and digest of every line."""
    found = []
    for line in sums.splitlines():
        parts = _LINE.fullmatch(line.strip())
        if parts:
            found.append(((parts[2] or b"").decode(errors="surrogateescape"), parts[1].decode().lower()))
        elif line.strip():
            raise BatchRejected(MISMATCH, f"{marker}: no lines of '<64 hex digits>  <name>'")
    if not found:
        raise BatchRejected(MISMATCH, f"{marker}: empty")
    return found


def _tail(path: str, parts: int) -> str:
    return "/".join(path.split("/")[-parts:])
