"""Writers of every habit at once: all that they finish comes, each state of it once, and nothing that they did not."""

import hashlib
import random

import pytest
from folders import NEVER, await_tick

from streams.directory import DirectorySettings

STEPS = 60


class Writers:
    """They write contents that say their own length, as formats do."""

    def __init__(self, root, random):
        self._root = root
        self._random = random
        self._slow = {}  # open file and the rest of its content, by path
        self.finished = {}  # the newest whole content, by key
        self.written = set()

    def step(self):
        getattr(self, self._random.choice(["at_once", "rename", "mark", "begin", "go_on", "go_on", "remove"]))()

    def finish(self):
        while self._slow:
            self.go_on()

    def at_once(self):
        path, content = self._next()
        path.write_bytes(content)

    def rename(self):
        path, content = self._next()
        hidden = path.with_name(f".{path.name}")
        hidden.write_bytes(content)
        hidden.rename(path)

    def mark(self):
        path, content = self._next()
        path.with_name(f"{path.name}.sha256").write_text(hashlib.sha256(content).hexdigest())
        path.write_bytes(content[:5])
        path.write_bytes(content)

    def begin(self):
        path, content = self._next()
        self._slow[path] = (path.open("wb"), content)

    def go_on(self):
        """A part more, and sometimes the file is closed in between."""
        if not self._slow:
            return
        path = self._random.choice(list(self._slow))
        file, rest = self._slow.pop(path)
        cut = self._random.randint(1, 200)
        file.write(rest[:cut])
        file.flush()
        if not rest[cut:] or self._random.random() < 0.3:
            file.close()
        if rest[cut:]:
            self._slow[path] = (path.open("ab") if file.closed else file, rest[cut:])

    def remove(self):
        paths = [path for path in self._root.rglob("*.npz") if not self._is_slow(path)]
        if paths:
            path = self._random.choice(paths)
            path.unlink()
            path.with_name(f"{path.name}.sha256").unlink(missing_ok=True)
            self.finished.pop(str(path.relative_to(self._root)), None)

    def _next(self):
        """A path that nobody writes to, some new and some old, and what is to be written there."""
        names = [f"{folder}{number}.npz" for folder in ("", "a/", "a/b/") for number in range(4)]
        path = self._random.choice([self._root / name for name in names if not self._is_slow(self._root / name)])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f"{path.name}.sha256").unlink(missing_ok=True)
        body = self._random.randbytes(self._random.randint(0, 500))
        content = len(body).to_bytes(4, "big") + body
        self.finished[str(path.relative_to(self._root))] = content
        self.written.add(content)
        return path, content

    def _is_slow(self, path):
        return path in self._slow


def is_whole(payload):
    return len(payload) >= 4 and len(payload) == 4 + int.from_bytes(payload[:4], "big")


def consume(source, taken, cursors):
    """As intake does: what is cut off is postponed, all else acknowledged, in groups."""
    group = []
    for item in source.iter_arrivals():
        if is_whole(item.payload):
            taken.append((item.key, item.payload))
            group.append(item)
        else:
            assert item.may_grow, f"{item.key} is cut off and called finished"
            source.postpone(item)
    source.acknowledge(group)
    cursors.update({item.key: item.position for item in group})


@pytest.mark.parametrize("watching", ["auto", "polling"])
@pytest.mark.parametrize("seed", range(10))
def test_all_that_is_finished_comes_once_and_nothing_else(watched, open_source, seed, watching, monkeypatch):
    monkeypatch.setattr("streams.directory._COARSE_SECONDS", 0.0)  # of shares: their writers here are this process
    settings = DirectorySettings(settle_seconds=0, incomplete_seconds=NEVER, watching=watching)
    source = open_source(settings)
    writers = Writers(watched, random.Random(seed))
    taken, cursors = [], {}
    for step in range(STEPS):
        writers.step()
        await_tick()
        if step % 7 == 0:
            source = open_source(settings, cursors=cursors)  # a restart
        consume(source, taken, cursors)
    writers.finish()
    consume(source, taken, cursors)
    assert {content for _, content in taken} <= writers.written
    assert writers.finished.items() <= dict(taken).items()
    assert len(taken) == len(set(taken))
    assert list(source.iter_arrivals()) == []
    assert source.pending() == 0
