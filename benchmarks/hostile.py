"""Hostile queries and batches: what a daemon holds, and how long others beside them wait.

Ten queries over HTTP, or eight over gRPC, come at once, again and again: packed ones that unpack to a thousand times
their size, or to just under what is let through, and large ones that are not packed; or three Parquet files of as many
rows as may be. Beside them a client asks for one row at a time, and after them a good batch is learned. What the daemon
and its children hold is looked at all the while, in /proc. An attack is one function; `attacks` lists them.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
from common import ROOT
from paper_report import make_table, measure, report, write_json
from pyarrow import parquet
from rich.console import Console
from servers import Server, daemon_on_tcp, free_ports

from supsupd.client import Client
from supsupd.serving.grpc.messages import MESSAGE
from supsupd.serving.grpc.methods import SERVICE

RESULT = ROOT / "docs" / "results" / "hostile.json"
PROBER = Path(__file__).resolve().with_name("hostile_prober.py")
INPUTS, CLASSES, ROWS, BATCHES = 784, 10, 500, 6
HTTP_QUERIES, GRPC_QUERIES, FILES = 10, 8, 3
USUAL = 2.0
"""Times as long as usual a good batch may take after an attack: a client looks only now and then."""
MOST_GIB, MOST_MS = 1.5, 100.0
LOOK_SECONDS, WARM_SECONDS = 0.02, 2.0
GIB, MIB = 1 << 30, 1 << 20
UNPACKED = 64 * MIB - 4096


@dataclass(frozen=True)
class Target:
    """The daemon that is attacked: over HTTP, over gRPC, and in its watched folder."""

    server: Server
    grpc_address: str
    watch: Path
    socket: Path


@dataclass(frozen=True)
class Attack:
    """Something hostile. `once` does it and says how each of its parts was answered.

    is_hostile: False for what only keeps the processors as busy as an attack's own clients do, to compare with.
    """

    name: str
    once: Callable[[Target], Counter[str]]
    is_hostile: bool = True


# -- queries ----------------------------------------------------------------------------------------------------------


def zeros_of_json(size: int) -> bytes:
    """A query of about so many bytes of text: rows of zeros, as short as they can be written."""
    rows = size // (2 * INPUTS)
    data = b",".join([b"0"] * (rows * INPUTS))
    return b'{"inputs":[{"name":"x","datatype":"FP32","shape":[%d,%d],"data":[%b]}]}' % (rows, INPUTS, data)


def digits_of_json(size: int) -> bytes:
    """The same, but for one digit in a hundred, so that it packs some 150 to 1 only."""
    text = bytearray(zeros_of_json(size))
    start = text.index(b"[0") + 1
    places = np.random.default_rng(0).integers(0, (len(text) - start) // 2 - INPUTS, len(text) // 300) * 2 + start
    np.frombuffer(text, np.uint8)[places] = ord("7")
    return bytes(text)


def raw_bytes(size: int) -> tuple[bytes, int]:
    """A query of raw bytes, which become floats of eight times their size, and where they begin."""
    rows = size // INPUTS
    tensor = {
        "name": "x",
        "datatype": "UINT8",
        "shape": [rows, INPUTS],
        "parameters": {"binary_data_size": rows * INPUTS},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + bytes(rows * INPUTS), len(head)


def ask_over_http(body: bytes, **headers: str) -> Callable[[Target], Counter[str]]:
    """Ten such queries at once."""

    def ask(target: Target) -> str:
        host, port = target.server.address.split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=300)
        try:
            connection.request("POST", "/v2/models/supsup/infer", body, {**target.server.headers, **headers})
            answer = connection.getresponse()
            answer.read()
            return str(answer.status)
        except OSError:  # refused before all was sent
            return "cut"
        finally:
            connection.close()

    return lambda target: _at_once(HTTP_QUERIES, ask, target)


def ask_over_grpc(rows: int, compression: grpc.Compression | None = None) -> Callable[[Target], Counter[str]]:
    """Eight queries of so many rows at once."""
    request = MESSAGE["ModelInferRequest"](model_name="supsup")
    request.inputs.add(name="x", datatype="UINT8", shape=[rows, INPUTS])
    request.raw_input_contents.append(bytes(rows * INPUTS))
    payload = request.SerializeToString()

    def ask(target: Target) -> str:
        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        metadata = [("authorization", target.server.headers["Authorization"])]
        with grpc.insecure_channel(target.grpc_address, [*options, ("grpc.use_local_subchannel_pool", 1)]) as channel:
            try:
                call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
                call(payload, metadata=metadata, timeout=120, compression=compression)
            except grpc.RpcError as error:
                return str(error.code().name)
        return "OK"

    return lambda target: _at_once(GRPC_QUERIES, ask, target)


def pack_beside(target: Target) -> Counter[str]:
    """What the library of gRPC does before it sends packed messages."""
    body = bytes(UNPACKED)
    return _at_once(GRPC_QUERIES, lambda _: str(bool(zlib.compress(body))), target)


# -- batches ----------------------------------------------------------------------------------------------------------


def parquet_of(rows: int, inputs: int, noisy: int, seed: int) -> bytes:
    """A file of rows of int8: `noisy` inputs at random, all others one value, and a label of ten."""
    random = np.random.default_rng(seed)
    columns = {f"x{i}": np.full(rows, seed % 100, np.int8) for i in range(inputs)}
    columns |= {f"x{i}": random.integers(-128, 128, rows, np.int8) for i in range(noisy)}
    columns["y"] = (np.arange(rows) // 100 % CLASSES).astype(np.int8)
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file, compression="zstd")
    return file.getvalue()


def drop_files(rows: int, inputs: int, noisy: int) -> Callable[[Target], Counter[str]]:
    """Three such files at once in the watched folder, each another one; how the ledger judged them."""
    seeds = count(rows)

    def drop(target: Target) -> Counter[str]:
        names = set()
        for seed in (next(seeds) for _ in range(FILES)):
            names.add(f"hostile-{seed}.parquet")
            file = target.watch / f".hostile-{seed}.tmp"
            file.write_bytes(parquet_of(rows, inputs, noisy, seed))
            file.rename(target.watch / f"hostile-{seed}.parquet")
        with Client(target.socket) as client:
            client.wait(300)
            rows_of = [row for row in client.batches() if row["name"] in names]
        return Counter(f"{row['state']} {(row['reason'] or '').partition(':')[0]}"[:24] for row in rows_of)

    return drop


def good_batch(task: int, batch: int) -> bytes:
    """One of a task, whose rows of ten classes lie around middles of its own."""
    middles = np.random.default_rng(task).normal(size=(CLASSES, INPUTS))
    random = np.random.default_rng([task, batch])
    labels = random.integers(0, CLASSES, ROWS)
    file = io.BytesIO()
    np.savez(file, x=(middles[labels] + random.normal(size=(ROWS, INPUTS))).astype(np.float32), y=labels)
    return file.getvalue()


def learn_one(target: Target, number: int) -> float:
    """Seconds from handing a good batch in until it is learned."""
    with Client(target.socket) as client:
        began = time.monotonic()
        batch = client.submit(f"good-{number}.npz", good_batch(0, number))["batch"]
        client.wait(300)
        seconds = time.monotonic() - began
        assert client.batch(batch)["state"] == "committed"
    return seconds


def _at_once(count: int, ask: Callable[[Target], str], target: Target) -> Counter[str]:
    with ThreadPoolExecutor(count) as threads:
        return Counter(threads.map(lambda _: ask(target), range(count)))


def attacks() -> list[Attack]:
    """All of them, with their bytes."""
    gzip = {"Content-Encoding": "gzip"}
    raw, head = raw_bytes(UNPACKED)
    return [
        Attack("10 by HTTP, JSON packed 1000:1", ask_over_http(_gzip(zeros_of_json(UNPACKED)), **gzip)),
        Attack("10 by HTTP, JSON packed within 200:1", ask_over_http(_gzip(digits_of_json(UNPACKED)), **gzip)),
        Attack("10 by HTTP, JSON of 16 MB", ask_over_http(digits_of_json(16 * MIB))),
        Attack("10 by HTTP, 64 MiB raw", ask_over_http(raw, **{"Inference-Header-Content-Length": str(head)})),
        Attack("nobody, while 8 threads pack 64 MB", pack_beside, is_hostile=False),
        Attack("8 by gRPC, packed 1000:1", ask_over_grpc(UNPACKED // INPUTS, grpc.Compression.Gzip)),
        Attack("8 by gRPC, 16 MiB raw", ask_over_grpc((16 * MIB - 4096) // INPUTS)),
        Attack("3 Parquet files, 1,000,000 x 64 of one value", drop_files(1_000_000, 64, 0)),
        Attack("3 Parquet files, 1,000,000 x 64 within 200:1", drop_files(1_000_000, 64, 1)),
        Attack("3 Parquet files, 100,000 x 784 within 200:1", drop_files(100_000, INPUTS, 8)),
    ]


def _gzip(body: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    return stream.compress(body) + stream.flush()


# -- what is looked at ------------------------------------------------------------------------------------------------


def tree_bytes(pid: int) -> int:
    """What a process and its children hold now: the sum of their resident sets."""
    return sum(_resident(found) for found in _tree(pid))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text(encoding="utf-8").split()
        except OSError:  # its thread has just ended
            continue
        for child in found:
            yield from _tree(int(child))


def _resident(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS:")), 0)


@contextmanager
def watched(pid: int) -> Iterator[list[int]]:
    """What is held, time after time, while the block runs."""
    seen, ended = [tree_bytes(pid)], threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_SECONDS):
            seen.append(tree_bytes(pid))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        ended.set()
        looking.join()


@contextmanager
def probed(target: Target) -> Iterator[dict[str, Any]]:
    """How long one row takes, time after time, while the block runs; filled in at its end."""
    host, port = target.server.address.split(":")
    row = np.random.default_rng(1).normal(size=INPUTS).astype("<f4").tobytes().hex()
    asked = {"host": host, "port": int(port), "headers": target.server.headers, "row": row}
    command = [sys.executable, str(PROBER), json.dumps(asked)]
    found: dict[str, Any] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        time.sleep(WARM_SECONDS)
        yield found
        found |= json.loads(process.communicate()[0])


def look_at(attack: Attack, target: Target, rounds: int, number: int) -> dict[str, Any]:
    """What was held, and how long a row took, during so many rounds of an attack."""
    answers: Counter[str] = Counter()
    began = time.monotonic()
    with watched(target.server.pid) as seen, probed(target) as found:
        for _ in range(rounds):
            answers += attack.once(target)
    learned = learn_one(target, number)
    milliseconds = np.array(found["seconds"]) * 1000
    return {
        "name": attack.name,
        "answers": dict(answers),
        "seconds": round(time.monotonic() - began, 2),
        "rest_gib": seen[0] / GIB,
        "peak_gib": max(seen) / GIB,
        "rows": len(milliseconds),
        "p50_ms": float(np.percentile(milliseconds, 50)),
        "p99_ms": float(np.percentile(milliseconds, 99)),
        "longest_ms": float(milliseconds.max()),
        "failures": len(found["failures"]),
        "good_seconds": learned,
        "is_hostile": attack.is_hostile,
    }


# -- the whole --------------------------------------------------------------------------------------------------------


def teach(socket: Path) -> None:
    """Two tasks of rows with ten classes."""
    with Client(socket) as client:
        for task in range(2):
            for batch in range(BATCHES):
                client.submit(f"task-{task}-{batch}.npz", good_batch(task, batch))
        client.wait(300)
        assert client.status()["tasks"] == 2


def run(rounds: int) -> dict[str, Any]:
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="supsupd-hostile-") as name:
        state = Path(name) / "state"
        state.mkdir(mode=0o700)
        with daemon_on_tcp(state, f'grpc = "127.0.0.1:{port}"\n') as (daemon, server):
            teach(daemon.socket)
            target = Target(server, f"127.0.0.1:{port}", daemon.watch, daemon.socket)
            usual = learn_one(target, BATCHES)
            rows = [look_at(attack, target, rounds, number) for number, attack in enumerate(attacks(), BATCHES + 1)]
    return {"rows": rows, "settings": {"rounds": rounds, "usual_seconds": usual}, "measures": measures(rows, usual)}


def measures(rows: list[dict[str, Any]], usual: float) -> list[dict[str, Any]]:
    """What was wanted of each attack."""
    found = [measure("a good batch, from its post until it is learned, usually, in s", round(usual, 2))]
    for row in rows:
        if not row["is_hostile"]:
            found.append(measure(f"{row['name']}: p99 of a row in ms", row["p99_ms"]))
            continue
        told = ", ".join(f"{answer}: {count}" for answer, count in row["answers"].items())
        found += [
            measure(f"{row['name']}: GiB in all", round(row["peak_gib"], 2), MOST_GIB, sense="≤"),
            measure("  a row beside them, p50 in ms", row["p50_ms"]),
            measure("  p99 in ms", row["p99_ms"], MOST_MS, sense="≤"),
            measure("  rows without an answer", row["failures"], 0, sense="="),
            measure("  a good batch after them, in s", round(row["good_seconds"], 2), USUAL * usual, sense="≤"),
            measure("  the others were told", told),
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="of each attack")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and write nothing")
    options = parser.parse_args()
    started = time.monotonic()
    result = run(options.rounds)
    result = report(
        result, "hostile", f"python benchmarks/hostile.py --rounds {options.rounds}", 0, time.monotonic() - started
    )
    if options.json:
        print(json.dumps(result))
        return
    Console().print(make_table(result))
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
