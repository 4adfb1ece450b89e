"""A watched folder as a source. Its files are only ever read; every pass looks at all of them."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from streams.batch import Arrival, BatchRejected, Item, Refusal
from streams.files import UNREADABLE, StillChanging, find_link, folder_opened, is_gone, unreadable
from streams.load import load
from streams.markers import MISMATCH
from streams.names import printable
from streams.sightings import Sightings
from streams.source import SourceUnavailable
from streams.tree import Candidate, walk
from streams.watch import FolderWatch, Watching

_SHORTEST_WAIT = 0.05  # seconds between two looks at a file that settles
_PAUSE = 4.0  # times as long as a look took: among very many files, one that comes must not mean a look at once
_COARSE_SECONDS = 2.0  # how long a file may change and look the same: times in whole seconds (FAT: in two), caches
_FORGET_FROM = 1000  # cursors of files that are gone; to find them costs as much as a pass
_LOG_SECONDS = 600.0  # between two lines about what cannot be read
_log = structlog.get_logger("supsupd.streams")


@dataclass(frozen=True, slots=True)
class DirectorySettings:
    """When a file counts as finished, and how much it may hold.

    settle_seconds: so long unchanged and no writer: finished; what was renamed into place or has a marker is at once.
    incomplete_seconds: for so long the rest of what is cut off, alone of two or not what its checksum says may come.
    max_batch_bytes: of one file, of a pair, or of all images of one batch.
    marker: whether nothing is taken without a file NAME.done or NAME.sha256.
    watching: auto asks the system for hints, but on a network file system, where it has none of what others do; nor is
    believed there what it says of writers and times. polling takes every folder for one of those, inotify always asks.
    """

    settle_seconds: float = 1.0
    incomplete_seconds: float = 5.0
    max_batch_bytes: int = 256 << 20
    marker: Literal["optional", "required"] = "optional"
    watching: Watching = "auto"


class DirectorySource:
    """The `Source` of the batch files and image folders below `root`, at any depth.

    `cursors` maps key to position of what is acknowledged already. A file that changes after that has a new
    position and is examined again. Links in the path of `root` are followed once, here, and never again.
    """

    def __init__(
        self, root: Path, *, name: str, cursors: Mapping[str, str], settings: DirectorySettings | None = None
    ) -> None:
        self.name = name
        self._root = Path(os.path.realpath(root))
        self._settings = settings or DirectorySettings()
        self._cursors = dict(cursors)
        self._remembered = 0
        self._watch = FolderWatch(self._root, self._settings.watching)
        self._sightings = Sightings()
        self._device: int | None = None  # of the folder when something was last in it
        self._missing: str | None = None
        self._unreadable: dict[str, str] = {}  # key to reason, in the running pass
        self._problem: str | None = None
        self._logged = -_LOG_SECONDS
        self._pending: set[str] = set()  # keys of what was seen and is not acknowledged
        self._scan_seconds = 0.0
        self._due = 0.0  # monotonic: when the first of what is pending may be finished

    def iter_arrivals(self) -> Iterator[Item]:
        """One full pass; a missing folder yields nothing and is looked for again in the next pass.

        Raises SourceUnavailable where a link is in its place, or the system lacks what it takes to look.
        """
        self._due, self._unreadable = float("inf"), {}
        seen = set()
        for candidate in self._scan():
            if self._is_acknowledged(candidate):  # since this pass began
                continue
            item = self._examine(candidate)
            if candidate.key in self._unreadable:  # a wait for all that comes must not wait for that
                continue
            seen.add(candidate.key)
            self._pending.add(candidate.key)
            if item is not None:
                yield item
                del item  # its payload goes before the next one comes
        self._pending &= seen
        self._tell_problem()

    def acknowledge(self, items: Sequence[Item]) -> None:
        for item in items:
            if isinstance(item, Arrival) and item.key in self._cursors:
                _log.info("source_changed", source=self.name, name=item.key)
            self._cursors[item.key] = item.position
            self._pending.discard(item.key)

    def postpone(self, item: Arrival) -> None:
        self._sightings.postpone(item.key, item.position)
        self._look_again_in(self._settings.incomplete_seconds)

    def problem(self) -> str | None:
        return self._problem

    def pending(self) -> int:
        return len(self._pending)

    def wait(self, timeout: float) -> None:
        """As `Source.wait`, but not longer than a pending file takes to settle."""
        due = max(self._due - time.monotonic(), _SHORTEST_WAIT)
        self._watch.wait(min(timeout, due), pause=_PAUSE * self._scan_seconds)

    def poke(self) -> None:
        self._watch.poke()

    def close(self) -> None:
        self._watch.close()

    def _scan(self) -> list[Candidate]:
        """All candidates that are not acknowledged, in order; brings the sightings up to date."""
        began = time.monotonic()
        self._watch.ensure()
        moved = self._watch.take_moved()
        walked = self._forgetting() if len(self._cursors) > self._remembered + _FORGET_FROM else self._walk()
        found = [candidate for candidate in walked if not self._is_acknowledged(candidate)]
        self._sightings.update(found, moved)
        found.sort(key=lambda candidate: candidate.order)
        self._scan_seconds = time.monotonic() - began
        return found

    def _forgetting(self) -> Iterator[Candidate]:
        """A walk after which only what is there is remembered; the store knows the rest, should it come back."""
        kept: dict[str, str] = {}
        for candidate in self._walk():
            if (position := self._cursors.get(candidate.key)) is not None:
                kept[candidate.key] = position
            yield candidate
        if self._missing is None:
            self._cursors, self._remembered = kept, len(kept)

    def _is_acknowledged(self, candidate: Candidate) -> bool:
        position = self._cursors.get(candidate.key)
        return position == candidate.position or (position is not None and position == candidate.marked_position)

    def _walk(self) -> Iterator[Candidate]:
        try:
            with folder_opened(str(self._root)) as fd:
                device, is_empty = os.fstat(fd).st_dev, True
            for candidate in walk(str(self._root)):
                is_empty = False
                yield candidate
        except OSError as error:
            link = self._link_in_the_way()
            self._tell_missing(link or error.strerror or str(error))
            if link or not (is_gone(error) or unreadable(error)):
                self._problem = self._missing
                raise SourceUnavailable(self._missing) from None  # what is there has not been seen
            return
        if is_empty and self._device not in (None, device):
            self._tell_missing("empty, and on another file system than before; is it mounted?")
            return
        if not is_empty:
            self._device = device
        if self._missing:
            _log.info("source_back", source=self.name, folder=str(self._root))
        self._missing = None

    def _link_in_the_way(self) -> str | None:
        link = find_link(str(self._root))
        if link is None:
            return None
        return f"{printable(link)} is a symbolic link now, expected the folder that was there at the start"

    def _examine(self, candidate: Candidate) -> Item | None:
        """What became of a candidate; None while it is not finished."""
        settings, sighting = self._settings, self._sightings[candidate.key]
        if settings.marker == "required" and not candidate.is_marked:
            return None
        is_whole = candidate.is_marked or sighting.is_moved(candidate)
        # When the pass began: while it waits for room, a later file would become finished before an earlier one.
        quiet = max(sighting.quiet_seconds(candidate, by_own_clock=self._watch.remote) - self._sightings.age, 0.0)
        verdict = candidate.lacks or sighting.verdict
        least = self._least_quiet(candidate, is_whole)
        if verdict or sighting.is_postponed:
            least = max(least, settings.incomplete_seconds)
        if quiet < least:
            self._look_again_in(least - quiet)
            return None
        if rejection := candidate.defect or verdict:
            return self._refuse(candidate, rejection)
        may_grow = not is_whole and quiet < settings.incomplete_seconds
        try:
            return self._arrival(candidate, may_grow)
        except StillChanging:
            self._look_again_in(settings.settle_seconds)
            return None
        except BatchRejected as found:
            if found.code == MISMATCH:
                sighting.verdict = found
                return self._examine(candidate)
            return self._refuse(candidate, found)

    def _least_quiet(self, candidate: Candidate, is_whole: bool) -> float:
        least = 0.0 if is_whole else self._settings.settle_seconds
        if candidate.is_coarse or (self._watch.remote and not is_whole):
            return max(least, _COARSE_SECONDS)
        return least

    def _look_again_in(self, seconds: float) -> None:
        self._due = min(self._due, time.monotonic() + seconds)

    def _arrival(self, candidate: Candidate, may_grow: bool) -> Arrival:
        form, payload, sha256 = load(candidate, self._settings.max_batch_bytes, leases=not self._watch.remote)
        return Arrival(
            source=self.name,
            name=candidate.key,
            form=form,
            sha256=sha256,
            payload=payload,
            key=candidate.key,
            position=candidate.position,
            may_grow=may_grow,
        )

    def _refuse(self, candidate: Candidate, rejection: BatchRejected) -> Refusal | None:
        if rejection.code == UNREADABLE:  # that may be mended without a trace in the file: looked at again, not refused
            self._unreadable[candidate.key] = rejection.text
            return None
        return Refusal(
            source=self.name,
            name=candidate.key,
            code=rejection.code,
            reason=str(rejection),
            key=candidate.key,
            position=candidate.marked_position if rejection.code == MISMATCH else candidate.position,
        )

    def _tell_missing(self, reason: str) -> None:
        if self._missing is None:
            _log.warning("source_missing", source=self.name, folder=str(self._root), reason=reason)
        self._missing = f"{printable(str(self._root))}: {reason}"

    def _tell_problem(self) -> None:
        """Sums up the pass; what cannot be read is logged once in a while, however much of it there is."""
        unreadable = None
        if self._unreadable:
            first, reason = next(iter(self._unreadable.items()))
            unreadable = f"{len(self._unreadable)} cannot be read, the first is {first}: {reason}"
            if time.monotonic() - self._logged >= _LOG_SECONDS:
                _log.warning("unreadable", source=self.name, reason=unreadable)
                self._logged = time.monotonic()
        self._problem = self._missing or unreadable
