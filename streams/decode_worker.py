"""The process that decodes: it holds one socket to its parent, and may open, write and take only little.

Run as `python -m streams.decode_worker FD` with the socket's descriptor; without FD it only shows that it can start.
"""

import ctypes
import gc
import os
import resource
import signal
import socket
import sys
from dataclasses import asdict
from typing import Any

import numpy as np

from streams.arrays import summary
from streams.batch import Batch, BatchRejected
from streams.budget import working_bytes
from streams.formats import prepare, read
from streams.reading import Columns, Limits, Reading
from streams.wire import HEADER, MAX_JSON_BYTES, MAX_TEXT, describe, message, receive

_SET_DUMPABLE, _SET_NO_NEW_PRIVILEGES = 4, 38  # of prctl
_NEW_USER_AND_NETWORK = 0x10000000 | 0x40000000  # of unshare
_LARGE = 1 << 20  # bytes
_ORPHAN_SECONDS = 5  # after the time in which the parent ends us


def main() -> None:
    """Answers requests until the parent closes its end."""
    if len(sys.argv) < 2:
        return
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        settings, _ = receive(connection)
        reading, libc = _reading(settings), ctypes.CDLL(None)
        trim = getattr(libc, "malloc_trim", None)  # glibc's
        _confine(libc, settings["memory_bytes"], settings["descriptors"])
        connection.sendall(message({"ready": True}))
        while True:
            start, descriptors, _, _ = socket.recv_fds(connection, HEADER.size + MAX_JSON_BYTES, 1)
            if not start:
                return
            # Should the parent die meanwhile, nobody else ends an endless request.
            signal.setitimer(signal.ITIMER_REAL, settings["seconds"] + _ORPHAN_SECONDS)
            size = _serve(connection, start, descriptors[0], reading)
            # Who waits for the next one holds nothing of this one, nor what errors and frames hold of each other.
            if size > _LARGE:
                gc.collect()
            if trim is not None:
                trim(0)
            signal.setitimer(signal.ITIMER_REAL, 0)


def _serve(connection: socket.socket, start: bytes, descriptor: int, reading: Reading) -> int:
    """Answers one request, whose first bytes are `start`; how many bytes it was about."""
    request, size = receive(connection, start)
    answer = _answer(request["form"], descriptor, size, reading)
    os.close(descriptor)
    _send(connection, request["verb"], answer)
    return size


def _reading(settings: dict[str, Any]) -> Reading:
    columns = settings["columns"]
    return Reading(
        Limits(**settings["limits"]),
        Columns(tuple(columns["x"]), columns["y"], columns["task"]),
        settings["with_task"],
    )


def _confine(libc: ctypes.CDLL, memory_bytes: int, descriptors: int) -> None:
    """`memory_bytes` of address space more than now, a few descriptors, no byte written, no core, no new rights."""
    libc.unshare(_NEW_USER_AND_NETWORK)  # where the system allows it: no network, and no rights of root
    libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    for kind, most in (
        (resource.RLIMIT_AS, _address_space() + memory_bytes),
        (resource.RLIMIT_NOFILE, descriptors),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _address_space() -> int:
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123  # no other module for one line
        return int(file.read().split()[0]) * resource.getpagesize()


def _answer(form: str, descriptor: int, size: int, reading: Reading) -> Batch | BatchRejected:
    """What the first `size` bytes behind the descriptor hold; meanwhile they may take as much as they may need."""
    needed = working_bytes(size, reading.limits)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    allowed = most
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        prepare(form)
        allowed = _address_space() + needed
        resource.setrlimit(resource.RLIMIT_AS, (min(allowed, most), most))
        return read(os.pread(descriptor, size, 0), form, reading)
    except BatchRejected as rejection:
        if rejection.code == "oom" and allowed < most:  # it would not fare better anywhere
            return BatchRejected("too_large", f"{size} bytes take over {needed} while they are decoded")
        return rejection
    except MemoryError:
        return BatchRejected("oom", f"{size} bytes take more memory than there is")


def _send(connection: socket.socket, verb: str, answer: Batch | BatchRejected) -> None:
    if isinstance(answer, BatchRejected):
        connection.sendall(message({"code": answer.code, "text": answer.text[:MAX_TEXT]}))
    elif verb == "inspect":
        connection.sendall(message(asdict(summary(answer))))
    else:
        reply, parts = describe(answer)
        connection.sendall(message(reply, sum(part.nbytes for part in parts)))
        for part in parts:
            connection.sendall(part.reshape(-1).view(np.uint8).data)


if __name__ == "__main__":
    main()
