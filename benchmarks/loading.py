"""What the benchmarks of many masks share: a filled state directory, loaded as the daemon does, in a new process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filled import OUTPUTS, Trained, write_state

from storage.db import Database
from storage.spool import Spool
from supsupd.config import Settings
from supsupd.learning.bank import Masks
from supsupd.learning.device import pick_device, use_threads
from supsupd.learning.inference import Scorer, Slopes
from supsupd.learning.kernels import CHUNK
from supsupd.learning.network import Architecture, Network
from supsupd.learning.predictor import Predictor
from supsupd.sections import BankSettings, LearningSettings, RecognitionSettings
from supsupd.worker import Worker

THREADS = 2
EVERYTHING = 1 << 40
PAGE_BYTES = 4096


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * PAGE_BYTES


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def warm_up() -> None:
    """All that happens once in a process: what is imported, compiled and set up at a first use."""
    use_threads(THREADS)
    network = Network(Architecture((784,), (300, 100), OUTPUTS), 0)
    scorer, x = Scorer(network, THREADS), np.ones((1, 784), np.float32)
    scorer.warm_up()
    masks = Masks.of([np.zeros(network.architecture.mask_bytes, np.uint8)] * 2 * CHUNK)
    for _ in range(2):
        Slopes(scorer, masks, "entropy", 10).one_shot(x)
        scorer.evidence("entropy", x, masks, 10)


@contextmanager
def loaded(state: Path, memory_bytes: int = EVERYTHING, **recognition: Any) -> Iterator[Worker]:
    """The learning side of a daemon over a state directory."""
    settings = Settings(
        watch=[state.parent / "watch"],
        state=state,
        socket=state.parent / "socket",
        learning=LearningSettings(threads=THREADS),
        recognition=RecognitionSettings(**recognition),
        bank=BankSettings(memory_bytes=memory_bytes),
    )
    database = Database.open(settings.store)
    try:
        worker = Worker(settings, database, Spool(state / "spool"), pick_device("cpu"))
        worker.load()
        yield worker
    finally:
        database.close()


def predictor_of(worker: Worker) -> Predictor:
    """What it serves."""
    assert worker.predictor is not None
    return worker.predictor


def in_process(script: str, trained: Trained, tasks: int, options: Sequence[str]) -> dict[str, Any]:
    """What `script --state DIR` prints about so many tasks: it has neither trained masks nor loaded others."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        (Path(folder) / "watch").mkdir()
        write_state(state, trained, tasks)
        run = subprocess.run(
            [sys.executable, script, "--state", str(state), *options], stdout=subprocess.PIPE, check=True, text=True
        )
    return dict(json.loads(run.stdout))
