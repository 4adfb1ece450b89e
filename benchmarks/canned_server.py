"""Answers every HTTP request at once with the same bytes: what is asked of it a second is what the clients can ask.

    python benchmarks/canned_server.py FILE

FILE holds the whole answer; the port is printed.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvloop


class Canned(asyncio.Protocol):
    """One connection."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._read = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._read += data
        while (head := self._read.find(b"\r\n\r\n")) >= 0:
            length = self._read[:head].lower().split(b"\r\ncontent-length:", 1)[1].split(b"\r\n", 1)[0]
            end = head + 4 + int(length)
            if len(self._read) < end:
                return
            del self._read[:end]
            self._transport.write(self._answer)


async def serve(answer: bytes) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Canned(answer), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1]).read_bytes()))
