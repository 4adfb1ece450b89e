"""Marked places where a test may kill the process or make the system refuse; at rest, one look at an empty dict.

SUPSUPD_FAILPOINTS=name:nth:action[,…] arms them: the nth time that the process comes to `name`, `action` happens once:
`kill` (SIGKILL to itself), `eio` or `enospc` (an OSError, as the system would raise it).
"""

import errno
import os
import signal
from typing import Literal, TypeAlias, get_args

VARIABLE = "SUPSUPD_FAILPOINTS"

Point: TypeAlias = Literal[
    "start.upgraded",
    "start.released",
    "start.loaded",
    "stage.received",
    "spool.create",
    "spool.write",
    "spool.sync",
    "spool.rename",
    "spool.sync_folder",
    "spool.stored",
    "spool.remove",
    "stage.begun",
    "stage.commit",
    "stage.committed",
    "stage.acknowledge",
    "stage.acknowledged",
    "claim.commit",
    "claim.committed",
    "learn.decoded",
    "learn.trained",
    "learn.begun",
    "learn.commit",
    "learn.committed",
    "learn.swapped",
    "learn.cleaned",
    "score.commit",
    "reject.commit",
    "reject.committed",
    "retry.commit",
    "drop.commit",
]
POINTS: tuple[Point, ...] = get_args(Point)
_ERRORS = {"eio": errno.EIO, "enospc": errno.ENOSPC}


class FailpointsInvalid(ValueError):
    """SUPSUPD_FAILPOINTS cannot be understood."""


def hit(name: Point) -> None:
    """This is `name`. Raises OSError where a test says so."""
    if not _armed:
        return
    waiting = _armed.get(name)
    if waiting is None:
        return
    waiting[0] -= 1
    if waiting[0] == 0:
        action = _actions[name]
        os.write(2, f"failpoint {name} {action}\n".encode())
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(_ERRORS[action], f"{os.strerror(_ERRORS[action])} (failpoint {name})")


def parse(text: str) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The count that is left and the action of each armed point. Raises FailpointsInvalid."""
    counts: dict[str, list[int]] = {}
    actions: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, _, rest = part.partition(":")
        nth, _, action = rest.partition(":")
        if name not in POINTS or not nth.isdigit() or int(nth) < 1 or action not in ("kill", *_ERRORS):
            raise FailpointsInvalid(f"{VARIABLE}: given {part!r}; expected name:nth:kill|eio|enospc with a known name")
        counts[name], actions[name] = [int(nth)], action
    return counts, actions


_armed, _actions = parse(os.environ.get(VARIABLE, ""))
