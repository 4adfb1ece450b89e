"""What keeps the daemon from working as it should: shown by `status`, said once in the log, gone when mended."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from errno import EDQUOT, ENOSPC
from typing import Any

import structlog

from storage.durable import SyncFailed
from storage.errors import (
    CommitUnknown,
    DiskFull,
    StoreError,
    StoreFailed,
    StoreTaken,
    StoreUnavailable,
    TransactionLost,
    ValueRefused,
)
from streams.decoder import DecoderUnavailable

log = structlog.get_logger("supsupd.health")


@dataclass(frozen=True, slots=True)
class Problem:
    """`kind`: a word of a short list; `text`: one line."""

    kind: str
    text: str
    since: datetime


def _ignore(who: str, error: Exception) -> None:
    pass


class Health:
    """Problems by who has them: a source, the socket, the learner. For any thread.

    `fatal` is called with errors after which only a new start can tell what is durable, or ours.
    """

    def __init__(self, fatal: Callable[[str, Exception], None] = _ignore) -> None:
        self._fatal = fatal
        self._lock = threading.Lock()
        self._problems: dict[str, Problem] = {}

    def report(self, who: str, kind: str, text: str) -> None:
        """`who` has this problem now; repeating the same kind says nothing new."""
        with self._lock:
            known = self._problems.get(who)
            since = known.since if known is not None and known.kind == kind else datetime.now(UTC)
            if known is not None and known.kind != kind:
                del self._problems[who]  # a new one goes to the end
            self._problems[who] = Problem(kind, text, since)
        if known is None or known.kind != kind:
            log.warning("problem", who=who, kind=kind, text=text)

    def blame(self, who: str, error: Exception) -> str:
        """`who` failed with this error; returns what kind of problem it is."""
        self.judge(who, error)
        kind = kind_of(error)
        self.report(who, kind, str(error) or type(error).__name__)
        return kind

    def judge(self, who: str, error: Exception) -> None:
        """Ends the daemon if only a new start can help."""
        if is_fatal(error):
            self._fatal(who, error)

    def clear(self, who: str) -> None:
        """`who` works again."""
        if who not in self._problems:  # nearly always
            return
        with self._lock:
            known = self._problems.pop(who, None)
        if known is not None:
            log.info("problem_over", who=who, kind=known.kind)

    def show(self) -> list[dict[str, Any]]:
        """All problems, the oldest first."""
        with self._lock:
            found = list(self._problems.items())
        return [
            {"who": who, "kind": p.kind, "text": p.text, "since": p.since.isoformat(timespec="seconds")}
            for who, p in found
        ]


def kind_of(error: Exception) -> str:
    """What an error of the store, or of the system, is called."""
    if isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT)):
        return "disk_full"
    if isinstance(error, StoreUnavailable | CommitUnknown | TransactionLost):
        return "store_unavailable"
    if isinstance(error, DecoderUnavailable):
        return "decoder_unavailable"
    if isinstance(error, StoreTaken):
        return "store_taken"
    if is_fatal(error):
        return "disk_failed"
    return "store_refused" if isinstance(error, StoreError | OSError) else "failed"


def is_fatal(error: Exception) -> bool:
    """Whether only a new start can help: something could not be synced or read, or another daemon has the store."""
    if isinstance(error, StoreFailed | StoreTaken):
        return True
    return isinstance(error, SyncFailed) and error.errno not in (ENOSPC, EDQUOT)


def may_be_the_batchs(error: Exception) -> bool:
    """Whether a batch that fails so again and again is to be given up: the store refused its values alone, or it is no
    matter of the store or the system at all."""
    if isinstance(error, StoreError):
        return type(error) in (StoreError, ValueRefused)
    return not isinstance(error, OSError | DecoderUnavailable)
