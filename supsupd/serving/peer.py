"""Who is at the other end of a Unix socket, as the kernel tells it."""

import array
import grp
import pwd
import socket
import struct
from dataclasses import dataclass

CREDENTIALS = struct.Struct("=iII")
"""Process, user and group, as of `connect` (Linux, SO_PEERCRED)."""
SO_PEERGROUPS = getattr(socket, "SO_PEERGROUPS", 59)
"""Linux since 4.13; Python has no name for it."""
MAX_GROUPS_BYTES = 1024
"""The most that Python reads of an option: 256 groups."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A user and their groups, as of `connect`."""

    uid: int
    gids: frozenset[int]


def peer_of(connection: socket.socket) -> Peer:
    """Who connected. Of a user in more than 256 groups only the primary one counts."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    _, uid, gid = CREDENTIALS.unpack(found)
    try:
        groups = array.array("I", connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, MAX_GROUPS_BYTES))
    except OSError:
        groups = array.array("I")
    return Peer(uid, frozenset((gid, *groups)))


def show_user(uid: int) -> str:
    """ "name (uid)", or "uid N" where it has no name."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"uid {uid}"


def is_member(peer: Peer, group: str) -> bool:
    """Nobody is of a group that there is not any more."""
    try:
        return group_id(group) in peer.gids
    except KeyError:
        return False


def group_id(name: str) -> int:
    """Raises KeyError where there is no such group."""
    return grp.getgrnam(name).gr_gid
