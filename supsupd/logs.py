"""Logs: one structured stream on stderr for us and for the libraries below us."""

import copy
import logging
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal

import structlog

LogFormat = Literal["auto", "console", "json"]


REQUEST: ContextVar[str | None] = ContextVar("request", default=None)
"""The id of the request that is being answered. Its own variable: structlog's costs microseconds to set."""


def configure(log_format: LogFormat = "auto", level: str = "info") -> None:
    """Sends every log line to stderr: `console` for people, `json` (an object a line) for machines.

    `auto` asks whether stderr is a terminal. `level` holds for supsupd's own loggers; libraries speak from
    warnings on.
    """
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        _add_request,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(log_format)],
        )
    )
    logging.setLogRecordFactory(_record_factory())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("supsupd").setLevel(level.upper())
    logging.captureWarnings(True)


def _record_factory() -> Callable[..., logging.LogRecord]:
    """Makes records in any year: their own constructor fails from 2262 on, and with it whatever has something to say.
    The time of a line comes from elsewhere."""
    timeless = logging.LogRecord("", logging.NOTSET, "", 0, "", (), None)

    def make(
        name: str, level: int, path: str, line: int, text: object, args: Any, error: Any, *rest: Any, **more: Any
    ) -> logging.LogRecord:
        try:
            return logging.LogRecord(name, level, path, line, text, args, error, *rest, **more)
        except OverflowError:
            record = copy.copy(timeless)
            record.name, record.levelno, record.levelname = name, level, logging.getLevelName(level)
            record.pathname, record.lineno = path, line
            record.msg, record.args, record.exc_info = text, args, error
            return record

    return make


def _add_request(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    request = REQUEST.get()
    if request is not None:
        event["request"] = request
    return event


def _renderers(log_format: LogFormat) -> list[structlog.types.Processor]:
    if log_format == "json" or (log_format == "auto" and not sys.stderr.isatty()):
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    # repr: a file name with escape codes must not reach the terminal; plain: no locals in tracebacks.
    return [
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            repr_native_str=True,
            sort_keys=False,
            exception_formatter=structlog.dev.plain_traceback,
        )
    ]
