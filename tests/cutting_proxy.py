"""A TCP proxy on loopback that loses what it is told to lose."""

import socket
import threading
from contextlib import suppress

from ports import free_ports


class CuttingProxy:
    """Forwards one port of its own to `target`.

    It goes on at `accept`; `cut` ends what is open, `refuse` also lets nobody in, `lose_requests` cuts a connection
    as soon as the client sends something, before the server sees it, `lose_replies` as soon as the server answers.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._losing = ""
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._listener: socket.socket | None = None
        (self.port,) = free_ports(1)
        self.cuts = 0
        self.accept()

    def accept(self) -> None:
        self._losing = ""
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port))
            threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            self._end(pair)

    def refuse(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.cut()

    def lose_requests(self) -> None:
        self._losing = "requests"

    def lose_replies(self) -> None:
        self._losing = "replies"

    def close(self) -> None:
        self.refuse()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            pair = (client, server)
            for end in pair:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs.add(pair)
            if self._listener is not listener:  # it was accepted just before nobody was to be let in
                self._end(pair)
            for source, sink, losing in ((client, server, "requests"), (server, client, "replies")):
                threading.Thread(target=self._pump, args=(pair, source, sink, losing), daemon=True).start()

    def _pump(self, pair: tuple[socket.socket, socket.socket], source: socket.socket, sink: socket.socket, losing: str):
        try:
            while data := source.recv(1 << 16):
                if self._losing == losing:
                    break
                sink.sendall(data)
        except OSError:
            pass  # cut from the other side
        self._end(pair)

    def _end(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._lock:
            if pair not in self._pairs:
                return
            self._pairs.remove(pair)
            self.cuts += 1
        for end in pair:
            with suppress(OSError):  # it is gone already
                end.shutdown(socket.SHUT_RDWR)
            end.close()
