"""Kills, failpoints, losses of power and planted bugs: what a crash may do to the daemon."""

from __future__ import annotations

import random
import time
from pathlib import Path

import durability_rows  # noqa: F401 - finds the tests
import numpy as np
from daemon_process import QUICK, ask, what_was_learned
from digits import draw
from durability_rows import Outcome, Run, run_tests, tell
from failpoint_lane import ACTIONS, Uninterrupted, survive
from forked_daemon import ForkedDaemon, Nursery
from oracle import Given, violations
from order_lane import violations_of_life
from test_power_loss import MOST_STATES, PROTOCOLS, NeverSyncsFiles, NeverSyncsFolders, RenamesFirst, bad_states

from storage.failpoints import POINTS

LONGEST_LIFE = 1.6
"""Seconds from the launch to the kill, at most; a start takes about half a second."""
FILES_A_LIFE = 12
NOT_REACHED = " was not reached"


def stream_file(daemon: ForkedDaemon, turn: int) -> Given:
    """Drops the next batch of a stream of five tasks; some are small, straddle two tasks, or have no labels."""
    task, following = turn // 4 % 5, (turn + 1) // 4 % 5
    batch = draw(task, turn, rows=16 if turn % 7 == 3 else 64)
    if task != following and turn % 8 == 3:
        other = draw(following, turn)
        batch = {key: np.concatenate([batch[key][:32], other[key][:32]]) for key in batch}
    if turn % 11 == 5:
        del batch["y"]
    path = daemon.drop(f"{turn:05}", **batch)
    return Given(path.name, _digest(path), str(daemon.watch))


def _digest(path: Path) -> str:
    from streams.batch import digest_of

    return digest_of(path.read_bytes())


def kills(run: Run) -> Outcome:
    """One stream through many lives, each ended by SIGKILL at a random moment, its start included."""
    chance, files = random.Random(run.seed), FILES_A_LIFE * run.runs
    problems: list[str] = []
    moments: dict[str, int] = {}
    with Nursery() as nursery, ForkedDaemon(nursery, run.folder / "killed", QUICK) as daemon:
        given: list[Given] = []
        known: list[Given] = []
        for life in range(run.runs):
            given += [stream_file(daemon, FILES_A_LIFE * life + turn) for turn in range(FILES_A_LIFE)]
            daemon.launch()
            time.sleep(chance.uniform(0, LONGEST_LIFE))
            daemon.kill()
            if (daemon.state / "supsup.db").exists():
                moment = _moment(daemon)
                moments[moment] = moments.get(moment, 0) + 1
                if moment != "before the schema":
                    problems += [f"after kill {life}: {p}" for p in violations(daemon.state, known, killed=True)]
                    known = _known(daemon, given)
            if life % 20 == 19:
                tell(f"{life + 1} kills, {len(problems)} problems, moments {moments}")
        status = daemon.start().wait().client.status()
        problems += [f"ended with {code}" for code in [daemon.stop()] if code != 0]
        learned = daemon.state
        with ForkedDaemon(nursery, run.folder / "clean", QUICK) as calm:
            for turn in range(files):
                stream_file(calm, turn)
            calm.start()
            calm.client.wait(600)
            calm.stop()
            clean = what_was_learned(calm.state)
        problems += violations(learned, given, clean, status=status, log=daemon.log)
    effects = len(clean["ledger"])
    seen = ", ".join(f"{count} {moment}" for moment, count in sorted(moments.items()))
    return Outcome(run.runs, f"{effects} batches, each once; masks bit-identical; killed {seen}", problems)


def _moment(daemon: ForkedDaemon) -> str:
    """What went on when it was killed."""
    if not ask(daemon.state, "SELECT name FROM sqlite_master WHERE name = 'batch'"):
        return "before the schema"
    states = dict(ask(daemon.state, "SELECT state, count(*) FROM batch GROUP BY state"))
    return "in training" if "training" in states else "with batches waiting" if "staged" in states else "at rest"


def _known(daemon: ForkedDaemon, given: list[Given]) -> list[Given]:
    """What is in the ledger, and must be there after every later kill."""
    names = {name for (name,) in ask(daemon.state, "SELECT name FROM batch")}
    return [each for each in given if each.name in names]


def matrix(run: Run) -> Outcome:
    """Every failpoint with every action, at its first, second, … time in a life."""
    lives, fired, problems = 0, 0, []
    with Nursery() as nursery:
        uninterrupted = Uninterrupted(nursery, run.folder / "clean")
        for nth in range(1, run.runs + 1):
            for action in ACTIONS:
                count, found = survive(nursery, run.folder / f"{action}-{nth}", action, nth, uninterrupted)
                missed = [problem for problem in found if problem.endswith(NOT_REACHED)]
                lives, fired = lives + count, fired + len(POINTS) - len(missed)
                # A start comes to its points once in a life.
                wrong = found if nth == 1 else [problem for problem in found if problem not in missed]
                problems += [f"{action}, time {nth}: {problem}" for problem in wrong]
                tell(f"{action}, time {nth}: {count} lives, {len(missed)} not reached, {len(wrong)} problems")
    said = f"{len(POINTS)} points, {len(ACTIONS)} actions, at their first {run.runs} times in a life, in {lives} lives"
    return Outcome(fired, said, problems)


def power(run: Run) -> Outcome:
    """All states that a loss of power can leave, of every protocol; and of three that sync too little."""
    total, problems = 0, []
    for name, protocol in PROTOCOLS.items():
        count, found = bad_states(run.folder / "spool", protocol)
        total += count
        problems += [f"{name}: {problem}" for problem in found] + [f"{name}: {count} states"] * (count > MOST_STATES)
    for kind in (NeverSyncsFiles, NeverSyncsFolders, RenamesFirst):
        if not bad_states(run.folder / "spool", PROTOCOLS["store two"], kind)[1]:
            problems.append(f"{kind.__name__} was not caught")
    return Outcome(total, f"{total} states of {len(PROTOCOLS)} protocols, all of them", problems)


def order(run: Run) -> Outcome:
    """The order of sync, rename, commit and acknowledgement, of each batch from each kind of source."""
    total, problems = 0, []
    for broker in ("nats", "redis"):
        count, found = violations_of_life(run.folder / broker, run.runs, broker)
        total += count
        problems += [f"{broker}: {problem}" for problem in found]
    return Outcome(total, f"{total} batches from folders, the socket, NATS and Redis in the right order", problems)


def planted(run: Run) -> Outcome:
    passed, problems = run_tests("tests/test_planted_bugs.py")
    return Outcome(5, f"{passed} tests: all caught", problems)
