"""Wiring and lifecycle: what is opened in which order, who runs in which thread, and how it ends.

Start: lock, migrate, open, load, listen, watch, `ready`. One thread learns, one reads each source, one answers HTTP;
the main thread waits for a signal.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import structlog

from storage.db import (
    Database,
    DiskFull,
    SchemaMismatch,
    StoreError,
    StoreFailed,
    StoreTaken,
    StoreUnavailable,
    upgrade,
)
from storage.durable import SyncFailed
from storage.failpoints import hit
from storage.features import FeaturesCorrupt
from storage.lock import StateLock, StateLocked
from storage.spool import Spool
from storage.work_folder import remove_abandoned
from streams.broker import MissingExtra
from supsupd import tracing
from supsupd.config import ConfigError, Settings
from supsupd.founding import check_network
from supsupd.health import Health, is_fatal
from supsupd.intake import Intake
from supsupd.learning.device import Device, lacks_memory, pick_device, use_threads
from supsupd.learning.modules import UnsupportedNetwork
from supsupd.learning.network import NetworkMismatch
from supsupd.learning.pretrained import PretrainedMismatch
from supsupd.reading import process_decoder
from supsupd.reception import open_server
from supsupd.reload import Reloader
from supsupd.service import Service
from supsupd.serving.front import Front
from supsupd.serving.http.accepting import raise_file_limit
from supsupd.serving.listeners import SocketRefused
from supsupd.serving.server import Server
from supsupd.signals import signals_set
from supsupd.sources import make_sources
from supsupd.staging import Staging
from supsupd.systemd import SocketsUnusable, Supervisor, take_sockets
from supsupd.worker import Worker

EXIT_DATA, EXIT_OS, EXIT_IO, EXIT_BUSY, EXIT_CONFIG = 65, 71, 74, 75, 78
CHECK_SECONDS = 1.0
SILENT_SECONDS = 10.0
"""An event loop that has done nothing for so long hangs, and a watchdog is not told that all is well."""
LEARNING = "learn"
FAREWELL_SECONDS = 1.0
"""What a process that ends spends at most on giving a batch in training back, and on its last line."""
LEARNING_NICE = 19
"""Of the learning thread: a query comes first where both want the same core, and training still goes on."""
SWITCH_SECONDS = 0.0002
"""A query waits at most so long for the training thread to hand over the interpreter (Python's own: 5 ms)."""

log = structlog.get_logger("supsupd.daemon")


def run(settings: Settings, load: Callable[[], Settings] | None = None) -> int:
    """Runs until SIGTERM or SIGINT; the exit code. What prevents a start is one line on stderr.

    load: reads the configuration again, at SIGHUP, and raises ConfigError; None: it stays as it is.
    """
    supervisor = Supervisor.from_environment()
    try:
        handed = take_sockets()
        device = pick_device(settings.device)
        check_network(settings.network)
    except (RuntimeError, UnsupportedNetwork, PretrainedMismatch, SocketsUnusable) as error:
        return _refuse(str(error), EXIT_CONFIG)
    try:
        with StateLock.acquire(settings.state):
            return Daemon(settings, device, load or (lambda: settings), supervisor, handed).run()
    except (ConfigError, MissingExtra, PretrainedMismatch) as error:
        return _refuse(str(error), EXIT_CONFIG)
    except (StateLocked, StoreTaken, StoreUnavailable, SocketRefused) as error:
        return _refuse(str(error), EXIT_BUSY)
    except (StoreFailed, SyncFailed) as error:
        return _refuse(str(error), EXIT_IO if is_fatal(error) else EXIT_OS)
    except DiskFull as error:
        return _refuse(str(error), EXIT_OS)
    except (SchemaMismatch, NetworkMismatch, FeaturesCorrupt, StoreError) as error:
        return _refuse(str(error), EXIT_DATA)
    except OSError as error:
        return _refuse(f"{error.filename or settings.state}: {error.strerror or error}", EXIT_OS)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        return _refuse(
            "there is not enough memory; bank.memory_bytes and learning.memory_bytes say how much is used", EXIT_OS
        )


def _refuse(text: str, code: int) -> int:
    """Said before and instead of logging, and not for long to whoever has stopped reading."""
    line = f"supsupd: {text}\n".encode("utf-8", "backslashreplace")
    saying = threading.Thread(target=os.write, args=(sys.stderr.fileno(), line), daemon=True)
    saying.start()
    saying.join(FAREWELL_SECONDS)
    return code


class Daemon:
    """One run over one state directory, whose lock is held.

    Args:
        settings: the configuration.
        device: where masks are trained and run.
        load: reads the configuration again.
        supervisor: is told how it goes.
        handed: sockets that listen already.
    """

    def __init__(
        self,
        settings: Settings,
        device: Device,
        load: Callable[[], Settings],
        supervisor: Supervisor,
        handed: Sequence[socket.socket] = (),
    ) -> None:
        self._settings = settings
        self._device = device
        self._load = load
        self._supervisor = supervisor
        self._handed = handed
        self._stopping = threading.Event()
        self._hangup = threading.Event()
        self._threads: list[threading.Thread] = []
        self._health = Health(self._fail)
        self._failure: tuple[str, int] | None = None

    def run(self) -> int:
        """Starts, serves until a signal, and ends within `shutdown_seconds` and a little."""
        with signals_set(self._stopping, self._hangup) as wait_for_signal, ExitStack() as stack:
            server, front = self._startup(stack)
            reloader = Reloader(self._settings, self._load, front, server)
            status = f"serves on {', '.join(server.addresses)}"
            self._supervisor.ready(status)
            while not self._stopping.is_set():
                wait_for_signal(min(CHECK_SECONDS, self._supervisor.ping_seconds))
                if gone := self._find_gone(server):
                    log.error(gone)
                    return EXIT_OS
                if server.silent_seconds < SILENT_SECONDS:
                    self._supervisor.alive()
                if self._hangup.is_set():
                    self._hangup.clear()
                    self._supervisor.reloading()
                    reloader.reload()
                    self._supervisor.ready(status)
        return 0 if self._failure is None else _refuse(*self._failure)

    def _find_gone(self, server: Server) -> str | None:
        """What the daemon cannot be without and has ended."""
        if not server.alive:
            return "http_server_gone"
        gone = [thread.name for thread in self._threads if not thread.is_alive()]
        if not gone or self._stopping.is_set():
            return None
        return "learning_gone" if LEARNING in gone else "source_gone"

    def _fail(self, who: str, error: Exception) -> None:
        """What the disk said it has may be gone, or the store is another daemon's: nothing more is written."""
        if self._failure is None:
            log.error("fatal", who=who, reason=str(error))
            taken = isinstance(error, StoreTaken)
            text = f"{who}: {error}" if taken else f"{who}: {error}; start again: what is on the disk is whole"
            self._failure = text, EXIT_BUSY if taken else EXIT_IO
        self._stopping.set()

    def _startup(self, stack: ExitStack) -> tuple[Server, Front]:
        settings = self._settings
        if settings.tracing.endpoint is not None:
            tracing.begin(settings.tracing.endpoint)
            stack.callback(tracing.end)
        raise_file_limit()
        use_threads(settings.learning.threads)
        sys.setswitchinterval(SWITCH_SECONDS)
        for folder in (settings.state, settings.state / "backup"):
            remove_abandoned(folder)
        upgrade(settings.store, state=settings.state)
        hit("start.upgraded")
        database = Database.open(settings.store)
        stack.callback(database.close)
        spool = Spool(settings.state / "spool")
        # Neither of the two waits for the other.
        decoders = process_decoder(settings), process_decoder(settings, settings.intake.decode_processes)
        for decoder in decoders:
            stack.callback(decoder.close)
            threading.Thread(target=decoder.start, daemon=True).start()  # while all else is loaded
        worker = Worker(settings, database, spool, self._device, decoders[0], self._health)
        worker.clean_spool()
        worker.load(crashed=True)
        hit("start.loaded")
        staging = Staging(database, spool, settings.intake, decoders[1], settings.recognition.task_rule, self._health)
        intake = Intake(staging, settings.intake, worker.notify, self._health)
        for source in make_sources(settings, database):
            intake.add(source)
        service = Service(settings, database, worker, intake, self._health)
        front = Front(service, settings.serving)
        server = open_server(settings, front, self._handed)
        server.start()
        stack.callback(self._shutdown, server, worker, intake, service, front)
        for progress in intake.progress:
            self._run_thread(f"source {progress.source.name}", intake.loop, progress, self._stopping)
        self._run_thread(LEARNING, self._learn, worker)
        gc.collect()
        gc.freeze()  # what is there now stays: looking through it again and again holds everything up
        gc.collect()  # of nothing: how often all is looked through goes by what was left the last time
        log.info(
            "ready",
            listening=server.addresses,
            state=str(settings.state),
            sources=[progress.source.name for progress in intake.progress],
            device=str(self._device),
            tasks=len(worker.predictor.tasks) if worker.predictor else 0,
        )
        return server, front

    def _learn(self, worker: Worker) -> None:
        # Of this thread alone (Linux).
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEARNING_NICE)
        worker.loop(self._stopping)

    def _run_thread(self, name: str, target: object, *args: object) -> None:
        # Daemonic: a training that does not end in time must not hold the process.
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)  # type: ignore[arg-type]
        thread.start()
        self._threads.append(thread)

    def _shutdown(self, server: Server, worker: Worker, intake: Intake, service: Service, front: Front) -> None:
        """Refuses new work, lets what runs end; a batch in training is simply redone at the next start."""
        self._stopping.set()
        log.info("stopping")
        self._supervisor.stopping()
        service.draining = front.draining = True
        worker.notify()
        for progress in intake.progress:
            progress.source.poke()
        if self._failure is None:
            server.join(front.limits.drain_seconds)  # not ready, and answering: whoever balances the load looks away
        deadline = time.monotonic() + front.limits.shutdown_seconds
        server.stop(timeout=front.limits.shutdown_seconds / 2)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for progress in intake.progress:
            progress.source.close()
        late = [thread.name for thread in self._threads if thread.is_alive()]
        late += ["predict"] if front.batcher.running else []
        log.info("stopped", unfinished=late)
        if late:
            farewell = threading.Thread(target=worker.release, daemon=True)  # in vain while the store is locked
            farewell.start()
            farewell.join(FAREWELL_SECONDS)
            # Neither the database nor torch may be torn down under a running thread; the store needs no farewell.
            os._exit(_refuse(*self._failure) if self._failure else 0)
