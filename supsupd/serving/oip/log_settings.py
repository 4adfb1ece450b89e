"""The logging extension: how much of our own is logged, in Triton's words."""

import logging
from collections.abc import Mapping
from typing import Any

import structlog

from supsupd.serving.oip.strict_json import ProtocolError, field

LEVELS = {"log_info": logging.INFO, "log_warning": logging.WARNING, "log_error": logging.ERROR}
FIXED = {"log_file": "", "log_format": "default"}

log = structlog.get_logger("supsupd.serving")


def log_settings() -> dict[str, Any]:
    """{"log_info": true, ...}: whether lines of each level are written; `log_verbose_level` 1 stands for debug."""
    level = _logger().getEffectiveLevel()
    told = {name: level <= own for name, own in LEVELS.items()}
    return {"log_file": "", **told, "log_verbose_level": int(level <= logging.DEBUG), "log_format": "default"}


def change_log_settings(changes: Mapping[str, Any], by: str | None) -> dict[str, Any]:
    """The settings after these changes, which hold until the next start or reload. A level includes those above it.

    Raises ProtocolError for any other setting, and for another file or format: those are the configuration's.
    """
    for name, value in changes.items():
        if name in FIXED and value != FIXED[name]:
            raise ProtocolError(f"bad_request: {name} is set when the daemon starts")
        if name not in (*LEVELS, *FIXED, "log_verbose_level"):
            raise ProtocolError("bad_request: expected " + ", ".join([*LEVELS, "log_verbose_level"]))
    wanted = log_settings() | {name: field(changes, name, bool, False) for name in LEVELS if name in changes}
    verbose = field(changes, "log_verbose_level", int, wanted["log_verbose_level"])
    levels = [logging.DEBUG] if verbose > 0 else [own for name, own in LEVELS.items() if wanted[name]]
    level = min(levels, default=logging.CRITICAL)
    _logger().setLevel(level)
    log.warning("log_level_changed", level=logging.getLevelName(level).lower(), by=by)
    return log_settings()


def _logger() -> logging.Logger:
    return logging.getLogger("supsupd")
