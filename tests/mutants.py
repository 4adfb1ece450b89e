"""Databases that were damaged on purpose, and what the program says of each: verified, refused, or a traceback."""

import os
import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PAGE = 4096
DAMAGES = ("flipped bits", "cut off", "zeroed page", "swapped log")
JUDGE = """
import sys
from pathlib import Path
from storage.db import Database, SchemaMismatch, StoreError, upgrade, verify
for path in map(Path, sys.argv[1:]):
    try:
        problems = verify(path)
    except (StoreError, SchemaMismatch) as error:
        problems = [str(error)]
    try:
        # As a daemon starts.
        upgrade(path)
        Database.open(path).close()
        start = "opened"
    except (StoreError, SchemaMismatch) as error:
        start = f"refused {error}"
    for line in ["verified" if not problems else f"refused {problems[0]}", start]:
        assert line.count("\\n") == 0, repr(line)
        print(line.encode("unicode_escape").decode(), flush=True)
"""


@dataclass(frozen=True)
class Verdict:
    """verified, refused or traceback, by `db verify`; opened, refused or traceback, by what a start does; `changed`:
    whether bytes changed although it was refused."""

    damage: str
    verify: str
    start: str
    text: str
    changed: bool


def make_mutant(seed: int, database: bytes, log: bytes, other_log: bytes, folder: Path) -> tuple[str, Path]:
    """Write the mutant number `seed` of a database to `folder`; log: its own write-ahead log; other_log: another's."""
    rng = random.Random(seed)
    damage = DAMAGES[seed % len(DAMAGES)]
    content = bytearray(database)
    if damage == "flipped bits":
        for _ in range(rng.choice((1, 8, 64))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif damage == "cut off":
        del content[rng.randrange(len(content)) :]
    elif damage == "zeroed page":
        page = rng.randrange(len(content) // PAGE)
        content[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    folder.mkdir()
    path = folder / "supsup.db"
    path.write_bytes(content)
    logs = {"swapped log": other_log, "flipped bits": log if rng.random() < 0.5 else b""}
    if written := logs.get(damage, b""):
        path.with_name("supsup.db-wal").write_bytes(written)
    return damage, path


def judge(mutants: list[tuple[str, Path]]) -> list[Verdict]:
    """What one process says of each mutant; one that it dies of is a traceback, and the others go on."""
    verdicts: list[Verdict] = []
    while len(verdicts) < len(mutants):
        left = mutants[len(verdicts) :]
        before = [_bytes(path) for _, path in left]
        done = subprocess.run(
            [sys.executable, "-c", JUDGE, *(str(path) for _, path in left)],
            capture_output=True,
            text=True,
            timeout=600,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        lines = done.stdout.splitlines()
        lines = [line for line in lines if line.startswith(("verified", "refused", "opened"))]
        for place, (damage, path) in enumerate(left[: (len(lines) + 1) // 2]):
            found = [*lines[2 * place : 2 * place + 2], f"traceback {done.stderr[-2000:]}"]
            changed = found[1].startswith("refused") and _bytes(path) != before[place]
            words = [text.partition(" ")[0] for text in found]
            verdicts.append(Verdict(damage, words[0], words[1], " | ".join(found[:2]), changed))
        if done.returncode != 0 and len(lines) % 2 == 0:
            damage, path = left[len(lines) // 2]
            verdicts.append(Verdict(damage, "traceback", "traceback", done.stderr[-2000:], False))
    return verdicts


def judge_many(mutants: list[tuple[str, Path]], processes: int = 2, each: int = 25) -> list[Verdict]:
    """`judge`, in several processes of up to `each` mutants."""
    parts = [mutants[start : start + each] for start in range(0, len(mutants), each)]
    with ThreadPoolExecutor(processes) as pool:
        return [verdict for part in pool.map(judge, parts) for verdict in part]


def tally(verdicts: list[Verdict]) -> Counter[tuple[str, str, str]]:
    """How many of each (damage, verify, start)."""
    return Counter((verdict.damage, verdict.verify, verdict.start) for verdict in verdicts)


def _bytes(path: Path) -> list[bytes]:
    log = path.with_name(path.name + "-wal")
    return [path.read_bytes(), log.read_bytes() if log.exists() else b""]
