"""What a row of the table of durability is, and what all of them share with the tests, whose parts they use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import ROOT

sys.path.append(str(ROOT / "tests"))
TESTS = ROOT / "tests"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Outcome:
    """runs: how often it was tried; result: what was seen, in words; problems: what should not have been."""

    runs: int
    result: str
    problems: list[str]


@dataclass(frozen=True)
class Run:
    """What a row is given: how often to try, the seed of all chance, and an empty folder."""

    runs: int
    seed: int
    folder: Path


@dataclass(frozen=True)
class Row:
    """A line of the table: what is tried, what is to be reached, and how often by default."""

    what: str
    reach: str
    runs: int
    measure: Callable[[Run], Outcome]


class Skipped(Exception):
    """What the row needs is not there; the text says what."""


def tell(text: str) -> None:
    """Progress, beside the table."""
    print(text, file=sys.stderr, flush=True)


def run_tests(*arguments: str) -> tuple[int, list[str]]:
    """Runs pytest on files of tests/: how many passed, and what failed."""
    command = [sys.executable, "-m", "pytest", "-rfEs", "--tb=no", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    problems = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    if done.returncode not in (0, 1):
        problems.append(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-300:]}")
    passed = sum(int(word) for before, word in _pairs(lines[-1] if lines else "") if before == "passed")
    return passed, problems + ["no test ran"] * (passed == 0)


def _pairs(line: str) -> list[tuple[str, str]]:
    """[("passed", "12"), …] of pytest's last line."""
    words = line.replace(",", "").split()
    return [(words[i + 1], words[i]) for i in range(len(words) - 1) if words[i].isdigit()]


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES


def descriptors(pid: int) -> int:
    """Files that a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
