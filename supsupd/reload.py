"""Reading the configuration again while the daemon runs (SIGHUP): what can change does so at once, or nothing does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import structlog

from supsupd import logs
from supsupd.config import ConfigError, Settings
from supsupd.serving.front import Front
from supsupd.serving.listeners import tls_context
from supsupd.serving.server import Server

CHANGEABLE = ("log_format", "log_level", "serving", "tls")
"""What needs no restart, but for the group of the socket, and TLS that begins, ends, or is gRPC's too."""

log = structlog.get_logger("supsupd.reload")


class Reloader:
    """Used in the main thread.

    Args:
        settings: in force.
        load: reads and checks the configuration, with the same command line. Raises ConfigError.
        front: has the limits in force.
        server: has the TLS contexts in force.
    """

    def __init__(self, settings: Settings, load: Callable[[], Settings], front: Front, server: Server) -> None:
        self._started = self._newest = settings
        self._load = load
        self._front = front
        self._server = server

    def reload(self) -> bool:
        """Whether the configuration could be used; one that cannot changes nothing."""
        try:
            new = self._load()
            tls = tls_context(new.tls)
        except ConfigError as error:
            log.error("reload_refused", problems=error.problems)
            return False
        logs.configure(new.log_format, new.log_level)
        group = self._started.serving.socket_group  # the socket's file stays as it is
        self._front.limits = new.serving.model_copy(update={"socket_group": group})
        for listener in self._server.listeners:
            if listener.tls is not None and tls is not None:
                listener.tls = tls
        changed = [key for key in _differences(self._newest, new) if not self._is_fixed(key)]
        log.info("reloaded", changed=changed)
        if fixed := [key for key in _differences(self._started, new) if self._is_fixed(key)]:
            log.warning("needs_a_restart", settings=fixed)
        self._newest = new
        return True

    def _is_fixed(self, key: str) -> bool:
        if key.startswith("tls."):
            return self._started.tls.certificate is None or self._started.grpc is not None
        return key.split(".", maxsplit=1)[0] not in CHANGEABLE or key == "serving.socket_group"


def _differences(old: Settings, new: Settings) -> Iterator[str]:
    """The names of the settings that are not the same; their values may be secrets."""
    return _compare(old.model_dump(), new.model_dump())


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in new.items():
        before = old[key]
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from _compare(before, value, f"{prefix}{key}.")
        elif value != before:
            yield prefix + key
