"""What is listened on: a Unix socket that is ours alone, a TCP port, TLS, and sockets that were made by others."""

import contextlib
import fcntl
import grp
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from supsupd.config import ConfigError, ServerTlsSettings
from supsupd.paths import MAX_SOCKET_PATH

log = structlog.get_logger("supsupd.serving")
BACKLOG = 1024
"""Connections that the system keeps for us until we accept them; beyond them it lets TCP's clients try again in a
second."""
Identity = tuple[int, int]
"""Device and inode of a file."""


class SocketRefused(Exception):
    """The socket can't be made; the text says why, in one line."""


class SocketInUse(SocketRefused):
    """A live server answers there."""


@dataclass(slots=True)
class Listener:
    """A socket that listens.

    Args:
        socket: of a Unix socket or TCP.
        tls: what is spoken on it, None: plain HTTP; replaced when the configuration is read again.
        file: the Unix socket's file that goes when we do, with its identity; None for a socket that is not ours.
        is_ours: False for one that another process made and goes on listening on.
    """

    socket: socket.socket
    tls: ssl.SSLContext | None = None
    file: tuple[Path, Identity | None] | None = None
    is_ours: bool = True

    @property
    def is_unix(self) -> bool:
        return self.socket.family == socket.AF_UNIX

    @property
    def host(self) -> str:
        """The address of TCP."""
        return str(self.socket.getsockname()[0])

    @property
    def address(self) -> str:
        """The path, or HOST:PORT as it was bound."""
        if self.is_unix:
            return str(self.socket.getsockname())
        port = self.socket.getsockname()[1]
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

    def remove_file(self) -> None:
        """Whoever connects to the path from now on is refused at once."""
        if self.file is not None:
            path, identity = self.file
            if _identity(path) == identity:  # else it is another's by now
                path.unlink(missing_ok=True)

    def refuse_newcomers(self) -> None:
        """Those who wait to be accepted still are."""
        if self.is_ours and self.is_unix:
            self.socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        self.socket.close()


def adopt(listening: socket.socket, tls: ssl.SSLContext | None = None) -> Listener:
    """A socket that another process listens on and handed to us; TLS is spoken on TCP alone."""
    is_unix = listening.family == socket.AF_UNIX
    return Listener(listening, None if is_unix else tls, is_ours=False)


def bind_tcp(host: str, port: int, tls: ssl.SSLContext | None = None) -> Listener:
    """Listens on this port, 0 for any that is free, of one address: of a name with several, IPv4 comes first.

    Raises SocketInUse where another server has it, SocketRefused for a host that is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        listening = socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        reason = (error.strerror or str(error)).split(" (while")[0]
        text = f"{host}:{port} can't be listened on: {reason}"
        raise (SocketInUse if "in use" in reason else SocketRefused)(text) from error
    listening.setblocking(False)
    return Listener(listening, tls)


def tls_context(settings: ServerTlsSettings) -> ssl.SSLContext | None:
    """TLS 1.2 or newer with our certificate; with `client_ca` only for clients that have one too. None: not set.

    Raises ConfigError, which names the file.
    """
    if settings.certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        # A password would be asked for on the terminal.
        context.load_cert_chain(settings.certificate, settings.key, password="")
    except OSError as error:
        given = f"{settings.certificate} and {settings.key}"
        raise ConfigError([f"tls.certificate, tls.key: given {given}; {_tls_problem(error)}"]) from None
    if settings.client_ca is not None:
        try:
            context.load_verify_locations(settings.client_ca)
        except OSError as error:
            raise ConfigError([f"tls.client_ca: given {settings.client_ca}; {_tls_problem(error)}"]) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _tls_problem(error: OSError) -> str:
    reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
    return f"expected PEM files that belong together and need no password: {reason or error}"


def bind_unix(path: Path, mode: int = 0o600, group: str | None = None) -> Listener:
    """Listens at `path`, with the permissions `mode`, or 0660 and this group; a missing folder is made, for the same.

    The socket file of a dead server is replaced. Raises SocketInUse where a live server answers, and
    SocketRefused for anything else in the way.
    """
    path = path.absolute()
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise SocketRefused(f"{path} is longer than the {MAX_SOCKET_PATH} bytes that a Unix socket's path may have")
    gid = None if group is None else _group_id(group)
    try:
        _make_folder(path.parent, gid)
        if path.parent.stat().st_uid not in (0, os.geteuid()):
            raise SocketRefused(f"{path.parent} is another user's folder: its owner could replace the socket")
        with _folder_lock(path.parent):
            _clear_stale(path)
            return _listen(path, mode if gid is None else 0o660, gid)
    except OSError as error:
        raise SocketRefused(f"{path} can't be made a socket: {error.strerror or error}") from error


def _group_id(group: str) -> int:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise SocketRefused(f"serving.socket_group: given {group!r}; expected a group of this machine") from None


def _make_folder(folder: Path, gid: int | None) -> None:
    if folder.exists():
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if gid is not None:
        os.chown(folder, -1, gid)
        folder.chmod(0o750)


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


def _listen(path: Path, mode: int, gid: int | None) -> Listener:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(str(path))
        if gid is not None:
            os.chown(path, -1, gid)
        path.chmod(mode)  # before listen: nobody can connect while the mode is the umask's
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    listening.setblocking(False)
    return Listener(listening, file=(path, _identity(path)))


def _identity(path: Path) -> Identity | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
