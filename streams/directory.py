"""A watched folder as a source. Its files are only ever read; every pass looks at all of them."""

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from streams.batch import Arrival, BatchRejected, Refusal
from streams.files import StillChanging, read_file
from streams.formats import Limits
from streams.images import encode_folder
from streams.tasks import TaskRule, accept
from streams.tree import Candidate, Member, walk
from streams.watch import FolderWatch

_SHORTEST_WAIT = 0.05  # seconds between two looks at a file that settles
_log = structlog.get_logger("supsupd.streams")


@dataclass(frozen=True, slots=True)
class DirectorySettings:
    """When a file counts as finished, and how much it may hold.

    settle_seconds: so long unchanged, or renamed into place, and no writer: finished.
    incomplete_seconds: a truncated file that is unchanged for so long is refused.
    max_batch_bytes: of one file, or of all images of one batch.
    tasks: which batches must say what task they belong to.
    """

    settle_seconds: float = 1.0
    incomplete_seconds: float = 5.0
    max_batch_bytes: int = 256 << 20
    limits: Limits = field(default_factory=Limits)
    tasks: TaskRule = "ignored"


@dataclass(slots=True)
class _Sighting:
    """What is known of a candidate since it was first seen at this position."""

    position: str
    since: float  # monotonic seconds: the wall clock may jump
    moved: bool = False
    verdict: Refusal | None = None  # it was truncated when it was read


class DirectorySource:
    """The `Source` of the .npz files and image folders below `root`, at any depth.

    `cursors` maps key to position of what is acknowledged already. A file that changes after that has a new
    position and is examined again.
    """

    def __init__(
        self, root: Path, *, name: str, cursors: Mapping[str, str], settings: DirectorySettings | None = None
    ) -> None:
        self.name = name
        self._root = root.absolute()
        self._settings = settings or DirectorySettings()
        self._cursors = dict(cursors)
        self._sightings: dict[str, _Sighting] = {}
        self._pending = 0
        self._missing = False
        self._watch = FolderWatch(self._root)

    def iter_arrivals(self) -> Iterator[Arrival | Refusal]:
        """One full pass; a missing folder yields nothing and is looked for again in the next pass."""
        pending = 0
        for candidate in self._scan():
            if self._is_acknowledged(candidate):  # since this pass began
                continue
            item = self._examine(candidate)
            if item is None:
                pending += 1
            else:
                yield item
                del item  # its payload goes before the next one comes
        self._pending = pending

    def acknowledge(self, item: Arrival | Refusal) -> None:
        self._cursors[item.key] = item.position

    def pending(self) -> int:
        return self._pending

    def wait(self, timeout: float) -> None:
        """As `Source.wait`, but not longer than a pending file takes to settle."""
        if self._pending:
            timeout = min(timeout, max(self._settings.settle_seconds, _SHORTEST_WAIT))
        self._watch.wait(timeout)

    def poke(self) -> None:
        self._watch.poke()

    def close(self) -> None:
        self._watch.close()

    def _scan(self) -> list[Candidate]:
        """All candidates that are not acknowledged, in order; brings the sightings up to date."""
        self._watch.ensure()
        moved = self._watch.take_moved()
        found = []
        sightings: dict[str, _Sighting] = {}
        for candidate in self._walk():
            if self._is_acknowledged(candidate):
                continue
            sighting = self._sightings.get(candidate.key)
            if sighting is None or sighting.position != candidate.position:
                sighting = _Sighting(candidate.position, time.monotonic())
            sighting.moved |= candidate.relative in moved
            sightings[candidate.key] = sighting
            found.append(candidate)
        self._sightings = sightings
        return sorted(found, key=lambda candidate: candidate.order)

    def _is_acknowledged(self, candidate: Candidate) -> bool:
        return self._cursors.get(candidate.key) == candidate.position

    def _walk(self) -> Iterator[Candidate]:
        try:
            yield from walk(self._root)
        except OSError as error:
            if not self._missing:
                _log.warning("source_missing", source=self.name, folder=str(self._root), reason=str(error))
            self._missing = True
            return
        if self._missing:
            _log.info("source_back", source=self.name, folder=str(self._root))
        self._missing = False

    def _examine(self, candidate: Candidate) -> Arrival | Refusal | None:
        """What became of a candidate; None while it is not finished."""
        sighting = self._sightings[candidate.key]
        if not sighting.moved and self._quiet_seconds(candidate) < self._settings.settle_seconds:
            return None
        if candidate.defect is not None:
            return self._refuse(candidate, candidate.defect)
        if sighting.verdict is not None:
            return self._await_rest(candidate, sighting.verdict)
        try:
            return self._accept(candidate)
        except StillChanging:
            return None

    def _accept(self, candidate: Candidate) -> Arrival | Refusal | None:
        digest = None
        try:
            payload = self._load(candidate)
            digest = hashlib.sha256(payload).hexdigest()
            accepted, batch = accept(payload, candidate.key, self._settings.tasks, self._settings.limits)
        except BatchRejected as rejection:
            refusal = self._refuse(candidate, rejection, digest)
            return self._await_rest(candidate, refusal) if rejection.code == "truncated" else refusal
        if candidate.key in self._cursors:
            _log.info("source_changed", source=self.name, name=candidate.key)
        return Arrival(
            source=self.name,
            name=candidate.key,
            sha256=digest if accepted is payload else hashlib.sha256(accepted).hexdigest(),
            payload=accepted,
            samples=len(batch.x),
            labelled=batch.y is not None,
            key=candidate.key,
            position=candidate.position,
            task=batch.task,
        )

    def _load(self, candidate: Candidate) -> bytes:
        limit = self._settings.max_batch_bytes
        if not candidate.is_folder:
            return self._read(candidate.members[0])
        total = sum(member.size for member in candidate.members)
        if total > limit:
            raise BatchRejected("too_large", f"{total} bytes of images, at most {limit} expected")
        members = {member.path: member for member in candidate.members}
        folder = str(self._root / candidate.relative)
        return encode_folder(folder, list(members), lambda path: self._read(members[path]), self._settings.limits)

    def _read(self, member: Member) -> bytes:
        return read_file(member.path, member.fingerprint, self._settings.max_batch_bytes)

    def _quiet_seconds(self, candidate: Candidate) -> float:
        """How long it is unchanged: by its own times, or by ours where the wall clock disagrees."""
        aged = (time.time_ns() - candidate.touched_ns) / 1e9
        return max(aged, time.monotonic() - self._sightings[candidate.key].since)

    def _await_rest(self, candidate: Candidate, refusal: Refusal) -> Refusal | None:
        """A truncated file may still get its rest, for a while."""
        self._sightings[candidate.key].verdict = refusal
        return refusal if self._quiet_seconds(candidate) >= self._settings.incomplete_seconds else None

    def _refuse(self, candidate: Candidate, rejection: BatchRejected, digest: str | None = None) -> Refusal:
        return Refusal(
            source=self.name,
            name=candidate.key,
            sha256=digest,
            code=rejection.code,
            reason=str(rejection),
            key=candidate.key,
            position=candidate.position,
        )
