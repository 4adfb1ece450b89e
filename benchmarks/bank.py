"""Task inference from one image among many masks: exact and One-Shot from packed bits, and the paper's own code.

A state directory with so many tasks is made (`filled.py`: LeNet 300-100, 500 outputs) and loaded as the daemon loads
it; then the task of test images is inferred, one image at a time. With --peer the paper's own One-Shot runs after it,
in a process of its own. Times are medians. Resident memory is what the process grew by through loading the masks and
exact answers, after everything had been imported and compiled; One-Shot's superposition comes on top.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import ROOT
from filled import TRAINED, orders, train
from loading import EVERYTHING, THREADS, in_process, loaded, predictor_of, resident, timed, warm_up
from paper_report import make_table, measure, new_figure, report, save_figure, write_json
from peer import PeerFailed, one_shot
from rich.console import Console

from supsupd import logs
from supsupd.choices import Method
from supsupd.learning.predictor import Predictor
from supsupd.learning.queries import Query

RESULT, PLOT = ROOT / "docs" / "results" / "bank.json", ROOT / "docs" / "plots" / "bank.png"
TASKS = (10, 100, 1000, 2500)
"""All of them hold the trained ones."""
IMAGES = 60
COPIES = 9
TARGET_TASKS = 2500
LEAST_EXACT, LEAST_ONE_SHOT, LEAST_MEMORY = 100.0, 200.0, 80.0
MOST_RESIDENT, MOST_START_SECONDS = 1.3, 2.0


def infer(predictor: Predictor, rows: np.ndarray, method: Method) -> tuple[float, np.ndarray]:
    """Median milliseconds for the task of one row, and the places found (n,)."""
    query = Query(None, per_sample=True, method=method, objective="entropy")
    predictor.infer(rows[:1], query)
    found: list[int] = []
    times = [timed(lambda row=row: found.append(int(predictor.infer(row[None], query)[0]))) for row in rows]
    return median(times), np.array(found)


def copy_bandwidth(nbytes: int) -> float:
    """Bytes read and written in a second by a plain copy of so many."""
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    return 2e3 * nbytes / min(timed(lambda: np.copyto(target, source)) for _ in range(COPIES))


def measured(data: Path, state: Path) -> dict[str, Any]:
    """Ours among the masks of a state directory."""
    warm_up()
    images = single_images(data)
    before, started = resident(), time.perf_counter()
    with loaded(state, shortlist_above=EVERYTHING) as worker:
        seconds = time.perf_counter() - started
        return about(predictor_of(worker), images, before) | {"start_seconds": round(seconds, 3)}


def about(predictor: Predictor, images: np.ndarray, before: int) -> dict[str, Any]:
    """What inference costs, and the memory since there were `before` bytes of it."""
    truth = np.arange(IMAGES) % TRAINED
    rows = predictor.normaliser(images)
    exact_ms, exact = infer(predictor, rows, "exact")
    grown = resident() - before
    superposing = timed(lambda: predictor.predict(rows[:1], None, True, "one-shot"))
    one_shot_ms, guessed = infer(predictor, rows, "one-shot")
    with_superposition = resident() - before
    packed = sum(task.mask.nbytes for task in predictor.tasks)
    bandwidth = copy_bandwidth(packed)
    return {
        "tasks": len(predictor.tasks),
        "exact_ms": round(exact_ms, 3),
        "one_shot_ms": round(one_shot_ms, 3),
        "packed_bytes": packed,
        "rss_bytes": grown,
        "rss_with_superposition_bytes": with_superposition,
        "superpose_ms": round(superposing, 1),
        "exact_right": round(float((exact == truth).mean()), 4),
        "one_shot_right": round(float((guessed == truth).mean()), 4),
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "exact_bandwidth_share": round(1e3 * packed / exact_ms / bandwidth, 4),
        "one_shot_bandwidth_share": round(1e3 * packed / one_shot_ms / bandwidth, 4),
    }


def single_images(data: Path) -> np.ndarray:
    """Test images of the trained tasks in turn, (n, 28, 28)."""
    views = orders(data, "test")
    return np.concatenate([views[i % TRAINED].transform(views[i % TRAINED].x[i : i + 1]) for i in range(IMAGES)])


def with_peer(row: dict[str, Any], peer: Path | None) -> dict[str, Any]:
    """Beside the paper's own code among as many masks."""
    theirs = one_shot(peer, row["tasks"], THREADS) if peer is not None else None
    row["peer_one_shot_ms"] = round(theirs["one_shot_ms"], 1) if theirs else None
    row["peer_rss_bytes"] = theirs["rss_bytes"] if theirs else None
    return row


