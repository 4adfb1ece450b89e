"""The bytes of batches that may still be wanted, one file per content, named by its SHA-256.

A batch is acknowledged only when its bytes are here and durable. They go when no row of the ledger needs them.
"""

import re
import threading
from collections.abc import Mapping
from errno import EIO
from pathlib import Path
from uuid import uuid4

from storage.durable import Files
from storage.failpoints import hit
from storage.packing import sha256 as digest_of

_DIGEST = re.compile(r"[0-9a-f]{64}")


class SpoolCorrupt(RuntimeError):
    """The bytes of a batch are missing, or are not what their name says."""


class Spool:
    """A content-addressed folder: directory 0700, files 0600.

    `guard` is held by whoever stores bytes until the ledger says that they are needed, and by whoever removes them
    since it says that they are not: otherwise a removal could come between the two.
    """

    def __init__(self, root: Path, files: Files | None = None) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._root = root
        self._files = files or Files()
        self._files.sync_folder(root.parent)
        self.guard = threading.RLock()

    @property
    def root(self) -> Path:
        return self._root

    def store(self, payloads: Mapping[str, bytes]) -> None:
        """Make payloads durable under their hashes, all with one sync of the folder; storing one again is harmless.

        The hashes are the caller's, who has just made them; `load` looks whether they are true. Raises OSError when the
        payloads cannot be made durable (SyncFailed when the system failed to say so): then none of them is promised.
        """
        targets = {self._path(sha256): payload for sha256, payload in payloads.items()}
        temporary = {target: self._root / f"{target.name}.{uuid4().hex}.tmp" for target in targets}
        try:
            self._write(targets, temporary)
            for target, path in temporary.items():
                self._files.rename(path, target)
        except OSError:
            for path in temporary.values():
                path.unlink(missing_ok=True)
            raise
        if targets:
            self._files.sync_folder(self._root)
            hit("spool.stored")

    def _write(self, targets: Mapping[Path, bytes], temporary: Mapping[Path, Path]) -> None:
        """All are written before the first is synced: the system then writes them out together."""
        written: list[int] = []
        try:
            for target, payload in targets.items():
                written.append(self._files.write(temporary[target], payload))
            while written:
                self._files.sync(written.pop(0))
        finally:
            self._files.close(written)

    def load(self, sha256: str) -> bytes:
        """The payload with this hash. Raises SpoolCorrupt when it is missing or damaged."""
        try:
            payload = self._files.read(self._path(sha256))
        except FileNotFoundError:
            raise SpoolCorrupt(f"spool_corrupt: the bytes of {sha256} are missing") from None
        except OSError as error:
            if error.errno != EIO:
                raise
            raise SpoolCorrupt(f"spool_corrupt: the bytes of {sha256} cannot be read: {error.strerror}") from error
        if digest_of(payload) != sha256:
            raise SpoolCorrupt(f"spool_corrupt: the bytes of {sha256} have another hash")
        return payload

    def remove(self, sha256: str) -> None:
        """Forget a payload. Removing it again is harmless."""
        self._files.remove(self._path(sha256))

    def names(self) -> set[str]:
        """The hashes of all payloads."""
        return {name for name in self._files.names(self._root) if _DIGEST.fullmatch(name)}

    def size(self) -> int:
        """What all payloads take, in bytes."""
        return sum(self._files.size(self._root / name) for name in self.names())

    def clean(self, keep: set[str]) -> int:
        """Remove every file not named in `keep`, also what a crash left half-written; returns how many."""
        stray = [name for name in self._files.names(self._root) if name not in keep]
        for name in stray:
            self._files.remove(self._root / name)
        return len(stray)

    def _path(self, sha256: str) -> Path:
        if not _DIGEST.fullmatch(sha256):
            raise ValueError(f"not a SHA-256: {sha256!r}")
        return self._root / sha256
