"""Wiring and lifecycle: what is opened in which order, who runs in which thread, and how it ends.

Start: lock, migrate, open, load, listen, watch, `ready`. One thread learns, one reads each source, one answers HTTP;
the main thread waits for a signal.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import structlog

from storage.cursors import load_cursors
from storage.db import Database, SchemaMismatch, StoreError, upgrade
from storage.features import FeaturesCorrupt
from storage.lock import StateLock, StateLocked
from storage.masks import MaskCorrupt
from storage.spool import Spool
from streams.directory import DirectorySettings, DirectorySource
from streams.formats import Limits
from supsupd.config import ConfigError, Settings
from supsupd.founding import check_network
from supsupd.intake import Intake
from supsupd.learning.device import Device, pick_device, use_threads
from supsupd.learning.modules import UnsupportedNetwork
from supsupd.learning.network import NetworkMismatch
from supsupd.learning.pretrained import PretrainedMismatch
from supsupd.service import Service
from supsupd.serving.http import create_app
from supsupd.serving.server import HttpServer, SocketRefused, bind_unix
from supsupd.worker import Worker

EXIT_DATA, EXIT_OS, EXIT_BUSY, EXIT_CONFIG = 65, 71, 75, 78
CHECK_SECONDS = 1.0
LEARNING_NICE = 10
"""Of the learning thread: a query comes first where both want the same core, and training still goes on."""
SWITCH_SECONDS = 0.0002
"""A query waits at most so long for the training thread to hand over the interpreter (Python's own: 5 ms)."""

log = structlog.get_logger("supsupd.daemon")


def run(settings: Settings) -> int:
    """Runs until SIGTERM or SIGINT; the exit code. What prevents a start is one line on stderr."""
    try:
        device = pick_device(settings.device)
        check_network(settings.network)
    except (RuntimeError, UnsupportedNetwork, PretrainedMismatch) as error:
        return _refuse(str(error), EXIT_CONFIG)
    try:
        with StateLock.acquire(settings.state):
            return Daemon(settings, device).run()
    except (ConfigError, PretrainedMismatch) as error:
        return _refuse(str(error), EXIT_CONFIG)
    except (StateLocked, SocketRefused) as error:
        return _refuse(str(error), EXIT_BUSY)
    except (SchemaMismatch, NetworkMismatch, MaskCorrupt, FeaturesCorrupt, StoreError) as error:
        return _refuse(str(error), EXIT_DATA)
    except OSError as error:
        return _refuse(f"{error.filename or settings.state}: {error.strerror or error}", EXIT_OS)


def _refuse(text: str, code: int) -> int:
    print(f"supsupd: {text}", file=sys.stderr)  # noqa: T201 - said before and instead of logging
    return code


@contextmanager
def signals_set(event: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT only set `event`."""
    previous = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Daemon:
    """One run over one state directory, whose lock is held.

    Args:
        settings: the configuration.
        device: where masks are trained and run.
    """

    def __init__(self, settings: Settings, device: Device) -> None:
        self._settings = settings
        self._device = device
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def run(self) -> int:
        """Starts, serves until a signal, and ends within `shutdown_seconds` and a little."""
        with signals_set(self._stopping), ExitStack() as stack:
            server = self._startup(stack)
            while not self._stopping.wait(CHECK_SECONDS):
                if not server.alive:
                    log.error("http_server_gone")
                    return EXIT_OS
        return 0

    def _startup(self, stack: ExitStack) -> HttpServer:
        settings = self._settings
        use_threads(settings.learning.threads)
        sys.setswitchinterval(SWITCH_SECONDS)
        upgrade(settings.database)
        database = Database.open(settings.database)
        stack.callback(database.close)
        spool = Spool(settings.state / "spool")
        worker = Worker(settings, database, spool, self._device)
        worker.load()
        intake = Intake(database, spool, settings.intake, worker.notify, settings.recognition.task_rule)
        self._add_sources(intake, database)
        service = Service(settings, database, worker, intake)
        server = HttpServer(create_app(service, settings.serving), [bind_unix(settings.socket)])
        server.start()
        stack.callback(self._shutdown, server, worker, intake, service)
        for progress in intake.progress:
            self._run_thread(f"watch {progress.source.name}", intake.loop, progress, self._stopping)
        self._run_thread("learn", self._learn, worker)
        log.info(
            "ready",
            socket=str(settings.socket),
            state=str(settings.state),
            watch=[str(folder) for folder in settings.watch],
            device=str(self._device),
            tasks=len(worker.predictor.tasks) if worker.predictor else 0,
        )
        return server

    def _add_sources(self, intake: Intake, database: Database) -> None:
        settings = self._settings.intake
        times = DirectorySettings(
            settle_seconds=settings.settle_seconds,
            incomplete_seconds=settings.incomplete_seconds,
            max_batch_bytes=settings.max_batch_bytes,
            limits=Limits(bytes=settings.max_unpacked_bytes),
            tasks=self._settings.recognition.task_rule,
        )
        for folder in self._settings.watch:
            with database.read() as session:
                # Named by its path: the cursors survive another order of folders.
                known = load_cursors(session, str(folder))
            intake.add(DirectorySource(folder, name=str(folder), cursors=known, settings=times))

    def _learn(self, worker: Worker) -> None:
        # Of this thread alone (Linux).
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEARNING_NICE)
        worker.loop(self._stopping)

    def _run_thread(self, name: str, target: object, *args: object) -> None:
        # Daemonic: a training that does not end in time must not hold the process.
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)  # type: ignore[arg-type]
        thread.start()
        self._threads.append(thread)

    def _shutdown(self, server: HttpServer, worker: Worker, intake: Intake, service: Service) -> None:
        """Refuses new work, lets what runs end; a batch in training is simply redone at the next start."""
        self._stopping.set()
        log.info("stopping")
        deadline = time.monotonic() + self._settings.serving.shutdown_seconds
        service.draining = True
        worker.notify()
        for progress in intake.progress:
            progress.source.poke()
        server.stop(timeout=self._settings.serving.shutdown_seconds / 2)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for progress in intake.progress:
            progress.source.close()
        late = [thread.name for thread in self._threads if thread.is_alive()]
        log.info("stopped", unfinished=late)
        if late:
            # Neither the database nor torch may be torn down under a running thread; the store needs no farewell.
            sys.stderr.flush()
            os._exit(0)
