"""Where gRPC listens: the library makes its own sockets, so that ours only hold the place, and say what is wrong."""

from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio

from supsupd.paths import MAX_SOCKET_PATH
from supsupd.sections import ServerTlsSettings, split_address
from supsupd.serving.listeners import Listener, SocketRefused, bind_tcp, bind_unix, tls_context


def listen_tcp(server: grpc.aio.Server, address: str, tls: ServerTlsSettings) -> str:
    """HOST:PORT as the server listens on it, for one that may have the port 0, with TLS where there is a certificate.

    Raises SocketRefused and ConfigError.
    """
    credentials = server_credentials(tls)
    held = bind_tcp(*split_address(address))  # says what is wrong, which the library does not
    found = held.address
    held.close()
    try:
        if credentials is None:
            server.add_insecure_port(found)
        else:
            server.add_secure_port(found, credentials)
    except RuntimeError:
        raise SocketRefused(f"{found} can't be listened on by gRPC") from None
    return found


def listen_unix(server: grpc.aio.Server, path: Path, group: str | None) -> Listener:
    """What removes the socket's file: the server listens at `path`, with the permissions of `bind_unix`.

    gRPC removes whatever is in the way, and leaves the mode to the umask. It binds in a folder that is ours alone, and
    what it has made takes the place of the socket that holds the name. Raises SocketRefused.
    """
    holder = bind_unix(path, group=group)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="") as folder:
            made = Path(folder, "s")
            if len(os.fsencode(made)) > MAX_SOCKET_PATH:
                raise SocketRefused("its folder needs a shorter path")
            server.add_insecure_port(f"unix:{made}")
            held = path.stat()
            os.chown(made, -1, held.st_gid)
            made.chmod(stat.S_IMODE(held.st_mode))
            own = made.stat()
            made.replace(path)
    except (OSError, RuntimeError, SocketRefused) as error:
        holder.remove_file()
        raise SocketRefused(f"{path} can't be made a socket for gRPC: {error}") from None
    finally:
        holder.close()
    return replace(holder, file=(path, (own.st_dev, own.st_ino)))


def server_credentials(tls: ServerTlsSettings) -> grpc.ServerCredentials | None:
    """As HTTP's, of the same files; None where no certificate is set. Raises ConfigError."""
    if tls_context(tls) is None:  # else it has said what is wrong with the files
        return None
    assert tls.certificate is not None
    key = (tls.key or tls.certificate).read_bytes()
    authorities = None if tls.client_ca is None else tls.client_ca.read_bytes()
    pair = (key, tls.certificate.read_bytes())
    return grpc.ssl_server_credentials([pair], authorities, require_client_auth=authorities is not None)
