"""What a source remembers of files that are not finished, from one pass to the next."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from streams.batch import BatchRejected
from streams.markers import Member
from streams.tree import Candidate

_UNEVEN_SECONDS = 0.5


@dataclass(slots=True)
class Sighting:
    """What is known of a candidate since it was first seen in this state.

    since: monotonic seconds, for the wall clock may jump. moved: (path, fingerprint) of members that were renamed into
    place. verdict: what was wrong with it when it was read, and may yet be mended.
    """

    state: tuple[str, int]
    since: float
    moved: set[tuple[str, str]] = field(default_factory=set)
    is_postponed: bool = False
    verdict: BatchRejected | None = None

    def is_moved(self, candidate: Candidate) -> bool:
        return all((member.path, member.fingerprint) in self.moved for member in candidate.members)

    def quiet_seconds(self, candidate: Candidate, by_own_clock: bool) -> float:
        """How long it is unchanged: by its own times, or by ours where the wall clock disagrees.

        by_own_clock: its times are those of another machine.
        """
        seen = time.monotonic() - self.since
        return seen if by_own_clock else max(seen, _wall.age(candidate.touched_ns))


class WallClock:
    """The age of a file by its own time, believed only as far back as the wall clock has run evenly."""

    def __init__(self) -> None:
        self._ahead = _wall_seconds() - time.monotonic()
        self._even_since = -math.inf

    def age(self, touched_ns: int) -> float:
        """Seconds since `touched_ns` of the wall clock; never more than have passed since that clock last jumped."""
        now, wall = time.monotonic(), _wall_seconds()
        if abs(wall - now - self._ahead) > _UNEVEN_SECONDS:
            self._even_since = now
        self._ahead = wall - now
        return min(wall - touched_ns / 1e9, now - self._even_since)


def _wall_seconds() -> float:
    """Of any year: `time.time` fails from 2262 on."""
    return time.clock_gettime(time.CLOCK_REALTIME)


_wall = WallClock()


class Sightings:
    """The sightings of one pass, by key."""

    def __init__(self) -> None:
        self._all: dict[str, Sighting] = {}
        self._updated = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since the newest `update`."""
        return time.monotonic() - self._updated

    def __getitem__(self, key: str) -> Sighting:
        return self._all[key]

    def update(self, candidates: Iterable[Candidate], moved: set[str]) -> None:
        """Forget what is not among `candidates`. moved: paths of files and folders that were renamed into place."""
        now = self._updated = time.monotonic()
        seen: dict[str, Sighting] = {}
        for candidate in candidates:
            state = (candidate.marked_position, candidate.folders_ns)
            sighting = self._all.get(candidate.key)
            if sighting is None or sighting.state != state:
                sighting = Sighting(state, now, sighting.moved if sighting else set())
            if moved:
                sighting.moved.update(_moved_among(candidate.members, moved))
            seen[candidate.key] = sighting
        self._all = seen

    def postpone(self, key: str, position: str) -> None:
        """What was handed over turned out to be cut off."""
        sighting = self._all.get(key)
        if sighting and sighting.state[0].partition("|")[0] == position:
            sighting.is_postponed = True


def _moved_among(members: Iterable[Member], moved: set[str]) -> set[tuple[str, str]]:
    return {(member.path, member.fingerprint) for member in members if _has_moved(member.path, moved)}


def _has_moved(path: str, moved: set[str]) -> bool:
    """It itself, or a folder that it is in."""
    while path:
        if path in moved:
            return True
        path = path.rpartition("/")[0]
    return False
