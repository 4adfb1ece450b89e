"""One life of a daemon under strace, fed from a folder, the socket and a broker: was anything said too early?"""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from brokers import NatsBench, RedisBench
from daemon_process import QUICK, ask, until
from digits import draw
from syscalls import Call, order_violations
from traced_daemon import TracedDaemon

from streams.batch import Batch
from streams.formats import encode


class Broker(NamedTuple):
    """make: a bench; config: its source; ack: what acknowledges the batch of this name, as it is on the wire."""

    make: Callable
    config: Callable[[str], str]
    ack: Callable[[str], str]


BROKERS = {
    "nats": Broker(
        NatsBench,
        lambda stream: f'kind = "nats"\nname = "nats"\nstream = "{stream}"',
        lambda name: rf"\$JS\.ACK\.[^ ]*?\.supsupd\.\d+\.{name.rpartition('/')[2]}\.",
    ),
    "redis": Broker(
        RedisBench,
        lambda stream: f'kind = "redis"\nname = "redis"\nkey = "{stream}"',
        lambda name: rf"XACK.*{name.rpartition('/')[2]}",
    ),
}


def payloads(count, seed):
    """Batches of one task, and one that is none."""
    batches = [draw(1, seed + turn, rows=32) for turn in range(count)]
    return [encode(Batch(batch["x"], batch["y"])) for batch in batches] + [b"no batch at all " * 9 + bytes([seed])]


def traced_life(
    folder: Path, count: int, broker: str | None = None, bug: str | None = None
) -> tuple[list[Call], Path, dict[str, str | None]]:
    """Its calls, the spool, and what acknowledges each of its batches, by SHA-256."""
    with contextlib.ExitStack() as stack:
        config, bench = QUICK, None
        if broker is not None:
            bench = BROKERS[broker].make()
            stack.callback(bench.cleanup)
            config += f"[[sources]]\n{BROKERS[broker].config(bench.stream)}\n"
        daemon = stack.enter_context(TracedDaemon(folder, config, bug))
        for number, payload in enumerate(payloads(count, 0)):
            (daemon.watch / f".{number}.tmp").write_bytes(payload)
            (daemon.watch / f".{number}.tmp").rename(daemon.watch / f"{number}.npz")
        daemon.start()
        sent = payloads(count, 100)
        for payload in sent if bench else ():
            bench.publish(payload)
        direct = payloads(1, 200)[0]
        daemon.client.submit("sent.npz", direct)
        expected = count + 1 + 1 + (len(sent) if bench else 0)
        until(lambda: len(daemon.client.batches()) == expected)
        daemon.wait()
        until(lambda: bench is None or bench.pending() == 0)
        assert daemon.stop() == 0
        rows = ask(daemon.state, "SELECT sha256, source, name FROM batch")
        acks = {
            sha256: BROKERS[source].ack(name) if source in BROKERS else told_over_socket(source)
            for sha256, source, name in rows
        }
        assert hashlib.sha256(direct).hexdigest() in acks
        return daemon.calls(), daemon.state / "spool", acks


def told_over_socket(source):
    return "HTTP/1.1 202" if source == "socket" else None


def violations_of_life(
    folder: Path, count: int, broker: str | None = None, bug: str | None = None
) -> tuple[int, list[str]]:
    """How many batches came, and what was out of order."""
    calls, spool, acks = traced_life(folder, count, broker, bug)
    return len(acks), order_violations(calls, spool, acks)
