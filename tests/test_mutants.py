"""Damaged databases: each is found sound by a full look or refused in one line, and none is changed by that."""

import contextlib
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import DAMAGES, judge_many, make_mutant, tally

from storage.db import Database, StoreError, upgrade
from storage.verification import verify

FILL = """
import os, sys
from pathlib import Path
from storage.spool import Spool
from test_backup import fill
from storage import cursors, db
path = Path(sys.argv[1])
db.upgrade(path)
fill(path, Spool(path.parent / "spool"))
for turn in range(int(sys.argv[2])):
    store = db.Database.open(path)
    with store.write() as session:
        cursors.advance(session, "earlier", "x" * 500 + str(turn), "1")
    store.close()
store = db.Database.open(path)
for turn in range(int(sys.argv[2])):
    with store.write() as session:
        cursors.advance(session, "folder", "x" * 500 + str(turn), "1")
os.kill(os.getpid(), 9)  # the log stays
"""


def filled(folder, turns):
    """The bytes of a database and of its log, that a killed process left."""
    path = folder / "supsup.db"
    killed = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {json.dumps(str(Path(__file__).parent))})\n" + FILL,
         path, str(turns)], timeout=180
    )  # fmt: skip
    assert killed.returncode == -9
    return path.read_bytes(), path.with_name("supsup.db-wal").read_bytes()


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    database, log = filled(tmp_path_factory.mktemp("one"), 3)
    _, other_log = filled(tmp_path_factory.mktemp("other"), 40)
    return database, log, other_log


def test_a_damaged_database_is_verified_or_refused_in_one_line_and_never_changed(originals, tmp_path):
    mutants = [make_mutant(seed, *originals, tmp_path / str(seed)) for seed in range(28)]
    verdicts = judge_many(mutants)
    assert len(verdicts) == len(mutants)
    assert {verdict.damage for verdict in verdicts} == set(DAMAGES)
    assert [verdict for verdict in verdicts if "traceback" in (verdict.verify, verdict.start)] == []
    assert [verdict for verdict in verdicts if verdict.changed] == []
    # What is refused by its structure is refused at a start too.
    assert tally(verdicts)["zeroed page", "verified", "refused"] == 0


def test_a_database_that_refuses_in_words_that_are_no_text_is_refused_in_one_line(tmp_path):
    path = tmp_path / "supsup.db"
    upgrade(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA writable_schema=ON")
        connection.execute("UPDATE sqlite_master SET name = CAST(x'ce67' AS TEXT), sql = 'no sql' WHERE name = 'gap'")
        connection.commit()
    assert len(verify(path)) == 1
    with pytest.raises(StoreError) as refused:
        Database.open(path)
    assert len(str(refused.value).splitlines()) == 1
