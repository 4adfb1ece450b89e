"""One thread for each source: takes what comes in groups, as many as there is room for, and stands still at gaps."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import structlog

from storage import cursors, gaps
from storage.errors import StoreError
from storage.failpoints import hit
from storage.gaps import GapRow, GapUnknown
from streams.batch import Arrival, Gap, Refusal
from streams.source import Source, SourceUnavailable
from supsupd.health import Health
from supsupd.sections import IntakeSettings
from supsupd.staging import Staging, Taken

GROUP_ITEMS = 64
GROUP_BYTES = 8 << 20
ROOM_SECONDS = 0.05
"""How often a source that waits for room looks for it."""
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0
"""Seconds between two tries to reach a source, doubled each time; our own disk and database are tried each second."""

log = structlog.get_logger("supsupd.intake")


@dataclass
class SourceProgress:
    """passes: the newest `scan` request that a full pass has covered; gap: at which it stands still."""

    source: Source
    passes: int = 0
    gap: Gap | None = None
    accepted: threading.Event = field(default_factory=threading.Event)


@dataclass
class UnderWay:
    """The group of a source that is being made durable while the next one is looked into: never more than one."""

    source: Source
    group: Sequence[Taken] = ()
    durable: Future[object] | None = None

    def begin(self, group: Sequence[Taken], durable: Future[object] | None) -> None:
        self.group, self.durable = group, durable

    def end(self) -> tuple[Sequence[Taken], Future[object] | None]:
        ended = self.group, self.durable
        self.group, self.durable = (), None
        return ended


class Intake:
    """Passes over the sources.

    Args:
        staging: makes what comes durable.
        settings: sizes and times.
        notify: called after each group that was staged.
        health: told what keeps a source from working.
    """

    def __init__(
        self,
        staging: Staging,
        settings: IntakeSettings,
        notify: Callable[[], None],
        health: Health | None = None,
    ) -> None:
        self.staging = staging
        self.progress: list[SourceProgress] = []
        self._settings = settings
        self._notify = notify
        self._health = health or Health()
        self._requested = 1
        self._failures: Counter[str] = Counter()
        """How often a source failed since it last worked."""

    def add(self, source: Source) -> None:
        self.progress.append(SourceProgress(source))

    def request_scan(self) -> int:
        """Asks every source for a full pass; its number is in `passes` once the pass is over."""
        self._requested += 1
        for progress in self.progress:
            progress.source.poke()
        return self._requested

    # -- one source ------------------------------------------------------------------------------------------------

    def loop(self, progress: SourceProgress, stopping: threading.Event) -> None:
        """Passes over one source until `stopping`."""
        name = progress.source.name
        while not stopping.is_set():
            requested = self._requested
            try:
                if self._pass(progress, stopping):
                    progress.passes = requested
                self._failures.pop(name, None)
            except Exception as error:  # noqa: BLE001 - the edge: neither a broker nor a full disk must end the source
                self._failures[name] += 1
                self._wait_after(error, name, self._failures[name], stopping)
                continue
            if self._requested == requested and not stopping.is_set():
                progress.source.wait(self._settings.scan_seconds)

    def _wait_after(self, error: Exception, name: str, failures: int, stopping: threading.Event) -> None:
        longest = FIRST_DELAY
        if isinstance(error, SourceUnavailable):
            self._health.report(name, "source_unavailable", str(error))
            longest = LONGEST_DELAY
        elif self._health.blame(name, error) == "failed":
            log.exception("intake_failed", source=name)
        delay = min(longest, FIRST_DELAY * 2 ** min(failures - 1, 10))
        stopping.wait(delay * random.uniform(0.5, 1.0))  # noqa: S311 - many daemons must not come back at once

    def _pass(self, progress: SourceProgress, stopping: threading.Event) -> bool:
        """Whether all that is there now was taken."""
        if progress.gap is not None and not self._is_gap_accepted(progress, stopping):
            return False
        with ThreadPoolExecutor(1) as syncing:
            under_way = UnderWay(progress.source)
            for group in self._groups(progress, stopping, under_way):
                looked = self._look_into(group, progress.source)
                self._finish(under_way)
                under_way.begin(looked, syncing.submit(self._make_durable, looked) if looked else None)
            self._finish(under_way)
        if stopping.is_set() or progress.gap is not None:
            return False
        self._report(progress.source)
        return True

    def _works_again(self, source: Source) -> None:
        """Said at once: the pass may last as long as there is always more."""
        if self._failures.pop(source.name, None):
            self._report(source)

    def _report(self, source: Source) -> None:
        problem = source.problem()
        if problem is None:
            self._health.clear(source.name)
        else:
            self._health.report(source.name, "source", problem)

    def _groups(
        self, progress: SourceProgress, stopping: threading.Event, under_way: UnderWay
    ) -> Iterator[list[Arrival | Refusal]]:
        """Items of one pass in groups that fit into the queue; ends at a gap."""
        group: list[Arrival | Refusal] = []
        room, size = self._wait_for_room(progress.source, stopping, under_way), 0
        if not room:
            return
        for item in progress.source.iter_arrivals():
            if stopping.is_set():
                return
            if isinstance(item, Gap):
                if group:
                    yield group
                self._finish(under_way)
                self._halt(progress, item)
                return
            group.append(item)
            size += len(item.payload) if isinstance(item, Arrival) else 0
            del item  # its payload goes with the group
            if len(group) >= min(room, GROUP_ITEMS) or size >= GROUP_BYTES:
                yield group
                group, size = [], 0
                room = self._wait_for_room(progress.source, stopping, under_way)
                if not room:
                    return
        if group:
            yield group

    def _wait_for_room(self, source: Source, stopping: threading.Event, under_way: UnderWay) -> int:
        """How many batches may come in now; 0 only when the daemon stops."""
        is_full = False
        while not stopping.is_set():
            room = self.staging.room(source.name)
            if is_full and room.text is None:
                self._report(source)
            if (batches := room.batches - len(under_way.group)) > 0:
                return batches
            if under_way.durable is not None:
                self._finish(under_way)
                continue
            is_full = room.text is not None
            if room.text is not None:
                self._health.report(source.name, room.kind, room.text)
            self._notify()
            stopping.wait(ROOM_SECONDS)
        return 0

    # -- gaps ------------------------------------------------------------------------------------------------------

    def _halt(self, progress: SourceProgress, gap: Gap) -> None:
        """The source stands still: what is missing must not pass unseen."""
        with self.staging.database.write() as session:
            if cursors.find_positions(session, gap.source, [gap.key]).get(gap.key) == gap.position:
                progress.source.acknowledge([gap])  # it was accepted before the source came to it again
                return
            gaps.report(session, gap.source, gap.key, gap.position, gap.reason)
        progress.accepted.clear()
        progress.gap = gap
        self._health.report(gap.source, "gap", gap.reason)
        log.error("source_gap", source=gap.source, key=gap.key, position=gap.position, reason=gap.reason)

    def _is_gap_accepted(self, progress: SourceProgress, stopping: threading.Event) -> bool:
        if not progress.accepted.is_set() or progress.gap is None:
            return False
        progress.source.acknowledge([progress.gap])
        progress.gap = None
        self._health.clear(progress.source.name)
        return not stopping.is_set()

    def accept_gap(self, source: str) -> GapRow:
        """An operator accepts what `source` lost; it goes on from there. Raises GapUnknown, StoreError."""
        progress = next((p for p in self.progress if p.source.name == source), None)
        if progress is None:
            raise GapUnknown(f"there is no source {source}")
        with self.staging.database.write() as session:
            row = gaps.accept(session, source)
        progress.accepted.set()
        progress.source.poke()
        log.warning("gap_accepted", source=source, key=row.key, position=row.position)
        return row

    # -- one group -------------------------------------------------------------------------------------------------

    def _look_into(self, group: Sequence[Arrival | Refusal], source: Source) -> list[Taken]:
        """Those that are whole; the others are postponed."""
        hit("stage.received")
        looked = [self.staging.look_into(item) for item in group]
        for taken in looked:
            if taken.is_cut and isinstance(taken.item, Arrival):
                source.postpone(taken.item)
        return [taken for taken in looked if not taken.is_cut]

    def _make_durable(self, group: Sequence[Taken]) -> None:
        """As `Staging.make_durable`; a failed disk is told even if the pass ends before it comes to `_finish`."""
        try:
            self.staging.make_durable(group)
        except (StoreError, OSError) as error:
            self._health.judge(group[0].item.source, error)
            raise

    def _finish(self, under_way: UnderWay) -> None:
        """Waits until a group is durable, and acknowledges it. Raises what making it durable raised."""
        group, durable = under_way.end()
        if durable is not None:
            durable.result()
            self._acknowledge(group, under_way.source)

    def _acknowledge(self, group: Sequence[Taken], source: Source) -> None:
        hit("stage.acknowledge")
        source.acknowledge([taken.item for taken in group])
        hit("stage.acknowledged")
        self._works_again(source)
        self._notify()
