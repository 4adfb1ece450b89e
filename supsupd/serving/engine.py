"""What the socket asks of the engine behind it: the one interface between HTTP and learning."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from supsupd.buckets import Buckets
from supsupd.choices import Method, Objective

MODEL_NAME = "supsup"


@dataclass(frozen=True, slots=True)
class Question:
    """Rows to predict for: under `task`'s mask, or under the inferred one, of each row by itself when `per_sample`,
    else of all rows together, in the configured way or by `method` and `objective`.
    """

    x: np.ndarray  # (n, ...), n >= 1, finite
    task: int | str | None = None
    per_sample: bool = False
    method: Method | None = None
    objective: Objective | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """Answers for n rows, in the user's own labels."""

    labels: list[int] | list[str]
    probabilities: np.ndarray  # (n, classes) float32
    task: np.ndarray  # (n,) int64
    entropy: np.ndarray  # (n,) float32, nats
    known: np.ndarray  # (n,) bool
    classes: list[int] | list[str]  # what the columns of `probabilities` stand for
    version: int = 0  # of the mask that answered the first row


@dataclass(frozen=True, slots=True)
class TaskModel:
    """A task as a model of its own.

    versions: those that its mask has had, the oldest first. served: the one that answers; None: none does, and
    `problem` says why. retired: it can be taken into use again.
    """

    task: int
    versions: tuple[int, ...]
    served: int | None
    retired: bool = False
    problem: str | None = None


class EngineError(Exception):
    """The engine says no. `status` is the HTTP status that tells the caller so, `text` the one line why."""

    status = 500

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.status = type(self).status if status is None else status


class NoModelYet(EngineError):
    """Nothing can be predicted yet."""

    status = 503

    def __init__(self, text: str = "no task has been learned yet") -> None:
        super().__init__(f"no_model_yet: {text}")


class ShuttingDown(EngineError):
    """The daemon is about to end."""

    status = 503

    def __init__(self) -> None:
        super().__init__("shutting_down: the daemon is about to end")


class TaskUnknown(EngineError):
    """There is no task with this id."""

    status = 404

    def __init__(self, task: int | str) -> None:
        super().__init__(f"there is no task {task}")


class BadInput(EngineError):
    """The request is well-formed but the engine can't use it, e.g. rows of another width."""

    status = 400


class TooManyQueries(EngineError):
    """The queue of queries is full: try again in a moment."""

    status = 429

    def __init__(self, waiting: int) -> None:
        super().__init__(f"overloaded: {waiting} queries are waiting")


class DeadlineExceeded(EngineError):
    """A query's time was over before its turn came."""

    status = 503

    def __init__(self) -> None:
        super().__init__("deadline_exceeded: the query's time was over before its turn came")


class ExtensionNotSupported(EngineError):
    """A part of the protocol that is not served."""

    status = 501

    def __init__(self, text: str) -> None:
        super().__init__(f"extension_not_supported: {text}")


class BatchRefused(EngineError):
    """A submitted batch was refused: 400 for bad bytes, 409 for a conflict, 503 for a full queue."""

    status = 400


@dataclass(frozen=True, slots=True)
class Stored:
    """The store in figures, of one snapshot."""

    batches: Mapping[str, int]
    """In each state."""
    decisions: Mapping[str, int]
    """Of each kind, since the start."""
    store_bytes: int
    spool_bytes: int


@dataclass(frozen=True, slots=True)
class Measures:
    """The engine in figures, of this moment."""

    ready: bool
    tasks: int
    masks_in_memory: int
    masks_in_memory_bytes: int
    learned: int
    """Batches that tasks took up, since the start."""
    training: Buckets
    """Seconds from the claim of a labelled batch to its state."""
    problems: int
    stored: Stored | None
    """None while the store cannot be read."""


