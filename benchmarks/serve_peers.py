"""Serving beside MLServer: the same network and masks, the same client, the same machine, in one run.

MLServer (PyPI) runs in an environment of its own, with `mlserver_runtime.py`, which answers by the code that answers in
the daemon. To make it:

    python -m venv PATH && PATH/bin/pip install mlserver 'uvloop<0.22' httptools

(its workers do not start with a newer uvloop, and uvicorn's faster parser does not come with it). Of its configurations
the one that answers most is taken, for each number of rows. Both servers are up at once and asked in turn, so that both
see the same machine; the client is tritonclient with 8 connections, one process for both. MLServer takes no binary
tensors over HTTP: ours get them, and are asked in JSON too. Bare connections with requests made beforehand show what
the servers do where the client costs nothing; canned answers show what the clients could ask at most.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from clients import Clients, Found, Order
from clients_runner import Questions, requests_of
from common import ROOT
from mlserver_process import MlserverSettings
from paper_report import make_table, measure, report, write_json
from rich.console import Console
from rich.table import Table
from serve_peers_setup import CONNECTIONS, LEAST_TIMES, OURS, OURS_JSON, PEER, WAYS, Case, Place, Way, ask
from servers import Server, ServerFailed, canned_server, daemon_on_tcp
from tritonclient.http import InferenceServerClient

from supsupd import logs

RESULT = ROOT / "docs" / "results" / "serve_peers.json"
TRIAL_SECONDS = 3.0
PEERS = (
    MlserverSettings("its defaults"),
    MlserverSettings("no worker, no log", workers=0, debug=False, gzip=False),
    MlserverSettings("1 worker, no log", workers=1, debug=False, gzip=False),
    MlserverSettings("2 workers, no log", workers=2, debug=False, gzip=False),
    MlserverSettings("no worker, no log, 8 joined", workers=0, joined=8, debug=False, gzip=False),
    MlserverSettings("1 worker, no log, 8 joined", workers=1, joined=8, debug=False, gzip=False),
)


def try_peers(place: Place, clients: Clients, tasks: int, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Requests a second of each of MLServer's configurations, for each number of rows."""
    tried = []
    for settings in PEERS:
        with place.mlserver(tasks, settings) as server:
            for count in rows:
                if settings.joined and count > 1:  # whose rows are whose cannot be told
                    continue
                found = ask(clients, server, place.order(server, Case(tasks, count, False), PEER, TRIAL_SECONDS))
                tried.append({"settings": settings.name, "rows": count, "per_second": found.per_second})
    return tried


def best_peer(tried: list[dict[str, Any]], rows: int, given: bool) -> MlserverSettings:
    """The configuration that answered most; joined requests cannot name their tasks."""
    usable = {settings.name: settings for settings in PEERS if not (given and settings.joined)}
    mine = [trial for trial in tried if trial["rows"] == rows and trial["settings"] in usable]
    return usable[max(mine, key=lambda trial: trial["per_second"])["settings"]]


def answers(order: Order) -> list[list[np.ndarray]]:
    """What each question is answered with: the outputs by name."""
    questions, client = Questions(order.to_dict()), InferenceServerClient(order.address)
    outputs = questions.outputs()
    try:
        found = [
            client.infer(
                "supsup",
                questions.tensor(i),
                outputs=outputs,
                headers=dict(order.headers),  # the client adds to them
                parameters=questions.parameters(i),
            )
            for i in range(len(questions.x))
        ]
    finally:
        client.close()
    return [[answer.as_numpy(output.name()).reshape(-1) for output in outputs] for answer in found]


def check_same(ours: Order, theirs: Order) -> None:
    """Raises ServerFailed unless both answer every question alike, up to the rounding of floating-point numbers."""
    for number, pair in enumerate(zip(answers(ours), answers(theirs), strict=True)):
        if not all(np.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*pair, strict=True)):
            raise ServerFailed(f"question {number} of {ours.questions.name} is answered in two ways")


def time_case(
    place: Place, clients: Clients, case: Case, servers: dict[bool, Server], rounds: int, seconds: float
) -> dict[str, Found]:
    """All ways in turn, so many times; `servers`: ours under False, the peer under True."""
    orders_of = {way: place.order(servers[way.peer], case, way, seconds) for way in WAYS}
    for way in (OURS, OURS_JSON):
        check_same(orders_of[way], orders_of[PEER])
    found = {way.name: Found() for way in WAYS}
    for _ in range(rounds):
        for way, order in orders_of.items():
            found[way.name].add(ask(clients, servers[way.peer], order))
    return found


