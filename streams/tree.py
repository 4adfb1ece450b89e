"""One look at a whole watched folder: names and stats only, nothing is opened."""

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from streams.batch import BatchRejected
from streams.files import fingerprint, folder_opened, is_gone, unreadable
from streams.formats import form_of_name
from streams.images import IMAGE_SUFFIXES
from streams.markers import DONE, Marker, Member, find_marker, is_marker
from streams.names import is_temporary, natural_key, printable, shortened

_SPECIAL = (
    (stat.S_ISLNK, "symlink"),
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISDIR, "directory"),
)
_NEVER_FOLDERS = (".npz", ".npy")  # while others write whole folders called x.parquet or x.csv
_PAIR = (".x.npy", ".y.npy")
_EXPECTED = ".npz, .npy, .tar, .parquet, .csv, .arrow, .jsonl, .json"
_SECOND = 10**9  # ns
_MAX_DEPTH = 64  # each folder is opened part by part of its path, which must not take ever longer
_MAX_KEY = 4096  # bytes


@dataclass(frozen=True, slots=True)
class Candidate:
    """What may become one arrival or refusal: a file, a pair of files, or a folder of class folders of images.

    key: path below the watched folder, printable, shortened if very long; position: what its members' stats come to.
    folders_ns: newest change of an image folder and its class folders.
    defect: why it cannot become an arrival, where a look is enough to know. lacks: the same, but the rest may come.
    """

    key: str
    position: str
    members: tuple[Member, ...]
    kind: Literal["file", "pair", "images"] = "file"
    markers: tuple[Marker, ...] = ()
    folders_ns: int = 0
    defect: BatchRejected | None = None
    lacks: BatchRejected | None = None

    @property
    def marked_position(self) -> str:
        """Another one for every state of its markers."""
        return "|".join((self.position, *(marker.file.fingerprint for marker in self.markers)))

    @property
    def is_marked(self) -> bool:
        return all(any(marker.vouches_for(member) for marker in self.markers) for member in self.members)

    @property
    def touched_ns(self) -> int:
        """When the system last saw it or its markers change, in ns of the wall clock."""
        files = (*self.members, *(marker.file for marker in self.markers))
        return max(self.folders_ns, *(file.touched_ns for file in files))

    @property
    def is_coarse(self) -> bool:
        """Whether its times seem to come in whole seconds: then a later change within the same one shows nowhere."""
        return any(member.ctime_ns % _SECOND == 0 for member in self.members)

    @property
    def order(self) -> tuple[int, tuple[str | int, ...]]:
        return max(member.mtime_ns for member in self.members), natural_key(self.key)


@dataclass(slots=True)
class _Images:
    """What is found of one image folder, class folder by class folder."""

    members: list[Member] = field(default_factory=list)
    touched_ns: int = 0
    marker: Member | None = None


def walk(root: str) -> Iterator[Candidate]:
    """Every candidate below `root`, an absolute path, in no order; what lies too deep is one that has a defect.

    Follows no link, in `root` neither. Raises OSError when `root` cannot be listed, or the system lacks what it takes.
    """
    return _Walk(root).run()


