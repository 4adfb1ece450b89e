"""What a source hands over: a finished batch, or the reason why a file is none."""

import hashlib
from dataclasses import dataclass

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
class Arrival:
    """A finished batch as bytes that `formats.decode` accepted.

    name: path relative to the watched folder, '/' separated, printable.
    sha256: 64 hex digits of `payload`.
    key, position: the cursor; the same key with the same position is the same content.
    task: which task it says it belongs to, where that is looked for.
    """

    source: str
    name: str
    sha256: str
    payload: bytes
    samples: int
    labelled: bool
    key: str
    position: str
    task: str | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A file that is no batch; `reason` is one line "code: text", `sha256` is None when it was not read."""

    source: str
    name: str
    sha256: str | None
    code: str
    reason: str
    key: str
    position: str
