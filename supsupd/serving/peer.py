"""Who is at the other end of a Unix socket, as the kernel tells it."""

import asyncio
import pwd
import socket
import struct

CREDENTIALS = struct.Struct("=iII")
"""Process, user and group, as of `connect` (Linux, SO_PEERCRED)."""


def uid_of(transport: asyncio.BaseTransport) -> int | None:
    """The user who connected; None where that is not a Unix socket."""
    connection = transport.get_extra_info("socket")
    if connection is None or connection.family != socket.AF_UNIX:
        return None
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    uid: int = CREDENTIALS.unpack(found)[1]
    return uid


def show_user(uid: int) -> str:
    """ "name (uid)", or "uid N" where it has no name."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"uid {uid}"
