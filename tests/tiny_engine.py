"""A small real engine: one fixed linear map for each task, answers by least entropy. No torch, no files."""

import contextlib
import hashlib
import logging
import threading
from collections import Counter
from pathlib import Path

import numpy as np

from supsupd.buckets import Buckets
from supsupd.sections import ServingSettings
from supsupd.serving.engine import (
    BadInput,
    BatchRefused,
    EngineError,
    Measures,
    NoModelYet,
    Prediction,
    Stored,
    TaskModel,
    TaskUnknown,
)
from supsupd.serving.front import Front
from supsupd.serving.http.app import create_app
from supsupd.serving.listeners import bind_tcp, bind_unix
from supsupd.serving.server import Server

INPUTS, CLASSES = 4, 3


class TinyEngine:
    """Linear maps (INPUTS, CLASSES) whose ids count from 1; `predict` blocks while `gate` is clear."""

    def __init__(self, tasks=2, labels=(0, 1, 2)):
        self.weights = np.random.default_rng(0).normal(size=(tasks, INPUTS, CLASSES)) * 3
        self.names = [f"task-{i + 1}" for i in range(tasks)]
        self.labels = list(labels)
        self.retired = set()
        self.versions = {i + 1: [1, 2, 3] for i in range(tasks)}
        self.ledger = []
        self.keys = {}
        self.passes = 0
        self.polls_until_settled = 2
        self.problem = None  # of the one source
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.answered_in = []

    def measures(self):
        states = Counter(row["state"] for row in self.ledger)
        return Measures(
            ready=self.ready(),
            tasks=len(self.weights),
            masks_in_memory=len(self.weights),
            masks_in_memory_bytes=self.weights.nbytes,
            learned=0,
            training=Buckets((1.0,)),
            problems=0,
            stored=Stored(dict(states), {"new": len(self.weights)}, 4096, 0),
        )

    def ready(self):
        return len(self.weights) > 0

    def predict(self, questions):
        return [self._answer(question) for question in questions]

    def _answer(self, question):
        try:
            return self._predict(question.x, question.task, question.per_sample)
        except EngineError as error:
            return error

    def _predict(self, x, task, per_sample):
        if not self.ready():
            raise NoModelYet
        if x.shape[1:] != (INPUTS,):
            raise BadInput(f"bad_shape: expected rows of {INPUTS}, got {list(x.shape[1:])}")
        self.entered.set()
        self.answered_in.append(threading.current_thread().name)
        self.gate.wait(30)
        logits = x.astype(np.float64) @ self.weights  # (tasks, n, classes)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        entropy = -(p * np.log(p + 1e-12)).sum(-1)  # (tasks, n)
        chosen, rows = self._route(entropy, task, per_sample), np.arange(len(x))
        return Prediction(
            labels=[self.labels[i] for i in p[chosen, rows].argmax(-1)],
            probabilities=p[chosen, rows].astype(np.float32),
            task=(chosen + 1).astype(np.int64),
            entropy=entropy[chosen, rows].astype(np.float32),
            known=entropy[chosen, rows] < 1.0,
            classes=self.labels,
            version=self.versions[chosen[0] + 1][-1],
        )

    def predict_in_steps(self, question):
        for _ in range(0, len(question.x), 256):
            yield None
        yield from self.predict([question])

    def is_light(self, questions):
        return all(type(question.task) is int and len(question.x) <= 4 for question in questions)

    def _route(self, entropy, task, per_sample):
        if task is not None:
            if (task_id := self._resolve(task)) in self.retired:
                raise EngineError(f"task {task_id} is retired", 404)
            return np.full(entropy.shape[1], task_id - 1)
        return entropy.argmin(0) if per_sample else np.full(entropy.shape[1], entropy.mean(1).argmin())

    def model(self):
        if not self.ready():
            return None
        kind = "str" if isinstance(self.labels[0], str) else "int"
        return {"input_shape": [INPUTS], "classes": self.labels, "label_kind": kind}

    def served_version(self, task):
        return self.versions[task][-1] if task in self.versions and task not in self.retired else None

    def task_models(self, task=None):
        if task is not None and task not in self.versions:
            raise TaskUnknown(task)
        return [self._task_model(found) for found in self.versions if task in (None, found)]

    def _task_model(self, task):
        problem = f"task {task} is retired" if task in self.retired else None
        return TaskModel(task, tuple(self.versions[task]), self.served_version(task), problem is not None, problem)

    def status(self):
        self.polls_until_settled -= self.passes > 0
        return {
            "tasks": len(self.names),
            "sources": self.sources(),
            "queue": 0,
            "settled": self.polls_until_settled <= 0,
            "network": {"hidden": [300, 100]},
        }

    def tasks(self, retired=False):
        shown = [i for i in range(len(self.names)) if retired or i + 1 not in self.retired]
        return [self._row(i + 1) for i in shown]

    def _row(self, task_id):
        retired = "2026-01-01" if task_id in self.retired else None
        name = self.names[task_id - 1]
        return {"task": task_id, "name": name, "accuracy": 0.5, "batches": 7, "retired": retired}

    def task(self, reference):
        return {
            **self._row(self._resolve(reference)),
            "merged": [],
            "decisions": [
                {
                    "batch": 1,
                    "name": "a.npz",
                    "decision": "new",
                    "at": "",
                    "reason": "a task of its own",
                    "evidence": {"p": 1e-9},
                }
            ],
        }

    def rename(self, reference, name):
        task_id = self._resolve(reference)
        if name in self.names:
            raise EngineError(f"the name {name} is taken", 409)
        if name == "crash":
            raise ZeroDivisionError("a bug")
        self.names[task_id - 1] = name
        return self._row(task_id)

    def retire(self, reference, by=None):
        self.asked_by = by
        task_id = self._resolve(reference)
        if task_id in self.retired:
            raise EngineError(f"task {task_id} is retired", 409)
        self.retired.add(task_id)
        return self._row(task_id)

    def reopen(self, reference, by=None):
        self.asked_by = by
        self.retired.discard(self._resolve(reference))
        return self._row(self._resolve(reference))

    def merge(self, reference, other, by=None):
        self.retire(other)
        return self._row(self._resolve(reference))

    def split(self, reference, batch_id, by=None):
        self._resolve(reference)
        self.names.append(f"from-{batch_id}")
        return self._row(len(self.names))

    def rollback(self, reference, version, by=None):
        self.asked_by = by
        task_id = self._resolve(reference)
        self.versions[task_id].append(len(self.versions[task_id]) + 1)
        return self._row(task_id) | {"version": version + 1}

    def history(self, reference):
        self._resolve(reference)
        return [{"version": 1, "made_by": "daemon", "sha256": "0" * 64, "served": True, "reason": "\x1b[2J"}]

    def why(self, batch_id):
        if batch_id != 1:
            raise EngineError(f"there is no batch {batch_id}", 404)
        return {"batch": {"batch": 1}, "decisions": [], "versions": [], "words": ["batch 1: \x1b[2J", "1. known"]}

    def batches(self, state, limit, after=None):
        return [row for row in self.ledger if state in (None, row["state"]) and row["batch"] > (after or 0)][:limit]

    def batch(self, reference):
        found = [row for row in self.ledger if reference in (row["batch"], row["sha256"])]
        if not found:
            raise EngineError(f"there is no batch {reference}", 404)
        return found[0]

    def rejected(self, limit, after=None):
        return self.batches("quarantined", limit, after)

    def retry(self, batch_id):
        old = self.batch(batch_id)
        if old["state"] != "quarantined":
            raise EngineError(f"batch {batch_id} is {old['state']}: only a rejected batch can be retried", 409)
        old["state"] = "retried"
        self.ledger.append({**old, "batch": len(self.ledger) + 1, "state": "staged"})
        return self.ledger[-1]

    def drop(self, batch_id):
        self.batch(batch_id)["state"] = "dropped"
        return self.batch(batch_id)

    def sources(self):
        pending = int(self.problem is not None)
        return [{"name": "w", "passes": self.passes, "pending": pending, "problem": self.problem}]

    def accept_gap(self, source):
        if source != "line-3":
            raise EngineError(f"source {source} has no gap to accept", 404)
        return {"source": source, "key": "s", "position": "7", "reason": "messages 1 to 7 are gone", "at": ""}

    def submit(self, name, payload, media_type, key, sender):
        self.sent_by = sender
        if not payload:
            raise BatchRefused("truncated: 0 bytes")
        sha256 = hashlib.sha256(payload).hexdigest()
        if key is not None and (sender, key) in self.keys:
            return self.keys[sender, key]
        self.ledger.append({"batch": len(self.ledger) + 1, "name": name, "sha256": sha256, "state": "staged"})
        shown = {field: self.ledger[-1][field] for field in ("batch", "state", "sha256")}
        self.keys[sender, key] = shown
        return shown

    def scan(self):
        self.passes += 1
        return {"pass": self.passes}

    def _resolve(self, reference):
        known = {str(i + 1): i + 1 for i in range(len(self.names))} | {n: i + 1 for i, n in enumerate(self.names)}
        task_id = known.get(str(reference).removeprefix("id:"))
        if task_id is None:
            raise TaskUnknown(str(reference).removeprefix("id:"))
        return task_id


@contextlib.contextmanager
def serving(engine, path: Path, tcp=False, access=None, tls=None, services=(), **limits):
    """`engine` behind a real server on a real Unix socket at `path`; with `tcp` on a free port of 127.0.0.1 too.

    Gives the server; the port is `port_of` it.
    """
    front = Front(engine, ServingSettings(**limits))
    listeners = [bind_unix(path), *([bind_tcp("127.0.0.1", 0, tls)] if tcp else [])]
    server = Server(front, create_app(front, access), listeners, services, access)
    log = logging.getLogger("supsupd")
    level = log.level  # which a client may change, for the whole process
    server.start()
    try:
        yield server
    finally:
        server.stop(1.0)
        log.setLevel(level)


def port_of(server):
    """The TCP port that a server listens on."""
    return next(int(listener.address.rpartition(":")[2]) for listener in server.listeners if not listener.is_unix)
