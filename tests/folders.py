"""Watched folders for tests: what is put into them, and passes over them as the daemon makes them."""

import io
import time

import numpy as np
import pytest
from PIL import Image

from streams.batch import Arrival
from streams.directory import DirectorySettings, DirectorySource

AT_ONCE = DirectorySettings(settle_seconds=0, incomplete_seconds=0)
NEVER = 1e6


def npz(value=0, **members):
    target = io.BytesIO()
    np.savez(target, x=np.full((4, 3), value, np.float32), **({"y": np.arange(4)} | members))
    return target.getvalue()


def npy(array):
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()


def png(value=0):
    target = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(target, "PNG")
    return target.getvalue()


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def await_tick():
    """Until what is written next has a later time than what is there: file times go in steps of the kernel's clock."""
    begun = time.monotonic()
    while time.monotonic() - begun < 0.02:
        pass


def take(source):
    """One pass in which everything is acknowledged."""
    items = []
    for item in source.iter_arrivals():
        source.acknowledge([item])
        items.append(item)
    return items


def wait_for(source, count=1, timeout=20.0):
    """Passes as the daemon makes them, until `count` items came."""
    deadline = time.monotonic() + timeout
    items = take(source)
    while len(items) < count:
        assert time.monotonic() < deadline, f"only {items} in {timeout} s"
        source.wait(0.05)
        items += take(source)
    return items


def names(items):
    """What arrived by its name, what was refused by its code."""
    return [item.name if isinstance(item, Arrival) else item.code for item in items]


@pytest.fixture
def watched(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def open_source(watched):
    sources = []

    def make(settings=AT_ONCE, cursors=None, root=watched):
        sources.append(DirectorySource(root, name="in", cursors=cursors or {}, settings=settings))
        return sources[-1]

    yield make
    for source in sources:
        source.close()