class Engine(Protocol):
    """Every method may block, may be called from any thread, and raises EngineError to say no.

    A `reference` to a task is its id, or a text: its key, name or id.
    """

    def ready(self) -> bool:
        """Whether `predict` can answer. Must not block."""

    def predict(self, questions: Sequence[Question]) -> list[Prediction | EngineError]:
        """What each is answered with: the same as if it came alone, up to the rounding of floating-point numbers.

        Errors are NoModelYet, TaskUnknown, BadInput, and EngineError 404 or 503 for a task that is not in use.
        """

    def predict_in_steps(self, question: Question) -> Iterator[Prediction | EngineError | None]:
        """The same for one question of many rows, from one snapshot: None after each step, at last the answer. A step
        is short, and any thread may take the next one."""

    def is_light(self, questions: Sequence[Question]) -> bool:
        """Whether `predict` waits for nothing here and is over so soon that a thread of its own would not pay. Must be
        so itself."""

    def model(self) -> dict[str, Any] | None:
        """{"input_shape": [784], "classes": [...], "label_kind": "int" | "str"}; None: no network yet. Must
        not block."""

    def served_version(self, task: int) -> int | None:
        """The version of its mask by which a task answers; None: it does not, or there is no such task. Must not
        block."""

    def task_models(self, task: int | None = None) -> list[TaskModel]:
        """Every task that there has been, by id, or this one. Raises TaskUnknown."""

    def measures(self) -> Measures:
        """The engine in figures."""

    def status(self) -> dict[str, Any]:
        """The daemon at a glance; "settled" and each source's "passes" are what `wait` looks at."""

    def tasks(self, retired: bool = False) -> list[dict[str, Any]]:
        """The tasks in use, by id; the retired and merged ones too if asked."""

    def task(self, reference: int | str) -> dict[str, Any]:
        """One task with its "decisions", and the "merged" ones that it answers for. Raises TaskUnknown."""

    def rename(self, reference: int | str, name: str) -> dict[str, Any]:
        """The renamed task. Raises TaskUnknown, BadInput, and EngineError 409 for a name that is taken."""

    def history(self, reference: int | str) -> list[dict[str, Any]]:
        """Every version of the task's mask, oldest first: when, by whom and why it was made, and whether it is served.
        Raises TaskUnknown."""

    def retire(self, reference: int | str, by: str | None = None) -> dict[str, Any]:
        """The task, no longer in use. This and the next four raise TaskUnknown, EngineError 409 where it makes no
        sense, and 503 where the learning thread does not come to it; then nothing is changed. `by`: who asks."""

    def reopen(self, reference: int | str, by: str | None = None) -> dict[str, Any]:
        """The task, in use again."""

    def merge(self, reference: int | str, other: int | str, by: str | None = None) -> dict[str, Any]:
        """The task that answers for both."""

    def split(self, reference: int | str, batch_id: int, by: str | None = None) -> dict[str, Any]:
        """The new task, of the batches from `batch_id` on."""

    def rollback(self, reference: int | str, version: int, by: str | None = None) -> dict[str, Any]:
        """The task, with the bits and the record of an earlier version as its newest. EngineError 404 where there is
        no such version."""

    def why(self, batch_id: int) -> dict[str, Any]:
        """{"batch", "decisions", "versions", "words"}: what was decided about a batch and why. EngineError 404."""

    def batches(self, state: str | None, limit: int | None, after: int | None = None) -> list[dict[str, Any]]:
        """The ledger's rows by id, those above `after`; of one of `choices.BATCH_STATES` only if asked."""

    def batch(self, reference: int | str) -> dict[str, Any]:
        """One row of the ledger: by its id, or the first one of this SHA-256. EngineError 404."""

    def rejected(self, limit: int | None, after: int | None = None) -> list[dict[str, Any]]:
        """The rejected batches that nobody has dealt with, oldest first."""

    def retry(self, batch_id: int) -> dict[str, Any]:
        """The row that a rejected batch is sent in again as. EngineError 404, 409; BatchRefused if it is still none."""

    def drop(self, batch_id: int) -> dict[str, Any]:
        """The row of a batch that waits or was rejected, whose bytes are given up. EngineError 404, 409, 503."""

    def submit(self, name: str, payload: bytes, media_type: str | None, key: str | None, sender: str) -> dict[str, Any]:
        """{"batch": id, "state": ..., "sha256": ...}, once the bytes are durable: the batch that it is, or was when the
        same bytes, or this sender's same idempotency `key`, came before. Raises BatchRefused."""

    def sources(self) -> list[dict[str, Any]]:
        """What batches come from, with what keeps it from working."""

    def accept_gap(self, source: str) -> dict[str, Any]:
        """The gap of this source, whose loss is accepted now: it goes on. EngineError 404."""

    def reservoir(self) -> dict[str, Any]:
        """{"enabled": False}, or what the Hopfield reservoir holds, its bytes against those of raw bits, and how many
        masks come back from it. NoModelYet."""

    def scan(self) -> dict[str, Any]:
        """{"pass": N}: once every source has finished pass N, all that is there now has been seen."""
