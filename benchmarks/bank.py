"""Task inference from one image among many masks: exact and One-Shot from packed bits, and the paper's own code.

A state directory with so many tasks is made (`filled.py`: LeNet 300-100, 500 outputs) and loaded as the daemon loads
it; then the task of test images is inferred, one image at a time. With --peer the paper's own One-Shot runs after it,
in a process of its own. Times are medians. Resident memory is what the process grew by through loading the masks and
exact answers, after everything had been imported and compiled; One-Shot's superposition comes on top.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import ROOT
from filled import OUTPUTS, TRAINED, orders, train, write_state
from paper_report import make_table, measure, new_figure, report, save_figure, write_json
from peer import one_shot
from rich.console import Console

from storage.db import Database
from storage.spool import Spool
from supsupd import logs
from supsupd.choices import Method
from supsupd.config import BankSettings, LearningSettings, RecognitionSettings, Settings
from supsupd.learning.bank import Masks
from supsupd.learning.device import pick_device, use_threads
from supsupd.learning.inference import Scorer, Slopes
from supsupd.learning.network import Architecture, Network
from supsupd.learning.predictor import Predictor
from supsupd.learning.queries import Query
from supsupd.worker import Worker

RESULT, PLOT = ROOT / "docs" / "results" / "bank.json", ROOT / "docs" / "plots" / "bank.png"
TASKS = (10, 100, 1000, 2500)
"""All of them hold the trained ones."""
IMAGES = 60
COPIES = 9
THREADS = 2
EVERYTHING = 1 << 40
TARGET_TASKS = 2500
LEAST_EXACT, LEAST_ONE_SHOT, LEAST_MEMORY = 100.0, 200.0, 80.0
MOST_RESIDENT, MOST_START_SECONDS = 1.3, 2.0


@dataclass(frozen=True)
class Loaded:
    """What a daemon would have after its start, how long that took, and what memory was resident before."""

    predictor: Predictor
    seconds: float
    resident_before: int


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096


def load(state: Path) -> Loaded:
    """Loads a state directory like the daemon; queries are scored under all masks, whatever their number."""
    settings = Settings(
        watch=[state.parent / "watch"],
        state=state,
        socket=state.parent / "socket",
        learning=LearningSettings(threads=THREADS),
        recognition=RecognitionSettings(shortlist_above=EVERYTHING),
        bank=BankSettings(memory_bytes=EVERYTHING),
    )
    worker = Worker(settings, Database.open(settings.database), Spool(state / "spool"), pick_device("cpu"))
    before, started = resident(), time.perf_counter()
    worker.load()
    seconds = time.perf_counter() - started
    assert worker.predictor is not None
    return Loaded(worker.predictor, seconds, before)


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


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
    use_threads(THREADS)
    warm_up()
    images = single_images(data)
    loaded = load(state)
    predictor = loaded.predictor
    truth = np.arange(IMAGES) % TRAINED
    rows = predictor.normaliser(images)
    exact_ms, exact = infer(predictor, rows, "exact")
    grown = resident() - loaded.resident_before
    superposing = timed(lambda: predictor.predict(rows[:1], None, True, "one-shot"))
    one_shot_ms, guessed = infer(predictor, rows, "one-shot")
    with_superposition = resident() - loaded.resident_before
    packed = sum(task.mask.nbytes for task in predictor.tasks)
    bandwidth = copy_bandwidth(packed)
    return {
        "tasks": len(predictor.tasks),
        "exact_ms": round(exact_ms, 3),
        "one_shot_ms": round(one_shot_ms, 3),
        "packed_bytes": packed,
        "rss_bytes": grown,
        "rss_with_superposition_bytes": with_superposition,
        "start_seconds": round(loaded.seconds, 3),
        "superpose_ms": round(superposing, 1),
        "exact_right": round(float((exact == truth).mean()), 4),
        "one_shot_right": round(float((guessed == truth).mean()), 4),
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "exact_bandwidth_share": round(1e3 * packed / exact_ms / bandwidth, 4),
        "one_shot_bandwidth_share": round(1e3 * packed / one_shot_ms / bandwidth, 4),
    }


def warm_up() -> None:
    """Everything that happens once in a process: what is imported, compiled and set up at a first use."""
    network = Network(Architecture((784,), (300, 100), OUTPUTS), 0)
    scorer, x = Scorer(network, THREADS), np.ones((1, 784), np.float32)
    scorer.warm_up()
    for objective in ("entropy", "energy"):
        masks = Masks.of([np.zeros(network.architecture.mask_bytes, np.uint8)] * 2)
        Slopes(scorer, masks, objective, 10).one_shot(x)
        scorer.evidence(objective, x, masks, 10)


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


def in_process(options: argparse.Namespace, tasks: int) -> dict[str, Any]:
    """One size, loaded in a process of its own: it has neither trained masks nor loaded others."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        (Path(folder) / "watch").mkdir()
        write_state(state, train(options.data), tasks)
        command = [sys.executable, __file__, "--data", str(options.data), "--state", str(state)]
        run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return with_peer(json.loads(run.stdout), options.peer)


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
    rows = [in_process(options, tasks) for tasks in ([options.tasks] if options.tasks else TASKS)]
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
    main()
