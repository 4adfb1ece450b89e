"""What a process and all that it started hold, by the kernel's word."""

import threading
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20
LOOK_SECONDS = 0.02


def resident(pid):
    """Bytes of memory of a process and its children."""
    return sum(_resident(found) for found in _tree(pid))


@contextmanager
def peak(pid):
    """A list of what is held, time after time, from the beginning of the block to its end."""
    seen, ended = [resident(pid)], threading.Event()

    def look():
        while not ended.wait(LOOK_SECONDS):
            seen.append(resident(pid))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        ended.set()
        looking.join()
        seen.append(resident(pid))


def _tree(pid):
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:
            continue
        for child in found:
            yield from _tree(int(child))


def _resident(pid):
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:")), 0)
