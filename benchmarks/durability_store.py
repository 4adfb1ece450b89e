"""Full disks, a database that goes away in a COMMIT, and damaged databases."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import durability_rows  # noqa: F401 - finds the tests
import services
from cutting_proxy import CuttingProxy
from daemon_process import QUICK, until, what_was_learned
from digits import draw, held_out
from durability_rows import Outcome, Run, Skipped, tell
from forked_daemon import ForkedDaemon, Nursery
from mutants import judge_many, make_mutant, tally
from oracle import Given, learned_in, violations
from stores import postgresql_target
from test_mutants import filled

from streams.batch import digest_of

DISK = "12m"
NO_RESERVE = QUICK.replace("[intake]", "[intake]\nmin_free_bytes = 0")
"""Else nothing would come in long before the disk is full."""


def drop(daemon: ForkedDaemon, turn: int) -> Given:
    path = daemon.drop(f"{turn:05}", **draw(turn // 10 % 3, turn, rows=64))
    return Given(path.name, digest_of(path.read_bytes()), str(daemon.watch))


# -- a full disk -------------------------------------------------------------------------------------------------------


def disk_full(run: Run) -> Outcome:
    """A small tmpfs of its own, in a namespace of its own."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0:
        raise Skipped("no user namespaces (unshare -rm): there is no small disk to fill")
    state = run.folder / "home" / "state"
    state.mkdir(parents=True)
    inside = [sys.executable, __file__, str(run.folder), str(run.runs), str(run.seed)]
    command = f'mount -t tmpfs -o size={DISK},mode=700 tmpfs "{state}" && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, "sh", *inside], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        return Outcome(run.runs, "", [f"ended with {done.returncode}"])
    result, *problems = done.stdout.splitlines()
    return Outcome(run.runs, result, problems)


def fill_disk(folder: Path, runs: int, seed: int) -> tuple[str, list[str]]:
    """Fills the disk of the state again and again, at random moments, to a random rest."""
    chance, problems, longest, seen = random.Random(seed), [], 0.0, 0
    with Nursery() as nursery, ForkedDaemon(nursery, folder / "home", NO_RESERVE) as daemon:
        given = [drop(daemon, turn) for turn in range(3)]
        daemon.start().wait()
        pid = daemon.process.pid
        for point in range(runs):
            with full(daemon.state / "ballast", chance.randrange(3) * 4096):
                given += [drop(daemon, len(given) + turn) for turn in range(3)]
                seen += _await_problem(daemon)
                time.sleep(chance.uniform(0, 1))
                assert len(daemon.client.predict(held_out(0)[0][:4])) == 4
                if (said := daemon.client.status())["pid"] != pid:
                    problems.append(f"point {point}: another process answers: {said['pid']}")
            freed = time.monotonic()
            daemon.wait()
            longest = max(longest, time.monotonic() - freed)
            tell(f"point {point}: went on within {time.monotonic() - freed:.1f} s")
        status = daemon.client.status()
        problems += [f"problems are left: {status['problems']}"] * bool(status["problems"])
        problems += [f"ended with {code}" for code in [daemon.stop()] if code != 0]
        clean = _clean(nursery, folder / "clean", len(given))
        problems += violations(daemon.state, given, clean, status=status, log=daemon.log)
    problems += [f"it was only refused at {seen} of {runs} points"] * (seen < runs)
    return f"{len(given)} batches, masks bit-identical; went on by itself within {longest:.1f} s", problems


