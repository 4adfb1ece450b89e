"""Listening: a Unix socket that is ours alone, and uvicorn in a thread of its own."""

import asyncio
import contextlib
import fcntl
import json
import os
import socket
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import h11
import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from supsupd.paths import MAX_SOCKET_PATH
from supsupd.serving.access import CALLER, Access

log = structlog.get_logger("supsupd.serving")
BACKLOG = 128


class SocketRefused(Exception):
    """The socket can't be made at this path; the text says why, in one line."""


class SocketInUse(SocketRefused):
    """A live server answers at this path."""


def bind_unix(path: Path, mode: int = 0o600) -> socket.socket:
    """A socket that listens at `path` with the permissions `mode`; a missing folder is made, 0700.

    The socket file of a dead server is replaced. Raises SocketInUse where a live server answers, and
    SocketRefused for anything else in the way.
    """
    path = path.absolute()
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise SocketRefused(f"{path} is longer than the {MAX_SOCKET_PATH} bytes that a Unix socket's path may have")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.parent.stat().st_uid not in (0, os.geteuid()):
            raise SocketRefused(f"{path.parent} is another user's folder: its owner could replace the socket")
        with _folder_lock(path.parent):
            _clear_stale(path)
            return _listen(path, mode)
    except OSError as error:
        raise SocketRefused(f"{path} can't be made a socket: {error.strerror or error}") from error


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    # Of two daemons that start at once, one must not remove the socket that the other has just made.
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _clear_stale(path: Path) -> None:
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise SocketRefused(f"{path} exists and is not a socket; it is left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            log.info("stale_socket_replaced", path=str(path))
            return
        except (BlockingIOError, TimeoutError):
            pass  # its backlog is full: alive and busy
    raise SocketInUse(f"{path} is the socket of another server that answers")


def _listen(path: Path, mode: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(mode)  # before listen: nobody can connect while the mode is the umask's
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class _Http(H11Protocol):
    """What is not HTTP at all gets the same kind of error as everything else; every request carries its peer's uid."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection.family == socket.AF_UNIX:
            access: Access = self.config.app.state.access  # type: ignore[union-attr]  # of `create_app`
            caller = access.caller_of_unix(connection)
            if caller is None:
                transport.abort()
            else:
                self.app_state = {**self.app_state, CALLER: caller}

    def send_400_response(self, msg: str) -> None:
        body = json.dumps({"error": f"bad_request: {msg}"}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, serving: threading.Event) -> None:
        super().__init__(config)
        self.serving = serving

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.serving.set()


class HttpServer:
    """Serves `app` on `sockets` (of `bind_unix`) from its own thread; signals stay with the main thread."""

    def __init__(self, app: ASGIApp, sockets: Sequence[socket.socket]) -> None:
        config = uvicorn.Config(
            app,
            http=_Http,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
        )
        self._sockets = list(sockets)
        self._files = [(path := Path(s.getsockname()), _identity(path)) for s in self._sockets]
        self._settled = threading.Event()
        self._server = _Uvicorn(config, self._settled)
        self._thread = threading.Thread(target=self._run, name="supsupd-http", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs; False after `start` and before `stop` means that serving has failed."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Returns once requests are answered. Raises RuntimeError if serving did not start."""
        self._thread.start()
        self._settled.wait()
        if not self._server.started:
            raise RuntimeError("the HTTP server did not start; the log says why")

    def stop(self, timeout: float = 8.0) -> bool:
        """Removes the socket files, gives the requests in progress `timeout` seconds to end, then cuts them
        off. Returns whether the thread has ended."""
        for path, identity in self._files:
            if _identity(path) == identity:  # else it is another's by now
                path.unlink(missing_ok=True)
        self._server.config.timeout_graceful_shutdown = max(1, int(timeout))
        self._server.should_exit = True
        if self.alive:
            self._thread.join(timeout + 1.0)
        for listener in self._sockets:
            listener.close()
        return not self.alive

    def _run(self) -> None:
        try:
            self._server.run(sockets=self._sockets)
        except Exception:  # the thread's edge: the daemon sees it in `alive`
            log.exception("http_server_failed")
        finally:
            self._settled.set()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