def time_tasks(
    place: Place, clients: Clients, cases: list[Case], tried: list[dict[str, Any]], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """The cases of one number of tasks: one daemon, and as many MLServers as there are best configurations."""
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        _, ours = stack.enter_context(daemon_on_tcp(place.state(cases[0].tasks)))
        peers: dict[MlserverSettings, Server] = {}
        for case in cases:
            settings = best_peer(tried, case.rows, case.given)
            if settings not in peers:
                peers[settings] = stack.enter_context(place.mlserver(case.tasks, settings))
            found = time_case(place, clients, case, {False: ours, True: peers[settings]}, rounds, seconds)
            ways = {way: times.to_json() for way, times in found.items()}
            rows.append(asdict(case) | {"peer": settings.name, "ways": ways})
    return rows


def time_clients(place: Place, clients: Clients, cases: list[Case], seconds: float) -> list[dict[str, Any]]:
    """Requests a second that the clients make of a server that does nothing but answer, for each way to ask ours."""
    found = []
    with daemon_on_tcp(place.state(cases[0].tasks)) as (_, ours):
        for case in cases:
            for way in [way for way in WAYS if not way.peer]:
                order = place.order(ours, case, way, seconds)
                with canned_server(place.folder, whole_answer(order)) as server:
                    made = ask(clients, server, place.order(server, case, way, seconds))
                found.append(asdict(case) | {"way": way.name, "per_second": made.per_second})
    return found


def whole_answer(order: Order) -> bytes:
    """What the first question is answered with, from the status line on, as of a connection that is kept."""
    host, port = order.address.rsplit(":", 1)
    request = requests_of(order.to_dict())[0].replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(request)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    return answer.replace(b"onnection: close", b"onnection: keep-alive")


def run(place: Place, tasks: list[int], rounds: int, seconds: float) -> dict[str, Any]:
    """Everything, one number of tasks after the other."""
    rows: list[dict[str, Any]] = []
    for count in tasks:
        place.prepare(count)
    with Clients() as clients:
        tried = try_peers(place, clients, tasks[0], list(LEAST_TIMES))
        for count in tasks:
            cases = [Case(count, rows, given) for rows in LEAST_TIMES for given in (False, True)]
            rows += time_tasks(place, clients, cases, tried, rounds, seconds)
        ceilings = time_clients(place, clients, [Case(tasks[0], rows, False) for rows in LEAST_TIMES], seconds)
    settings = {"tasks": tasks, "connections": CONNECTIONS, "rounds": rounds, "seconds": seconds}
    return {
        "settings": settings,
        "measures": [found for row in rows for found in measures(row, tried)],
        "rows": rows,
        "tried": tried,
        "clients": ceilings,
    }


def measures(row: dict[str, Any], tried: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of one case: the two rates, their ratio, and what it is where both speak JSON or the client costs nothing; for
    inferred tasks also beside the trial of MLServer as it is installed."""
    case = Case(row["tasks"], row["rows"], row["given"])
    plain = next(t["per_second"] for t in tried if t["settings"] == PEERS[0].name and t["rows"] == case.rows)
    beside_plain = round(row["ways"][OURS.name]["per_second"] / plain, 2)

    def ratio(ours: Way, peer: Way, what: str = "per_second") -> float:
        return round(row["ways"][ours.name][what] / row["ways"][peer.name][what], 2)

    bare = [replace(way, raw=True) for way in (OURS, PEER)]
    return [
        measure(f"{case.name}: requests a second, binary", round(row["ways"][OURS.name]["per_second"])),
        measure(f"  MLServer's ({row['peer']}), JSON", round(row["ways"][PEER.name]["per_second"])),
        measure("  times MLServer's", ratio(OURS, PEER), LEAST_TIMES[case.rows]),
        measure("  p99 over MLServer's", ratio(OURS, PEER, "p99_ms"), 1.0, sense="≤"),
        measure("  times MLServer's where both get JSON", ratio(OURS_JSON, PEER)),
        measure("  times MLServer's over bare connections", ratio(*bare)),
        *([] if case.given else [measure("  times MLServer's with its defaults", beside_plain)]),
    ]


def times_table(result: dict[str, Any]) -> Table:
    """A row for each case and way."""
    columns = ("asked", "of", "a second", "p50", "p99", "CPU", "right")
    table = Table(*columns, title=f"{CONNECTIONS} connections; milliseconds, CPU: of the server for a request")
    for row in result["rows"]:
        name = Case(row["tasks"], row["rows"], row["given"]).name
        for way, found in row["ways"].items():
            cells = [f"{found[what]:.4g}" for what in ("per_second", "p50_ms", "p99_ms", "cpu_ms", "right")]
            table.add_row(name, way, *cells)
            name = ""
    return table


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", type=Path, required=True, help="the interpreter of MLServer's environment")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with mnist.npz")
    parser.add_argument("--tasks", default="5,20", help="counts of tasks, with commas")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each way to ask, in each round")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and write nothing")
    options = parser.parse_args()
    options.tasks = [int(count) for count in options.tasks.split(",")]
    return options


def main() -> None:
    options = parse_options()
    logs.configure(level="error")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="supsupd-peers-") as name:
        place = Place(Path(name), options.data, options.peer_python.absolute())
        result = run(place, options.tasks, options.rounds, options.seconds)
    about = f"--tasks {','.join(map(str, options.tasks))} --rounds {options.rounds} --seconds {options.seconds:g}"
    command = f"python benchmarks/serve_peers.py --peer-python PATH {about}"
    result = report(result, "serve_peers", command, 0, time.monotonic() - started)
    if options.json:
        print(json.dumps(result))
        return
    console = Console()
    console.print(times_table(result))
    console.print(make_table(result))
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
