"""Hints that something happened below a folder. They may be lost: only a full pass is the truth."""

import os
import threading
from pathlib import Path
from typing import Literal

import structlog
from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.inotify import InotifyObserver

from streams.files import folder_opened
from streams.mounts import remote_kind

MAX_MOVED = 100_000  # hints kept between two passes
Watching = Literal["auto", "inotify", "polling"]
# Neither opens, or our own reading would wake us, nor modifications, or a growing file would without end.
_EVENTS: tuple[type[FileSystemEvent], ...] = (
    FileMovedEvent,
    DirMovedEvent,
    FileCreatedEvent,
    DirCreatedEvent,
    FileClosedEvent,
)
_log = structlog.get_logger("supsupd.streams")


class FolderWatch(FileSystemEventHandler):
    """Wakes a waiting thread when files come, and remembers which were renamed into place.

    root: absolute, without links.
    remote: others may write to the folder without this system's knowledge; then nothing is watched unless asked for.
    """

    def __init__(self, root: Path, watching: Watching = "auto") -> None:
        self.remote = watching == "polling"
        self._watching = watching
        self._kind: str | None = None  # of network file system
        self._root = root
        self._wake = threading.Event()
        self._poked = threading.Event()
        self._lock = threading.Lock()
        self._moved: set[str] = set()
        self._observer: InotifyObserver | None = None
        self._identity: tuple[int, int] | None = None
        self._warned = False

    def ensure(self) -> None:
        """Watch the folder that is there now; go on without hints when the system has no watch to give."""
        try:
            with folder_opened(str(self._root)) as fd:
                now = os.fstat(fd)
            identity = (now.st_dev, now.st_ino)
            if identity == self._identity and self._is_alive():
                return
            self.close()
            self._look_where_it_lies()
            if self._gets_hints():
                self._observe()
            self._identity, self._warned = identity, False
        except (FileNotFoundError, NotADirectoryError):
            self.close()  # the pass reports it
        except OSError as error:
            self.close()
            if not self._warned:
                _log.warning("watch_unavailable", folder=str(self._root), reason=str(error))
            self._warned = True

    def take_moved(self) -> set[str]:
        """Absolute paths that were renamed into place since the last call."""
        with self._lock:
            moved, self._moved = self._moved, set()
        return moved

    def wait(self, timeout: float, pause: float = 0.0) -> None:
        """Return at `poke`, at a hint but not before `pause` seconds, or after `timeout` seconds."""
        pause = min(pause, timeout)
        if not self._poked.wait(pause):
            self._wake.wait(timeout - pause)
        self._wake.clear()
        self._poked.clear()

    def poke(self) -> None:
        self._poked.set()
        self._wake.set()

    def close(self) -> None:
        """End the watch; a later `ensure` begins anew."""
        self._identity = None
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            observer.join()

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Called by watchdog's thread."""
        if isinstance(event, FileMovedEvent | DirMovedEvent) and event.dest_path:
            with self._lock:
                if len(self._moved) < MAX_MOVED:
                    self._moved.add(os.fsdecode(event.dest_path))
        self._wake.set()

    def _is_alive(self) -> bool:
        if not self._gets_hints():
            return True
        return self._observer is not None and all(emitter.is_alive() for emitter in self._observer.emitters)

    def _gets_hints(self) -> bool:
        return self._watching == "inotify" or not self.remote

    def _look_where_it_lies(self) -> None:
        kind = remote_kind(self._root)
        self.remote = self._watching == "polling" or kind is not None
        if kind is not None and kind != self._kind:
            _log.info("network_share", folder=str(self._root), filesystem=kind, watched=self._gets_hints())
        self._kind = kind

    def _observe(self) -> None:
        self._observer = InotifyObserver(generate_full_events=True)  # moves from outside are moves, too
        self._observer.start()
        self._observer.schedule(self, str(self._root), recursive=True, event_filter=list(_EVENTS))
