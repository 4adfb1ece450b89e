"""A folder on a disk that may lose power: every state that it can be in afterwards, when nothing unsynced is sure.

Each file keeps any one of the contents that it had since its last sync, each name any one of the files that it stood
for since the last sync of the folder, all independently of each other. That is harsher than any real file system.
"""

import errno
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from storage.durable import Files, SyncFailed

State = dict[str, bytes]
"""What a folder holds after a start: names and their contents."""


@dataclass(frozen=True)
class Moment:
    """All that may be true of the disk after one more operation."""

    operation: str
    names: Mapping[str, tuple[int | None, ...]]
    contents: Mapping[int, tuple[bytes, ...]]

    def states(self) -> Iterator[State]:
        """Each of the states that a loss of power may leave, once."""
        seen = set()
        for files in itertools.product(*self.names.values()):
            kept = [(name, number) for name, number in zip(self.names, files, strict=True) if number is not None]
            numbers = sorted({number for _, number in kept})
            for contents in itertools.product(*(self.contents[number] for number in numbers)):
                found = dict(zip(numbers, contents, strict=True))
                state = {name: found[number] for name, number in kept}
                key = frozenset(state.items())
                if key not in seen:
                    seen.add(key)
                    yield state


@dataclass
class SimFiles(Files):
    """One folder in memory. `moments`: how it was at first, and after each operation.

    Args:
        root: the folder's path.
        state: what it durably holds at first.
        fails: the number of the operation, from 1, that the system refuses.
    """

    root: Path
    state: State = field(default_factory=dict)
    fails: int = 0

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self._operations = itertools.count(1)
        self._contents: dict[int, list[bytes]] = {}  # since the last sync, the newest at the end
        self._names: dict[str, list[int | None]] = {}
        self.moments: list[Moment] = []
        for name, content in self.state.items():
            number = next(self._numbers)
            self._contents[number], self._names[name] = [content], [number]
        self._passed("nothing yet")

    def write(self, path: Path, data: bytes) -> int:
        self._try("create")
        number = next(self._numbers)
        self._contents[number] = [b""]
        self._name(path, number)
        self._passed(f"create {path.name}")
        # Whatever order the blocks are written in, and whatever was there before.
        self._contents[number] += [data[: len(data) // 2], bytes(len(data)), data]
        self._passed(f"write {path.name}")
        return number

    def sync(self, descriptor: int) -> None:
        self._try("sync")
        self._contents[descriptor] = self._contents[descriptor][-1:]
        self._passed("sync a file")

    def rename(self, source: Path, target: Path) -> None:
        self._try("rename")
        self._name(target, self._names[source.name][-1])
        self._name(source, None)
        self._passed(f"rename to {target.name}")

    def sync_folder(self, folder: Path) -> None:
        if folder != self.root:
            return  # it was made before all this
        self._try("sync_folder")
        self._names = {name: files[-1:] for name, files in self._names.items() if files[-1] is not None}
        self._passed("sync the folder")

    def close(self, descriptors) -> None:
        pass

    def remove(self, path: Path) -> None:
        self._try("remove")
        if path.name in self._names:
            self._name(path, None)
        self._passed(f"remove {path.name}")

    def read(self, path: Path) -> bytes:
        number = self._names.get(path.name, [None])[-1]
        if number is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return self._contents[number][-1]

    def names(self, folder: Path) -> list[str]:
        return [name for name, files in self._names.items() if files[-1] is not None]

    def _name(self, path: Path, number: int | None) -> None:
        assert path.parent == self.root
        self._names.setdefault(path.name, [None]).append(number)

    def _try(self, operation: str) -> None:
        if next(self._operations) == self.fails:
            raise SyncFailed(errno.EIO, operation) if "sync" in operation else OSError(errno.EIO, operation)

    def _passed(self, operation: str) -> None:
        names = {name: tuple(files) for name, files in self._names.items()}
        contents = {number: tuple(found) for number, found in self._contents.items()}
        self.moments.append(Moment(operation, names, contents))
