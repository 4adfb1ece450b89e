"""Logs: one structured stream on stderr for us and for the libraries below us. Nobody waits long for its reader."""

import copy
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal

import structlog

LogFormat = Literal["auto", "console", "json"]


REQUEST: ContextVar[str | None] = ContextVar("request", default=None)
"""The id of the request that is being answered. Its own variable: structlog's costs microseconds to set."""


WAIT_SECONDS = 0.25
"""How long a line may take to be written before nobody waits for the lines after it."""
FAREWELL_SECONDS = 1.0
"""How long what is still to be written may take at the end of the process."""
MAX_WAITING_BYTES = 1 << 20
"""Of lines that are not written yet; what comes then is lost, and counted."""


class PatientHandler(logging.Handler):
    """Writes lines to a descriptor in a thread of its own: a pipe that nobody reads holds up nothing for good.

    As long as lines are written at once, each is before `emit` returns. One that is not holds its thread up for
    WAIT_SECONDS, and those after it wait in memory until the first is through. How many were lost is said then.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._stalled = False
        self._lost = 0
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def problem(self) -> str | None:
        """What keeps lines from being written, in one line; None: nothing does."""
        with self._changed:
            if not self._stalled:
                return None
            return f"whoever reads stderr has stopped: {len(self._waiting)} lines wait, {self._lost} are lost"

    def emit(self, record: logging.LogRecord) -> None:
        line = self._line(record)
        with self._changed:
            if self._size + len(line) > MAX_WAITING_BYTES:
                self._lost += 1
                return
            self._waiting.append(line)
            self._size += len(line)
            self._changed.notify_all()
            if not self._stalled:
                self._stalled = not self._changed.wait_for(self._is_idle, WAIT_SECONDS)

    def flush(self) -> None:
        """What waits is written now, or will not be waited for."""
        with self._changed:
            self._changed.wait_for(self._is_idle, FAREWELL_SECONDS)

    def _is_idle(self) -> bool:
        return not self._waiting

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                line = self._waiting[0]
            self._write(line)
            with self._changed:
                self._waiting.popleft()
                self._size -= len(line)
                self._stalled &= bool(self._waiting)
                lost, self._lost = (0, self._lost) if self._waiting else (self._lost, 0)
                self._changed.notify_all()
            if lost:
                told = {"name": "supsupd.logs", "msg": "log_lines_lost", "lines": lost}
                self._write(
                    self._line(logging.makeLogRecord(told | {"levelno": logging.WARNING, "levelname": "WARNING"}))
                )

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode("utf-8", "backslashreplace")

    def _write(self, line: bytes) -> None:
        view = memoryview(line)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:  # there is nobody to tell
            return


def problem() -> str | None:
    """What keeps the log from being written, in one line."""
    found = (handler.problem() for handler in logging.getLogger().handlers if isinstance(handler, PatientHandler))
    return next((text for text in found if text is not None), None)


def configure(log_format: LogFormat = "auto", level: str = "info", handler: logging.Handler | None = None) -> None:
    """Sends every log line to stderr: `console` for people, `json` (an object a line) for machines.

    `auto` asks whether stderr is a terminal. `level` holds for supsupd's own loggers; libraries speak from
    warnings on. `handler`: writes the lines, by default as they come.
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
    handler = handler or logging.StreamHandler(sys.stderr)
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
