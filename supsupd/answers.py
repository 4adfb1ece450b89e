"""What the daemon answers under /v1, as types: for who asks it from Python, and for the description of its routes."""

from __future__ import annotations

from typing import Any, TypeVar

from typing_extensions import TypedDict  # pydantic reads typing's own only from Python 3.12 on

from supsupd.choices import BatchState, Scenario

T = TypeVar("T", bound=type)


def closed(table: T) -> T:
    """A table with the keys that it names and no others, each described by the text below it."""
    described: Any = table
    described.__pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}
    return table


@closed
class Failure(TypedDict):
    """Why there is no other answer."""

    error: str
    """One line, mostly "code: what is wrong, and what was expected"."""


@closed
class Task(TypedDict):
    """A task."""

    task: int
    """Its id, which is never used again."""
    name: str
    key: str | None
    """What the stream calls it, where tasks are given."""
    version: int
    """Of its mask."""
    batches: int
    samples: int
    accuracy: float | None
    """Prequential: of each batch before it was trained on."""
    entropy: float | None
    density: float
    """The fraction of weights kept."""
    bytes: int
    created: str
    last_seen: str
    retired: str | None
    merged_into: int | None
    """The task that answers for it."""
    problem: str | None
    """Why it is out of service."""


@closed
class Decision(TypedDict):
    """Why a batch went where it went."""

    batch: int
    name: str
    decision: str
    task: int | None
    at: str
    reason: str | None
    evidence: dict[str, Any]


@closed
class TaskInDetail(Task):
    """A task with what led batches to it."""

    merged: list[Task]
    """Those that it answers for."""
    decisions: list[Decision]
    """The newest 100, newest first."""


@closed
class MaskVersion(TypedDict):
    """One version of a task's mask."""

    version: int
    created: str
    made_by: str
    """The daemon, or the user who asked for it."""
    reason: str | None
    batch: int | None
    density: float
    bytes: int
    sha256: str
    served: bool


@closed
class Batch(TypedDict):
    """A row of the ledger."""

    batch: int
    name: str
    sha256: str | None
    state: BatchState
    task: int | None
    decision: str | None
    reason: str | None
    samples: int | None
    labelled: bool | None
    given_task: str | None
    source: str | None
    """A folder, the name of a stream, stdin or socket."""
    sender: str | None
    """Who posted it: "token ID" or "uid N"; None where a source delivered it."""
    retry_of: int | None
    """The rejected batch that was sent in again as this one."""


@closed
class RejectedBatch(TypedDict):
    """A batch that was refused; its bytes are kept."""

    batch: int
    source: str | None
    sender: str | None
    name: str
    code: str | None
    reason: str | None
    state: BatchState
    bytes: int | None
    """None: there are none to retry."""
    sha256: str | None
    at: str


@closed
class StagedBatch(TypedDict):
    """The batch that was handed over, or was before."""

    batch: int
    state: BatchState
    sha256: str


@closed
class MadeVersion(TypedDict):
    """A mask version that a batch, or the one that decided it, made."""

    task: int
    version: int
    batch: int | None
    density: float
    reason: str | None


@closed
class Story(TypedDict):
    """All that was decided about a batch."""

    batch: Batch
    decisions: list[Decision]
    """Oldest first."""
    versions: list[MadeVersion]
    words: list[str]
    """The same as lines of text."""


@closed
class Source(TypedDict):
    """What batches come from."""

    name: str
    passes: int
    """The newest scan that a full pass has covered."""
    pending: int
    """Seen, and not finished or not durable yet."""
    problem: str | None


@closed
class Gap(TypedDict):
    """What a source lost before it was read."""

    source: str
    key: str
    position: str
    reason: str
    at: str


Scan = TypedDict("Scan", {"pass": int})
Scan.__doc__ = "Once every source's passes are as many, all that was there at the time of the request has been seen."
closed(Scan)


@closed
class Problem(TypedDict):
    """What keeps the daemon from working."""

    who: str
    """A source, learning, or task N."""
    kind: str
    text: str
    since: str | None


@closed
class Network(TypedDict):
    """The fixed random network."""

    widths: list[int]
    seed: int
    sha256: str
    normalisation: str
    classes: list[int] | list[str]
    mask_bytes: int


@closed
class MasksInMemory(TypedDict):
    """Less than all where they exceed their share of the memory."""

    count: int
    bytes: int


@closed
class Status(TypedDict):
    """The daemon at a glance."""

    version: str
    pid: int
    uptime_seconds: float
    state_dir: str
    socket: str
    watch: list[str]
    device: str
    scenario: Scenario
    network: Network | None
    """None before the first labelled batch."""
    tasks: int
    masks_in_memory: MasksInMemory
    batches: dict[BatchState, int]
    learned_batches: int
    """Since the start."""
    sources: list[Source]
    problems: list[Problem]
    """The oldest first."""
    queue: int
    """Staged plus training."""
    settled: bool
    """Nothing is queued, in progress or pending, and each source has been read to its end."""


class Reservoir(TypedDict, total=False):
    """The Hopfield reservoir; without one, enabled alone."""

    enabled: bool
    patterns: int
    tasks: list[int]
    capacity: int
    load: float
    units: list[int]
    matrix_bytes: int
    raw_bytes: int
    break_even_patterns: int
    bits_kept: bool
    recovery_tried: int
    recovered: int
    recovery_rate: float | None
    recovered_from: str


closed(Reservoir)


class Row(TypedDict):
    """What is predicted for one row."""

    label: int | str
    task: int
    entropy: float
    """Nats."""
    known: bool
    """Whether the inputs look like that task's own."""