class _Walk:
    def __init__(self, top: str) -> None:
        self._top = top
        self._images: dict[str, _Images] = {}  # of the folders that are being gone through
        self._folders: list[tuple[str, os.stat_result, bool]] = []  # path, stat, whether all below was seen

    def run(self) -> Iterator[Candidate]:
        with folder_opened(self._top) as fd:
            self._folders.append((self._top, os.fstat(fd), False))
        while self._folders:
            folder, seen, is_done = self._folders.pop()
            if is_done:
                yield from self._finish_images(folder, seen)
                continue
            try:
                entries = _list_folder(folder)
            except OSError as error:
                defect = unreadable(error)
                if folder == self._top or not (defect or is_gone(error)):
                    raise
                if defect:
                    yield self._file(_member(folder, seen), {}, defect)
                continue
            self._folders.append((folder, seen, True))
            yield from self._sort(folder, seen, entries)

    def _sort(
        self, folder: str, seen: os.stat_result, entries: list[tuple[str, os.stat_result]]
    ) -> Iterator[Candidate]:
        """Candidates among the files of a folder; remembers its folders and images."""
        files = {name: _member(f"{folder}/{name}", now) for name, now in entries if stat.S_ISREG(now.st_mode)}
        if DONE in files:
            self._images_of(folder).marker = files.pop(DONE)
        for name, now in entries:
            lower = name.lower()
            if name not in files:
                if stat.S_ISDIR(now.st_mode) and not lower.endswith(_NEVER_FOLDERS):
                    if folder.count("/", len(self._top)) < _MAX_DEPTH:
                        self._enter(f"{folder}/{name}", now, find_marker(files, name))
                    else:
                        yield self._file(_member(f"{folder}/{name}", now), files, _too_deep())
                elif not stat.S_ISREG(now.st_mode):
                    yield self._file(_member(f"{folder}/{name}", now), files, _not_regular(now))
            elif lower.endswith(IMAGE_SUFFIXES) and folder != self._top:
                images = self._images_of(folder.rpartition("/")[0])
                images.members.append(files[name])
                images.touched_ns = max(images.touched_ns, seen.st_mtime_ns, seen.st_ctime_ns)
            elif lower.endswith(_PAIR):
                yield from self._pair(name, files)
            elif not is_marker(name):
                yield self._file(files[name], files, _wrong_form(name[name.rfind(".") :] if "." in name else ""))

    def _enter(self, folder: str, seen: os.stat_result, marker: Member | None) -> None:
        self._folders.append((folder, seen, False))
        if marker:
            self._images_of(folder).marker = marker

    def _images_of(self, folder: str) -> _Images:
        return self._images.setdefault(folder, _Images())

    def _finish_images(self, folder: str, seen: os.stat_result) -> Iterator[Candidate]:
        images = self._images.pop(folder, None)
        if images is None or not images.members:
            return
        members = tuple(sorted(images.members, key=lambda member: member.path))
        digest = hashlib.sha256()
        for member in members:
            digest.update(os.fsencode(member.path[len(self._top) :]) + b"\0" + member.fingerprint.encode() + b"\0")
        markers = _markers([(images.marker, members)], depth=2)
        touched = max(images.touched_ns, seen.st_mtime_ns, seen.st_ctime_ns)
        yield Candidate(_key(self._top, folder), digest.hexdigest(), members, "images", markers, touched)

    def _file(self, member: Member, files: dict[str, Member], defect: BatchRejected | None) -> Candidate:
        markers = _markers([(find_marker(files, member.path.rpartition("/")[2]), (member,))]) if files else ()
        return Candidate(_key(self._top, member.path), member.fingerprint, (member,), "file", markers, defect=defect)

    def _pair(self, name: str, files: dict[str, Member]) -> Iterator[Candidate]:
        """Samples and labels in two files are one candidate, under the name of the samples."""
        is_x = name[-5] in "xX"
        partner = name[:-5] + {"x": "y", "X": "Y", "y": "x", "Y": "X"}[name[-5]] + name[-4:]
        other = files.get(partner)
        if other is not None and not is_x:
            return
        members = (files[name],) if other is None else (files[name], other)
        both = find_marker(files, name[: -len(_PAIR[0])])
        markers = _markers([(find_marker(files, own.path.rpartition("/")[2]) or both, (own,)) for own in members])
        lacks = None
        if other is None and is_x:
            lacks = BatchRejected("no_labels", f"expected {printable(partner)} beside it, or a name without '.x'")
        elif other is None:
            lacks = BatchRejected("no_inputs", f"expected {printable(partner)} beside it")
        position = "+".join(own.fingerprint for own in members)
        yield Candidate(_key(self._top, files[name].path), position, members, "pair", markers, lacks=lacks)


def _list_folder(folder: str) -> list[tuple[str, os.stat_result]]:
    """Names and stats of what is not temporary; links are not followed."""
    found = []
    with folder_opened(folder) as fd, os.scandir(fd) as entries:
        for entry in entries:
            if not is_temporary(entry.name) or entry.name == DONE:
                try:
                    found.append((entry.name, entry.stat(follow_symlinks=False)))
                except OSError as error:
                    if not is_gone(error):
                        raise
    return found


def _member(path: str, seen: os.stat_result) -> Member:
    return Member(path, fingerprint(seen), seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)


def _markers(found: list[tuple[Member | None, tuple[Member, ...]]], depth: int = 1) -> tuple[Marker, ...]:
    return tuple(Marker(file, frozenset(own.path for own in members), depth) for file, members in found if file)


def _key(root: str, path: str) -> str:
    return shortened(printable(path[len(root) + 1 :]), _MAX_KEY) or "."


def _too_deep() -> BatchRejected:
    return BatchRejected("too_deep", f"a folder in {_MAX_DEPTH} others, expected at most {_MAX_DEPTH} in each other")


def _not_regular(seen: os.stat_result) -> BatchRejected:
    kind = next((word for test, word in _SPECIAL if test(seen.st_mode)), "device")
    return BatchRejected("not_regular", f"{kind}, expected a regular file")


@lru_cache(256)
def _wrong_form(suffix: str) -> BatchRejected | None:
    if form_of_name(f"batch{suffix}") is not None:
        return None
    if suffix.lower() in IMAGE_SUFFIXES:
        return BatchRejected("image_rejected", "no class folder, expected <batch>/<class>/<image>")
    return BatchRejected("unsupported_format", f"expected {_EXPECTED}, or <batch>/<class>/<image> of PNG or JPEG")
