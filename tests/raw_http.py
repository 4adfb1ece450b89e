"""HTTP byte by byte, over a Unix socket or TCP, and a good client beside it that must notice nothing."""

import contextlib
import json
import socket
import threading
import time
from dataclasses import dataclass, field

from credentials import Credentials
from tiny_engine import TinyEngine, port_of, serving

from supsupd.sections import ServingSettings
from supsupd.serving.access import Access

LIVE = "/v2/health/live"


@dataclass
class Answer:
    """One answer as it came."""

    status: int
    headers: dict
    body: bytes

    @property
    def error(self):
        return json.loads(self.body)["error"]


class Door:
    """One of a server's two doors: `kind` is "unix" or "tcp"."""

    def __init__(self, kind, path, port, token):
        self.kind = kind
        self.port = port
        self._path = path
        self._authorization = f"Authorization: {token}\r\n" if kind == "tcp" else ""

    def connect(self, timeout=20.0, receive_bytes=None):
        """A connection whose reads give up after so many seconds, and on which so much fits."""
        is_unix = self.kind == "unix"
        connection = socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET)
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.connect(self._path if is_unix else ("127.0.0.1", self.port))
        connection.settimeout(timeout)
        return connection

    def head(self, method="GET", path=LIVE, *headers, version="HTTP/1.1", host="Host: localhost"):
        """The bytes of a request's head, with all that is needed to be let in."""
        lines = [f"{method} {path} {version}", *([host] if host else []), *headers]
        return ("\r\n".join(lines) + "\r\n" + self._authorization + "\r\n").encode()

    def post(self, body, *headers, path="/v2/models/supsup/infer"):
        """The bytes of a request whose body has a length."""
        return self.head("POST", path, f"Content-Length: {len(body)}", *headers) + body

    def say(self, script, then_end=False):
        """All answers to these bytes, up to the connection's end. Chunks of a script are sent one by one."""
        with self.connect() as connection:
            for piece in [script] if isinstance(script, bytes) else script:
                try:
                    connection.sendall(piece)
                except (BrokenPipeError, ConnectionResetError):  # it has been refused; what it is told is read
                    break
            if then_end:
                connection.shutdown(socket.SHUT_WR)
            return read_all(connection)


def read_answer(stream):
    """The next answer of a binary stream; None at its end."""
    status = stream.readline()
    if not status:
        return None
    version, code, _ = status.split(b" ", 2)
    assert version == b"HTTP/1.1", status
    headers = {}
    while (line := stream.readline()) != b"\r\n":
        name, value = line.decode().rstrip("\r\n").split(": ", 1)
        headers[name] = value
    body = stream.read(int(headers["content-length"]))
    assert len(body) == int(headers["content-length"]), "half an answer"
    return Answer(int(code), headers, body)


def read_all(connection):
    """Every answer up to the end of the connection."""
    answers = []
    with connection.makefile("rb") as stream, contextlib.suppress(ConnectionResetError):
        while (answer := read_answer(stream)) is not None:
            answers.append(answer)
    return answers


@dataclass
class Beside:
    """A client that asks again and again over one connection: what it was told, and how long that took."""

    answers: int = 0
    failures: list = field(default_factory=list)
    seconds: list = field(default_factory=list)


@contextlib.contextmanager
def good_client(door, pause=0.002):
    """Asks for as long as the block runs; at its end it has seen no failure."""
    seen, done = Beside(), threading.Event()

    def ask():
        with door.connect() as connection, connection.makefile("rb") as stream:
            while not done.wait(pause):
                began = time.monotonic()
                try:
                    connection.sendall(door.head())
                    answer = read_answer(stream)
                except OSError as error:
                    answer = error
                seen.seconds.append(time.monotonic() - began)
                if not isinstance(answer, Answer) or answer.status != 200:
                    seen.failures.append(answer)
                    return
                seen.answers += 1

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield seen
    finally:
        done.set()
        asking.join(30)
    assert seen.failures == []
    assert seen.answers > 0


@contextlib.contextmanager
def open_door(kind, folder, engine=None, **limits):
    """The door of this kind of a server over a small engine."""
    credentials = Credentials(folder / "state")
    access = Access(lambda: ServingSettings(**limits), credentials.tokens)
    engine = engine or TinyEngine()
    with serving(engine, folder / "s.sock", tcp=True, access=access, **limits) as server:
        door = Door(kind, str(folder / "s.sock"), port_of(server), credentials.granted["admin"])
        door.server, door.engine = server, engine
        yield door
