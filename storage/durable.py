"""The file operations that durability rests on, and nothing else, so that a test can lose any of them."""

import os
from collections.abc import Iterable
from pathlib import Path

from storage.failpoints import hit


class SyncFailed(OSError):
    """The system could not make something durable. It may have dropped what it had: asking again proves nothing."""


class Files:
    """The operating system's files. Files are 0600. Every method raises OSError."""

    def write(self, path: Path, data: bytes) -> int:
        """Make a new file that holds `data`; it is not durable before `sync`. Returns its open descriptor."""
        hit("spool.create")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            hit("spool.write")
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def sync(self, descriptor: int) -> None:
        """The file's bytes are durable. Raises SyncFailed; the descriptor is closed in any case."""
        try:
            hit("spool.sync")
            os.fsync(descriptor)
        except OSError as error:
            raise SyncFailed(error.errno, f"fsync: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Its name is durable only after `sync_folder`."""
        hit("spool.rename")
        source.rename(target)

    def sync_folder(self, folder: Path) -> None:
        """The names in `folder` are durable. Raises SyncFailed."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            hit("spool.sync_folder")
            os.fsync(descriptor)
        except OSError as error:
            raise SyncFailed(error.errno, f"fsync of {folder}: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def close(self, descriptors: Iterable[int]) -> None:
        """Give up files that will not be synced."""
        for descriptor in descriptors:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Removing it again is harmless."""
        hit("spool.remove")
        path.unlink(missing_ok=True)

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def size(self, path: Path) -> int:
        """In bytes; 0 for a file that is gone."""
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return 0

    def names(self, folder: Path) -> list[str]:
        """Of the files in `folder`."""
        return [path.name for path in folder.iterdir() if not path.is_dir()]