def _await_problem(daemon: ForkedDaemon) -> bool:
    """Whether the daemon says that the disk is full."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        if any(problem["kind"] == "disk_full" for problem in daemon.client.status()["problems"]):
            return True
        time.sleep(0.05)
    return False


@contextmanager
def full(ballast: Path, rest: int) -> Iterator[None]:
    """Nothing but `rest` bytes is left on the disk."""
    try:
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                file.truncate(max(file.tell() // 4096 * 4096 - rest, 0))
        yield
    finally:
        ballast.unlink()


def _clean(nursery: Nursery, folder: Path, count: int, *flags: str) -> Any:
    with ForkedDaemon(nursery, folder, QUICK) as daemon:
        daemon.flags = flags
        for turn in range(count):
            drop(daemon, turn)
        daemon.start()
        daemon.client.wait(300)
        assert daemon.stop() == 0
        return learned_in(daemon.state, flags[1]) if flags else what_was_learned(daemon.state)


# -- PostgreSQL --------------------------------------------------------------------------------------------------------


class CommitCutter(CuttingProxy):
    """Once `armed`, the next connection that says COMMIT is lost: before the server hears of it, or right after."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.armed = ""
        super().__init__(target)

    def _pump(self, pair: Any, source: Any, sink: Any, losing: str) -> None:
        outer = self

        class Watched:
            """What the client says, looked through."""

            def recv(self, size: int) -> bytes:
                data: bytes = source.recv(size)
                if losing == "requests" and outer.armed and b"COMMIT" in data:
                    way, outer.armed = outer.armed, ""
                    if way == "after":
                        sink.sendall(data)
                    return b""
                return data

        super()._pump(pair, Watched(), sink, losing)  # type: ignore[arg-type]


def commit_cut(run: Run) -> Outcome:
    """The connection to PostgreSQL is lost in a COMMIT, whose outcome nobody knows then."""
    try:
        services.require("postgresql")
    except BaseException as error:  # noqa: BLE001 - pytest's own kind
        raise Skipped(str(error)) from None
    port = services.PORTS["postgresql"]
    proxy = CommitCutter(("127.0.0.1", port))
    problems: list[str] = []
    try:
        with Nursery() as nursery, postgresql_target() as direct, postgresql_target() as calm:
            through = direct.replace(f":{port}", f":{proxy.port}")
            with ForkedDaemon(nursery, run.folder / "cut", QUICK) as daemon:
                daemon.flags = ("--database", through)
                given = [drop(daemon, turn) for turn in range(3)]
                daemon.start().wait()
                for point in range(run.runs):
                    before = proxy.cuts
                    proxy.armed = ("before", "after")[point % 2]
                    given += [drop(daemon, len(given) + turn) for turn in range(2)]
                    until(lambda: proxy.cuts > before, 30)  # noqa: B023 - waited for here
                    assert len(daemon.client.predict(held_out(0)[0][:4])) == 4
                    daemon.wait()
                    tell(f"cut {point}: {proxy.cuts - before} connections were lost")
                status = daemon.client.status()
                problems += [f"ended with {code}" for code in [daemon.stop()] if code != 0]
                clean = _clean(nursery, run.folder / "calm", len(given), "--database", calm)
                problems += violations(daemon.state, given, clean, status=status, log=daemon.log, store=direct)
    finally:
        proxy.close()
    return Outcome(run.runs, f"{len(given)} batches, each once; masks bit-identical", problems)


# -- damaged databases -------------------------------------------------------------------------------------------------


def mutants(run: Run) -> Outcome:
    """Flipped bits, cut off, zeroed pages, another's log: refused in one line or found whole, never changed."""
    for name in ("one", "other"):
        (run.folder / name).mkdir()
    originals = (*filled(run.folder / "one", 3), filled(run.folder / "other", 40)[1])
    made = [make_mutant(run.seed + n, *originals, run.folder / str(n)) for n in range(run.runs)]
    verdicts = judge_many(made)
    problems = [f"{v.damage}: {v.text}" for v in verdicts if "traceback" in (v.verify, v.start)]
    problems += [f"{v.damage}: its bytes were changed" for v in verdicts if v.changed]
    problems += [f"{run.runs - len(verdicts)} were not judged"] * (len(verdicts) != run.runs)
    counts = tally(verdicts)
    refused = sum(count for (_, *said), count in counts.items() if "refused" in said)
    return Outcome(run.runs, f"{refused} refused in one line, {len(verdicts) - refused} verified", problems)


if __name__ == "__main__":  # in the namespace of `disk_full`
    told, wrong = fill_disk(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    print("\n".join([told, *wrong]))
