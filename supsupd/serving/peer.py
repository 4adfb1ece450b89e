"""Who is at the other end of a Unix socket, as the kernel tells it."""

import asyncio
import pwd
import socket
import struct
from collections.abc import Mapping
from typing import Any

CREDENTIALS = struct.Struct("=iII")
"""Process, user and group, as of `connect` (Linux, SO_PEERCRED)."""
UID = "supsupd.peer_uid"


def uid_of(transport: asyncio.BaseTransport) -> int | None:
    """The user who connected; None where that is not a Unix socket."""
    connection = transport.get_extra_info("socket")
    if connection is None or connection.family != socket.AF_UNIX:
        return None
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    uid: int = CREDENTIALS.unpack(found)[1]
    return uid


def peer_of(scope: Mapping[str, Any]) -> str | None:
    """Who sent a request, "name (uid)"; None where nobody can tell."""
    uid = scope.get("state", {}).get(UID)
    return None if uid is None else show_user(uid)


def show_user(uid: int) -> str:
    """ "name (uid)", or "uid N" where it has no name."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"uid {uid}"
