"""The judge of every test of durability: what in a state contradicts what the test itself knows to be true.

The record of truth is the caller's: what it handed over, and what an uninterrupted run made of the same. Nothing here
asks the daemon, and nothing is changed.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from daemon_process import what_was_learned, without_holes
from sqlalchemy import text

from storage.db import reading, verify

EFFECTIVE = ("staged", "training", "unsure", "scored", "committed")
NEEDED = ("staged", "training", "unsure", "quarantined", "suspended")


class Given(NamedTuple):
    """A batch that was accepted: acknowledged, or put where it must be found. In the order of its source."""

    name: str
    sha256: str
    source: str | None = None


def violations(
    state: Path,
    accepted: Sequence[Given] = (),
    clean: Mapping[str, Any] | None = None,
    *,
    status: Mapping[str, Any] | None = None,
    log: Path | None = None,
    killed: bool = False,
    store: str | None = None,
) -> list[str]:
    """What is wrong, in words; an empty list where nothing is.

    state: of a daemon that is down, or has nothing to do. accepted: what must be in the ledger, each with one effect.
    clean: `what_was_learned` of an uninterrupted run over the same batches. status: what the daemon says of this state.
    log: of all its lives. killed: it has not started since it was killed, so that the spool may hold more than is
    needed. store: a URL, where it is not the state's own file.
    """
    target = state / "supsup.db" if store is None else store
    problems = verify(target)
    if problems:  # what follows reads the same rows
        return problems
    with reading(target) as session:

        def ask(query: str) -> list[tuple[Any, ...]]:
            return [tuple(row) for row in session.execute(text(query))]

        problems += _lost(ask, accepted)
        problems += _doubled(ask)
        problems += _out_of_order(ask, accepted)
        problems += _half_done(ask)
        problems += _miscounted(ask, status)
        problems += _bytes_missing(ask, state / "spool")
        if not killed:
            problems += _left_over(ask, state / "spool")
    if clean is not None:
        problems += differences(learned_in(state, store), clean)
    if log is not None:
        problems += _failures(log)
    return problems


def learned_in(state: Path, store: str | None = None) -> dict[str, Any]:
    """`what_was_learned`, of whichever store."""
    if store is None:
        return what_was_learned(state)
    with reading(store) as session:
        return without_holes(
            what_was_learned(state, lambda _, query: [tuple(row) for row in session.execute(text(query))])
        )


def _lost(ask, accepted):
    known = Counter((name, sha256) for name, sha256 in ask("SELECT name, sha256 FROM batch"))
    return [f"lost: {name} ({sha256[:8]}…) was accepted" for name, sha256, _ in accepted if not known[name, sha256]]


def _doubled(ask):
    """Each content has one effect, and a batch makes at most one version of a task.

    A version that a late alarm set back takes effects away; it names the batch that raised the alarm.
    """
    listed = ", ".join(f"'{state}'" for state in EFFECTIVE)
    contents = ask(
        "SELECT sha256, given_task, count(*) FROM batch"
        f" WHERE state IN ({listed}) GROUP BY sha256, given_task HAVING count(*) > 1"
    )
    makers = ask(
        "SELECT batch_id, task_id, count(*) FROM mask_version WHERE batch_id IS NOT NULL AND reason IS NULL"
        " GROUP BY batch_id, task_id HAVING count(*) > 1"
    )
    return [f"doubled: {sha256[:8]}… takes effect in {count} rows" for sha256, _, count in contents] + [
        f"doubled: batch {batch} made {count} versions of task {task}" for batch, task, count in makers
    ]


def _out_of_order(ask, accepted):
    """The first row of each accepted batch, by source: its id is the order of learning."""
    first = {
        (name, sha256): number for number, name, sha256 in ask("SELECT id, name, sha256 FROM batch ORDER BY id DESC")
    }
    newest: dict[Any, int] = {}
    problems = []
    for name, sha256, source in accepted:
        number = first.get((name, sha256))
        if number is not None:
            if number <= newest.get(source, 0):
                problems.append(f"out of order: {name} is batch {number}, what came before it {newest[source]}")
            newest[source] = max(number, newest.get(source, 0))
    return problems


def _half_done(ask):
    """A batch and its effect are one transaction."""
    versions = ask(
        "SELECT task.id, task.version, max(mask_version.version) FROM task"
        " LEFT JOIN mask_version ON mask_version.task_id = task.id GROUP BY task.id, task.version"
    )
    bare = ask(
        "SELECT id, state FROM batch WHERE state IN ('committed', 'scored')"
        " AND NOT EXISTS (SELECT 1 FROM decision WHERE decision.batch_id = batch.id)"
    )
    makers = ask(
        "SELECT mask_version.task_id, mask_version.version, batch.id, batch.state FROM mask_version"
        " JOIN batch ON batch.id = mask_version.batch_id"
        " WHERE batch.state NOT IN ('committed', 'unsure', 'quarantined')"
    )
    return (
        [
            f"half done: task {task} is at version {at}, its newest mask is {mask}"
            for task, at, mask in versions
            if at != mask
        ]
        + [f"half done: batch {batch} is {state} and nothing says why" for batch, state in bare]
        + [f"half done: batch {b} made mask {v} of task {t} and is {state}" for t, v, b, state in makers]
    )


def _miscounted(ask, status):
    counted = dict(ask("SELECT state, count(*) FROM batch GROUP BY state"))
    if status is None or {state: n for state, n in status["batches"].items() if n} == counted:
        return []
    return [f"miscounted: the daemon says {status['batches']}, the ledger {counted}"]


def _bytes_missing(ask, spool):
    """What a batch still needs is there, as it was."""
    states = ", ".join(f"'{state}'" for state in NEEDED)
    problems = []
    for (sha256,) in ask(f"SELECT DISTINCT sha256 FROM batch WHERE sha256 IS NOT NULL AND state IN ({states})"):
        path = spool / sha256
        if not path.exists():
            problems.append(f"bytes missing: spool/{sha256}")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            problems.append(f"bytes damaged: spool/{sha256}")
    return problems


def _left_over(ask, spool):
    """Beside what is needed, there may be what a task may yet give back; at the next start that goes too."""
    states: dict[str, set[str]] = {}
    for sha256, state in ask("SELECT sha256, state FROM batch WHERE sha256 IS NOT NULL"):
        states.setdefault(sha256, set()).add(state)
    names = [path.name for path in spool.iterdir()] if spool.is_dir() else []
    return [f"left over: spool/{name}" for name in names if not states.get(name, set()) & {*NEEDED, "committed"}]


def differences(learned: Mapping[str, Any], clean: Mapping[str, Any]) -> list[str]:
    """Where two states that learned the same batches are not the same; the first row of each part that differs."""
    return [
        f"different: {part}: {_first(learned[part], clean[part])}" for part in clean if learned[part] != clean[part]
    ]


def _first(rows, expected):
    pairs = itertools.zip_longest(rows, expected)
    row, other = next((row, other) for row, other in pairs if row != other)
    return f"{str(row)[:150]} and not {str(other)[:150]}"


def _failures(log):
    return [
        f"a traceback in the log: {_told(line)}"
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if "Traceback (most recent call last)" in line
    ]


def _told(line):
    """The event of a line of the log, or the line itself."""
    try:
        return json.loads(line)["event"]
    except (ValueError, KeyError, TypeError):
        return line[:200]
