"""What a source hands over: the finished bytes of a batch, the reason why something is none, or a gap."""

import hashlib
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np


class BatchRejected(ValueError):
    """The bytes are no batch: `code` is a word of a closed list, `text` says what, where and why not."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


@dataclass(frozen=True, slots=True)
class Batch:
    """Decoded samples in native byte order.

    x: (n, d) vectors or (n, H, W[, C]) images; float16/32/64, any integer, or bool; finite; n >= 1.
    y: (n,) int64 or str ('<U..') labels, None when the batch is unlabelled.
    task: the user's own name of the task, None when it was not told or not looked for.
    """

    x: np.ndarray
    y: np.ndarray | None
    task: str | None = None

    def sha256(self) -> str:
        """Hash of the samples and labels alone, 64 hex digits: the same however they were packed and sent."""
        digest = hashlib.sha256()
        for array in (self.x, self.y):
            if array is not None:
                digest.update(f"{array.dtype.str}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Summary:
    """What is known of a batch whose bytes were decoded once: rows of x, labels or none, its own task or None."""

    samples: int
    labelled: bool
    task: str | None = None


@dataclass(frozen=True, slots=True)
class Arrival:
    """Finished bytes. Nobody has looked into them yet.

    name: path below the watched folder, '/' separated, or the sender's name for it; printable.
    form: how the bytes are to be read, a name of `formats.FORMATS`.
    sha256: 64 hex digits of `payload`.
    key, position: the cursor: `key` (a file, a stream, a partition) is read up to `position`. The same position of a
    file is the same content; a message that is repeated late has the cursor's position, so as not to turn it back.
    identity: what the source calls this one delivery, where the same delivery may come again at any time (a stream's
    sequence number, an idempotency key); None where the cursor alone tells.
    may_grow: it may turn out not to be whole yet: then it is postponed instead of refused.
    sender: who posted it; None where the source itself delivered it.
    """

    source: str
    name: str
    form: str
    sha256: str
    payload: bytes
    key: str
    position: str
    identity: str | None = None
    may_grow: bool = False
    sender: str | None = None

    @property
    def origin(self) -> str:
        """The source, and in it who posted it."""
        return self.source if self.sender is None else f"{self.source} {self.sender}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something that is no batch, seen without its bytes; `reason` is one line "code: text"."""

    source: str
    name: str
    code: str
    reason: str
    key: str
    position: str
    identity: str | None = None


@dataclass(frozen=True, slots=True)
class Gap:
    """The source has lost what it had not handed over yet: `reason`, one line, says what is missing.

    Once an operator has accepted the loss, the source goes on from `position` of `key`. It may lie before the cursor: a
    stream made anew begins anew.
    """

    source: str
    key: str
    position: str
    reason: str


Item: TypeAlias = Arrival | Refusal | Gap


def digest_of(payload: bytes) -> str:
    """SHA-256, 64 hex digits."""
    return hashlib.sha256(payload).hexdigest()
