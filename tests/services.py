"""The services that tests talk to, on loopback: absent ones are skipped loudly, or fail where they are demanded.

SUPSUPD_REQUIRE_SERVICES, a list such as `nats,redis,postgresql`, names those that must be there.
"""

import os
import socket

import pytest

PORTS = {"nats": 4222, "redis": 6379, "postgresql": 5432}
# Read at import: the tests' own environment has no SUPSUPD_ variables.
REQUIRED = {name for name in os.environ.get("SUPSUPD_REQUIRE_SERVICES", "").split(",") if name}
assert set(PORTS) >= REQUIRED, f"SUPSUPD_REQUIRE_SERVICES: {sorted(REQUIRED)}, expected some of {', '.join(PORTS)}"


def require(service: str) -> None:
    """Skips the test, or fails it where the service is demanded, unless something listens at the service's port."""
    try:
        socket.create_connection(("127.0.0.1", PORTS[service]), timeout=2).close()
    except OSError as error:
        text = f"NO {service.upper()} at 127.0.0.1:{PORTS[service]} ({error}): docs/development.md says how to start it"
        if service in REQUIRED:
            pytest.fail(text)
        pytest.skip(text)
