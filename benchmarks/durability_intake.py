"""Brokers that lose acknowledgements, a learner that stands still, bad files, and half an hour of everything."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import durability_rows  # noqa: F401 - finds the tests
import numpy as np
from brokers import KafkaBench, NatsBench, tansu_path
from daemon_process import QUICK, until, what_was_learned
from digits import draw, held_out
from durability_rows import Outcome, Run, Skipped, descriptors, resident, run_tests, tell
from forked_daemon import ForkedDaemon, Nursery
from oracle import Given, violations

from streams.batch import Batch, digest_of
from streams.formats import encode
from supsupd.client import Client

MIB = 1 << 20
QUERIES = 10
"""For each batch of the long stream."""


def message(turn: int) -> bytes:
    batch = draw(turn // 10 % 3, turn, rows=32)
    return encode(Batch(batch["x"], batch["y"]))


# -- brokers -----------------------------------------------------------------------------------------------------------


def _configured(kind: str, bench: Any) -> str:
    where = {
        "nats": lambda: f'stream = "{bench.stream}"\nurl = "nats://127.0.0.1:{bench.proxy.port}"',
        "redis": lambda: f'key = "{bench.stream}"\nurl = "redis://127.0.0.1:{bench.proxy.port}"',
        "kafka": lambda: f'topic = "{bench.stream}"\nservers = "{bench.servers}"',
    }[kind]()
    return f'{QUICK}[[sources]]\nkind = "{kind}"\nname = "{kind}"\n{where}\n'


def cuts(kind: str, make: Callable[[], Any]) -> Callable[[Run], Outcome]:
    """A row: connections of this broker are cut while messages come, in every way; some come twice."""

    def measure(run: Run) -> Outcome:
        chance = random.Random(run.seed)
        with Nursery() as nursery:
            clean, _, _ = _consume(nursery, run, kind, make, lambda bench, turn: None)
            ways: dict[str, int] = {}

            def disturb(bench: Any, turn: int) -> None:
                way = chance.choice(["lose_requests", "lose_replies", "cut"])
                ways[way] = ways.get(way, 0) + 1
                _cut(bench.proxy, way)

            _, cut, problems = _consume(nursery, run, kind, make, disturb, clean)
        told = ", ".join(f"{count} {way}" for way, count in sorted(ways.items()))
        return Outcome(cut, f"{run.runs} messages, some twice, one effect each, masks bit-identical; {told}", problems)

    return measure


def _cut(proxy: Any, way: str) -> None:
    """One connection is lost, as soon as there is one, or as something is said on it; the next goes through."""
    before = proxy.cuts

    def is_cut() -> bool:
        getattr(proxy, way)()
        return bool(proxy.cuts > before)

    until(is_cut, 60)
    proxy.accept()


def _await_rows(daemon: ForkedDaemon, rows: int, seconds: float = 120) -> None:
    until(lambda: sum(daemon.client.status()["batches"].values()) >= rows, seconds)


def _consume(
    nursery: Nursery,
    run: Run,
    kind: str,
    make: Callable[[], Any],
    disturb: Callable[[Any, int], None],
    clean: Any = None,
) -> tuple[Any, int, list[str]]:
    """A daemon's life on a stream of its own: what it learned, how often it was cut, what is wrong."""
    bench = make()
    try:
        folder = run.folder / f"{kind}-{'calm' if clean is None else 'cut'}"
        with ForkedDaemon(nursery, folder, _configured(kind, bench)) as daemon:
            given, rows = [], 0
            daemon.start()
            for turn in range(run.runs):
                payload = message(turn)
                for _ in range(2 if turn % 9 == 4 else 1):
                    bench.publish(payload, name=f"{turn}.npz")
                    rows += 1
                given.append(Given(f"{turn}.npz", digest_of(payload), kind))
                disturb(bench, turn)
                if turn % 5:  # else two cuts come without anything between them
                    _await_rows(daemon, rows)
            _await_rows(daemon, rows)
            daemon.client.wait(120)
            if hasattr(bench, "pending"):
                until(lambda: bench.pending() == 0, 60)
            status = daemon.client.status()
            problems = [f"ended with {code}" for code in [daemon.stop()] if code != 0]
            problems += [f"{bench.proxy.cuts} cuts of {run.runs}"] * (clean is not None and bench.proxy.cuts < run.runs)
            problems += violations(daemon.state, given, clean, status=status, log=daemon.log)
            return what_was_learned(daemon.state), bench.proxy.cuts, problems
    finally:
        bench.cleanup()


