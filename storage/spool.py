"""The bytes of batches that are not finished yet, one file per content, named by its SHA-256.

A batch is acknowledged only when its bytes are here and durable; they go when its row has a final state.
"""

import os
import re
import tempfile
from pathlib import Path

from storage.packing import sha256 as digest_of

_DIGEST = re.compile(r"[0-9a-f]{64}")


class SpoolCorrupt(RuntimeError):
    """The bytes of a batch are missing, or are not what their name says."""


class Spool:
    """A content-addressed folder: directory 0700, files 0600."""

    def __init__(self, root: Path) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._root = root
        _sync_directory(root.parent)

    def store(self, sha256: str, payload: bytes) -> None:
        """Make `payload` durable under its hash; storing it again is harmless.

        Raises ValueError when the hash is not that of the payload, OSError when it cannot be made durable.
        """
        target = self._path(sha256)
        if digest_of(payload) != sha256:
            raise ValueError(f"the payload does not have the hash {sha256}")
        descriptor, name = tempfile.mkstemp(prefix=f"{sha256}.", suffix=".tmp", dir=self._root)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(self._root)

    def load(self, sha256: str) -> bytes:
        """The payload with this hash. Raises SpoolCorrupt when it is missing or damaged."""
        try:
            payload = self._path(sha256).read_bytes()
        except FileNotFoundError:
            raise SpoolCorrupt(f"spool: {sha256} is missing") from None
        if digest_of(payload) != sha256:
            raise SpoolCorrupt(f"spool: the content of {sha256} has another hash")
        return payload

    def remove(self, sha256: str) -> None:
        """Forget a payload. Removing it again is harmless."""
        self._path(sha256).unlink(missing_ok=True)

    def names(self) -> set[str]:
        """The hashes of all payloads."""
        return {path.name for path in self._root.iterdir() if _DIGEST.fullmatch(path.name)}

    def clean(self, keep: set[str]) -> int:
        """Remove every file not named in `keep`, also what a crash left half-written; returns how many."""
        stray = [path for path in self._root.iterdir() if path.name not in keep and not path.is_dir()]
        for path in stray:
            path.unlink(missing_ok=True)
        return len(stray)

    def _path(self, sha256: str) -> Path:
        if not _DIGEST.fullmatch(sha256):
            raise ValueError(f"not a SHA-256: {sha256!r}")
        return self._root / sha256


def _sync_directory(directory: Path) -> None:
    """A new name is durable only when its directory is."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
