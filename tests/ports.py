"""TCP ports for those who have to know them before they listen."""

import random
import socket
from contextlib import suppress
from itertools import islice
from pathlib import Path

GIVEN_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count):
    """Below those that the system gives to whoever connects, also to a client that finds nobody: none is taken, or
    connected to itself, by chance."""
    first = int(GIVEN_OUT.read_text().split()[0])
    ports = range(first // 2, first)
    return list(islice(filter(_is_free, random.SystemRandom().sample(ports, len(ports))), count))


def _is_free(port):
    with suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False