def nats_bench() -> NatsBench:
    """Its consumer repeats after a second what was not acknowledged, and not after ten."""
    from nats.js.api import AckPolicy, ConsumerConfig

    bench = NatsBench()
    config = ConsumerConfig(
        durable_name="supsupd", ack_policy=AckPolicy.EXPLICIT, ack_wait=1.0, max_ack_pending=64, max_deliver=-1
    )
    bench.run(bench.streams.add_consumer(bench.stream, config))
    return bench


def kafka_bench() -> KafkaBench:
    if tansu_path() is None:
        raise Skipped("no Kafka broker (tansu): its mock cluster cannot be cut")
    return KafkaBench()


# -- a learner that stands still ---------------------------------------------------------------------------------------


def frozen(run: Run) -> Outcome:
    """Files and messages pile up before a learner that stands still: memory, what is held unacknowledged, and after."""
    bench = NatsBench()
    messages = run.runs // 5
    config = _configured("nats", bench)
    try:
        with (
            Nursery("learner_that_can_be_frozen") as nursery,
            ForkedDaemon(nursery, run.folder / "home", config) as daemon,
        ):
            for turn in range(4):
                daemon.drop(f"first-{turn}", **draw(0, turn, rows=32))
            daemon.start().wait()
            _probe(daemon.client)
            (daemon.state / "frozen").touch()
            given = [Given(f"{turn}.npz", _small(daemon, turn), str(daemon.watch)) for turn in range(run.runs)]
            for turn in range(messages):
                payload = _tiny(run.runs + turn)
                given.append(Given(f"m{turn}.npz", digest_of(payload), "nats"))
                bench.publish(payload, name=f"m{turn}.npz")
            before, most, unacknowledged = resident(daemon.process.pid), 0, 0
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                most = max(most, resident(daemon.process.pid))
                unacknowledged = max(unacknowledged, _unacknowledged(bench))
                _probe(daemon.client)
                time.sleep(0.2)
            waiting = daemon.client.status()["queue"]
            (daemon.state / "frozen").unlink()
            total = 4 + run.runs + messages
            _await_rows(daemon, total, 900)
            status = daemon.client.wait(900)
            problems = [f"ended with {code}" for code in [daemon.stop()] if code != 0]
            problems += violations(daemon.state, given, status=status, log=daemon.log)
            learned = status["batches"]["committed"] + status["batches"]["unsure"]
            problems += [f"{learned} of {total} were learned"] * (learned != total)
            growth = (most - before) / MIB
            problems += [f"memory grew by {growth:.1f} MiB"] * (growth > 64)
            problems += [f"{unacknowledged} messages were unacknowledged"] * (unacknowledged > 64)
            said = f"memory +{growth:.1f} MiB, at most {unacknowledged} unacknowledged, {waiting} in the queue"
            return Outcome(
                run.runs + messages, f"{run.runs} files and {messages} messages: {said}; all learned", problems
            )
    finally:
        bench.cleanup()


def _tiny(turn: int) -> bytes:
    batch = draw(0, turn, rows=8)
    return encode(Batch(batch["x"] + np.float32(1e-6 * turn), batch["y"]))


def _small(daemon: ForkedDaemon, turn: int) -> str:
    payload = _tiny(turn)
    (daemon.watch / f".{turn}.tmp").write_bytes(payload)
    (daemon.watch / f".{turn}.tmp").rename(daemon.watch / f"{turn}.npz")
    return digest_of(payload)