def beside(options: argparse.Namespace, tasks: int) -> dict[str, Any]:
    """Ours and, if there is one, the peer among so many masks."""
    row = in_process(__file__, train(options.data), tasks, ["--data", str(options.data)])
    return with_peer(row, options.peer)


def measures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: every size, and the targets at the largest."""
    table = []
    for row in rows:
        many = f"{row['tasks']} masks"
        aimed = row["tasks"] == TARGET_TASKS
        table.append(measure(f"{many}: exact, ms", row["exact_ms"]))
        table.append(measure(f"{many}: One-Shot, ms", row["one_shot_ms"]))
        if row["peer_one_shot_ms"] is not None:
            peer, memory = row["peer_one_shot_ms"], row["peer_rss_bytes"] / row["rss_bytes"]
            table.append(measure(f"{many}: the paper's code, One-Shot, ms", peer))
            for name, least in (("exact", LEAST_EXACT), ("one_shot", LEAST_ONE_SHOT)):
                faster = round(peer / row[f"{name}_ms"], 1)
                table.append(measure(f"{many}: {name}, times faster than it", faster, least if aimed else None))
            table.append(measure(f"{many}: times less memory", round(memory, 1), LEAST_MEMORY if aimed else None))
        shares = round(row["rss_bytes"] / row["packed_bytes"], 3)
        table.append(measure(f"{many}: resident / packed bytes", shares, MOST_RESIDENT if aimed else None, sense="≤"))
        table.append(
            measure(f"{many}: start, s", row["start_seconds"], MOST_START_SECONDS if aimed else None, sense="≤")
        )
        table.append(measure(f"{many}: exact, share of a copy's bandwidth", row["exact_bandwidth_share"]))
        table.append(measure(f"{many}: One-Shot, share of a copy's bandwidth", row["one_shot_bandwidth_share"]))
    return table


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure = new_figure()
    axes = figure.subplots()
    tasks = [row["tasks"] for row in rows]
    for name, key in (("exact", "exact_ms"), ("One-Shot", "one_shot_ms"), ("the paper's One-Shot", "peer_one_shot_ms")):
        if all(row[key] is not None for row in rows):
            axes.loglog(tasks, [row[key] for row in rows], marker="o", label=name)
    axes.set(xlabel="masks", ylabel="ms for one image", title="Task inference, LeNet 300-100 with 500 outputs")
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with mnist.npz")
    parser.add_argument("--tasks", type=int, help=f"one number of masks; else {', '.join(map(str, TASKS))}")
    parser.add_argument("--peer", type=Path, help="a checkout of the paper's code, github.com/RAIVNLab/supsup")
    parser.add_argument("--json", action="store_true", help="print JSON alone and write nothing")
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    logs.configure("console", "error")
    options = parse_options()
    if options.state is not None:
        print(json.dumps(measured(options.data, options.state)))
        return
    started = time.monotonic()
    rows = [beside(options, tasks) for tasks in ([options.tasks] if options.tasks else TASKS)]
    if options.json:
        print(json.dumps(rows if options.tasks is None else rows[0]))
        return
    peer = " --peer PATH" if options.peer else ""
    result = {"settings": {"threads": THREADS, "images": IMAGES}, "measures": measures(rows), "rows": rows}
    result = report(result, "bank", f"python benchmarks/bank.py{peer}", 0, time.monotonic() - started)
    Console().print(make_table(result))
    if options.tasks is None:
        write_json(RESULT, result)
        plot(rows, PLOT)


if __name__ == "__main__":
    try:
        main()
    except PeerFailed as error:
        sys.exit(str(error))
