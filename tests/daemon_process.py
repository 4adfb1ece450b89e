"""A real daemon in a process of its own, and the questions that tests ask of it and of the state that it leaves."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from itertools import count
from pathlib import Path

import digits
import httpx

from supsupd.client import Client, DaemonUnavailable

BIN = Path(sys.executable).parent
START_SECONDS, WAIT_SECONDS, STOP_SECONDS = 120, 180, 30
"""Patience, on a slow and busy machine; how long something takes is not what is tested."""
QUICK = """
[intake]
settle_seconds = 0.1
incomplete_seconds = 0.5
[network]
hidden = [100]
"""


def until(condition, seconds=WAIT_SECONDS):
    """The first true value of `condition()`, asked again and again."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return value


def is_logged(line):
    """Whether a line on stderr is the log's, and not for people."""
    return line.startswith("{")


class DaemonProcess:
    """`supsupd start` over a folder's own watch/, state/ and socket; started and stopped as often as one likes.

    A context manager: at its end no process is left.
    """

    def __init__(self, folder: Path, *flags, config=QUICK, programs=BIN):
        self.watch, self.state, self.socket = folder / "watch", folder / "state", folder / "sock"
        self.watch.mkdir(parents=True, exist_ok=True)
        self.flags = flags
        self.programs = programs
        self.log = folder / "log"
        self.config = folder / "config.toml"
        self.config.write_text(config)
        self.process: subprocess.Popen | None = None
        self.client = Client(self.socket)
        self._turns = count()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.client.close()

    def launch(self):
        """Begins to start; does not wait."""
        paths = ["--watch", self.watch, "--state", self.state, "--socket", self.socket, "--config", self.config]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.programs / "supsupd", "start", *paths, *self.flags], stdout=log, stderr=log, cwd="/"
            )
        return self

    def start(self):
        """Returns once it answers."""
        self.launch()
        until(self.answers, START_SECONDS)
        return self

    def answers(self):
        if self.process.poll() is not None:
            raise AssertionError(f"the daemon ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}")
        try:
            return self.client.status()["pid"] == self.process.pid
        except DaemonUnavailable:
            return False

    def stop(self, number=signal.SIGTERM):
        """Its exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS)

    def kill(self):
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()

    def refusal(self):
        """Starts it where it must not start: (its exit code, the lines it says beside the log)."""
        self.launch()
        code = self.process.wait(START_SECONDS)
        lines = self.log.read_text().splitlines()
        return code, [line for line in lines if not is_logged(line)]

    def events(self, name):
        """The log's lines of one event, as objects; what follows the last newline is still being written."""
        *lines, _ = self.log.read_text().split("\n")
        return [line for line in map(json.loads, filter(is_logged, lines)) if line["event"] == name]

    # -- feeding and asking -----------------------------------------------------------------------------------------

    def drop(self, name, **arrays):
        """A file that comes after all that were dropped before."""
        return digits.drop(self.watch / f"{name}.npz", next(self._turns), **arrays)

    def wait(self, seconds=WAIT_SECONDS):
        self.client.wait(seconds)
        return self

    def row(self, name):
        """The first ledger row of the file `name`.npz, None while there is none."""
        return next((row for row in self.client.batches() if row["name"] == f"{name}.npz"), None)

    def infer(self, x, **parameters):
        """All outputs for x (n, d), as they come over the socket."""
        tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
        body = {"inputs": [tensor], "parameters": parameters}
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), timeout=60) as http:
            response = http.post("http://supsupd/v2/models/supsup/infer", json=body)
        assert response.status_code == 200, response.text
        return {output["name"]: output for output in response.json()["outputs"]}

    def cli(self, *arguments):
        command = [self.programs / "supsup-cli", *arguments, "--socket", self.socket]
        return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)

    def listing(self, *arguments):
        """What a listing of `supsup-cli` prints with --json."""
        result = self.cli(*arguments, "--json")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)


# -- the state that a daemon leaves; only read while one may run ------------------------------------------------------


def ask(state: Path, query):
    """The rows of one SQL query."""
    with contextlib.closing(sqlite3.connect(f"file:{state / 'supsup.db'}?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


def edit(state: Path, statement, *values):
    """Changes the database of a daemon that is down."""
    with contextlib.closing(sqlite3.connect(state / "supsup.db")) as connection, connection:
        connection.execute(statement, values)


def copy_database(state: Path, target: Path):
    """A copy as of one moment, also of a running daemon's."""
    target.mkdir()
    source = sqlite3.connect(f"file:{state / 'supsup.db'}?mode=ro", uri=True)
    with contextlib.closing(source), contextlib.closing(sqlite3.connect(target / "supsup.db")) as copy:
        source.backup(copy)
    return target


def mask_hashes(state: Path):
    """{task: the SHA-256 of each version of its mask, oldest first}."""
    found = defaultdict(list)
    for task, sha256 in ask(state, "SELECT task_id, sha256 FROM mask_version ORDER BY task_id, version"):
        found[task].append(sha256)
    return dict(found)


def what_was_learned(state, ask=ask):
    """All that must be the same however often the daemon died; numbers of provisional tasks are not.

    ask: gives the rows of a query, of another store than the state's own file.
    """
    return {
        "ledger": ask(state, "SELECT id, name, sha256, state, task_id, decision FROM batch ORDER BY id"),
        "masks": ask(state, "SELECT task_id, version, batch_id, sha256 FROM mask_version ORDER BY task_id, version"),
        "tasks": ask(state, "SELECT id, version, batches, samples, accuracy, reference FROM task ORDER BY id"),
        "training": ask(state, "SELECT task_id, version, turn, payload FROM training_state ORDER BY task_id"),
        "network": ask(state, "SELECT seed, signs_sha256, classes FROM network"),
    }


def without_holes(learned):
    """The same, its batches and tasks counted anew: PostgreSQL's ids have holes where a transaction was not."""
    batch = {row[0]: turn for turn, row in enumerate(learned["ledger"], 1)} | {None: None}
    task = {row[0]: turn for turn, row in enumerate(learned["tasks"], 1)} | {None: None}
    return learned | {
        "ledger": [(batch[i], *rest, task[t], decision) for i, *rest, t, decision in learned["ledger"]],
        "masks": [(task[t], version, batch[b], sha256) for t, version, b, sha256 in learned["masks"]],
        "tasks": [(task[t], *rest) for t, *rest in learned["tasks"]],
        "training": [(task[t], *rest) for t, *rest in learned["training"]],
    }


def tree_of(folder: Path):
    """All that can be seen of a folder's files: names, kinds, sizes, times and bytes."""
    return {
        str(path.relative_to(folder)): (
            os.lstat(path).st_mode,
            os.lstat(path).st_size,
            os.lstat(path).st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(folder.rglob("*"))
    }