def _unacknowledged(bench: NatsBench) -> int:
    return int(bench.run(bench.streams.consumer_info(bench.stream, "supsupd")).num_ack_pending)


def _probe(client: Client) -> None:
    """Queries are answered meanwhile."""
    assert len(client.predict(held_out(0)[0][:4])) == 4


# -- bad files, and a long stream --------------------------------------------------------------------------------------


def bad_files(run: Run) -> Outcome:
    passed, problems = run_tests("tests/test_bad_files.py", "tests/test_directory.py", "tests/test_finished.py")
    return Outcome(passed, f"{passed} tests on a real daemon and folder: each refused in its own words", problems)


def soak(run: Run) -> Outcome:
    """A stream with ten queries for each batch; what memory and descriptors do from its first fifth on.

    Files are cleared away once they are learned, as whoever fills a folder for months has to.
    """
    with Nursery() as nursery, ForkedDaemon(nursery, run.folder / "home", QUICK) as daemon:
        daemon.start()
        points, asked = [], Asked()
        with _asking(daemon, asked):
            for turn in range(run.runs):
                daemon.drop(f"{turn:05}", **draw(turn // 50 % 8, turn, rows=32))
                if turn % 50 == 49 or turn == run.runs - 1:
                    asked.wanted = QUERIES * (turn + 1)
                    daemon.client.wait(120)
                    until(lambda: asked.count >= asked.wanted, 600)
                    for file in daemon.watch.iterdir():
                        file.unlink()
                    points.append((turn + 1, resident(daemon.process.pid), descriptors(daemon.process.pid)))
                    if turn % 500 == 499:
                        tell(f"{turn + 1} batches, {asked.count} queries, {points[-1][1] / MIB:.1f} MiB")
        status = daemon.client.status()
        code = daemon.stop()
        problems = [f"ended with {code}"] * (code != 0) + violations(daemon.state, status=status, log=daemon.log)
    slope, files = _growth(points)
    problems += [f"memory grows by {slope:.2f} MiB per 1,000 batches"] * (slope > 1)
    problems += [f"descriptors grow by {files}"] * (files > 2)
    said = f"{run.runs} batches, {asked.count} queries, {status['tasks']} tasks: memory {slope:+.2f} MiB per 1,000 "
    said += f"batches, from {_mib(points, len(points) // 5)} to {_mib(points, -1)} MiB"
    return Outcome(run.runs, f"{said}, descriptors {files:+d}", problems)


@dataclass
class Asked:
    """Queries that were answered, and that should be by now."""

    count: int = 0
    wanted: int = 0


@contextlib.contextmanager
def _asking(daemon: ForkedDaemon, asked: Asked) -> Iterator[None]:
    """Queries all the while, as many as are wanted by now."""
    done = threading.Event()
    rows = held_out(0)[0][:1]

    def ask() -> None:
        with Client(daemon.socket) as client:
            while not done.is_set():
                if asked.count < asked.wanted and client.status()["tasks"]:
                    for _ in range(asked.wanted - asked.count):
                        client.predict(rows)
                        asked.count += 1
                else:
                    done.wait(0.01)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _mib(points: Sequence[tuple[int, int, int]], at: int) -> str:
    return f"{points[at][1] / MIB:.0f}"


def _growth(points: Sequence[tuple[int, int, int]]) -> tuple[float, int]:
    """MiB per 1,000 batches (the median of the slopes between all pairs: one step is no trend), and descriptors, since
    the first fifth."""
    later = np.array(points[len(points) // 5 :], dtype=float)
    if len(later) < 3:
        return 0.0, 0
    first, second = np.triu_indices(len(later), 1)
    slope = float(np.median((later[second, 1] - later[first, 1]) / (later[second, 0] - later[first, 0])))
    return 1000 * slope / MIB, int(later[-1, 2] - later[0, 2])
