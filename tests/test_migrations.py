"""Migrations: from nothing to exactly the models, all of it or none of it."""

import shutil
import sqlite3
import subprocess
import sys
import zlib
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from alembic import command
from sqlalchemy import create_engine
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

import storage
from storage import backup, copying, db, masks, packing, schema, tasks
from storage.backends import backend_of
from storage.db import Database, SchemaMismatch, verify
from storage.models import Base, digest_key

ALL = ["0001", "0002", "0003", "0004", "0005", "0006"]
NEXT = """
import os, signal
import sqlalchemy as sa
from alembic import op
revision, down_revision = "0007", "0006"
def upgrade():
    op.create_table("half", sa.Column("id", sa.Integer(), primary_key=True))
    op.add_column("task", sa.Column("half", sa.Integer()))
    {end}
"""
UPGRADE = """
import sys
from pathlib import Path
from storage import db
target, location, *state = sys.argv[1:]
state = Path(state[0]) if state else None
db.upgrade(target if "://" in target else Path(target), location, state=state)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "supsup.db"


def next_migration(tmp_path, end):
    """A copy of our migrations with one more, which ends with the statement `end`."""
    location = tmp_path / "migrations"
    shutil.copytree(Path(storage.__file__).parent / "migrations", location)
    (location / "versions" / "0007_next.py").write_text(NEXT.format(end=end))
    return location


def tables(path):
    """Table name -> the parts of its CREATE statement, without order."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return {name: parts(sql) for name, sql in rows}


def parts(sql):
    """What is before the outer parentheses, what is between their commas, and what is behind."""
    found, depth = [""], 0
    for character in " ".join(sql.split()).replace('"', ""):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if (character, depth) in {(",", 1), ("(", 1), (")", 0)}:
            found.append("")
        else:
            found[-1] += character
    return {part.strip() for part in found}


def test_migrations_from_nothing_equal_the_models(tmp_path, path):
    db.upgrade(path)
    wanted = tmp_path / "models.db"
    engine = create_engine(f"sqlite:///{wanted}")
    Base.metadata.create_all(engine)
    migrated = tables(path)
    del migrated["alembic_version"]
    assert migrated == tables(wanted)


def test_every_constraint_and_index_has_a_name():
    for table in Base.metadata.tables.values():
        for item in [*table.constraints, *table.indexes]:
            assert item.name, f"{table.name}: {item}"


def test_every_constraint_has_its_name_in_the_database(path):
    db.upgrade(path)
    created = "\n".join(line for lines in tables(path).values() for line in lines)
    for table in Base.metadata.tables.values():
        # SQLite cannot name the key of an AUTOINCREMENT table.
        unnamed = table.primary_key if table.dialect_options["sqlite"]["autoincrement"] else None
        for constraint in table.constraints - {unnamed}:
            assert f"CONSTRAINT {constraint.name} " in created


def test_the_same_tables_can_be_made_on_postgresql():
    for table in Base.metadata.sorted_tables:
        statement = str(CreateTable(table).compile(dialect=postgresql.dialect()))
        assert all(f"CONSTRAINT {item.name} " in statement for item in table.constraints)


def test_upgrade_says_what_it_applied_and_then_nothing(path):
    assert db.upgrade(path) == ALL
    before = path.read_bytes()
    assert db.upgrade(path) == []
    assert path.read_bytes() == before
    assert verify(path) == []


def test_downgrade_leaves_no_table(path):
    db.upgrade(path)
    with db.migrating(path) as connection:
        command.downgrade(schema.migration_config(connection), "base")
    assert set(tables(path)) == {"alembic_version", "sqlite_sequence"}
    assert db.upgrade(path) == ALL


ROWS = """
INSERT INTO task VALUES (3, 'digits', 2, 5, 640, 0.9, 0.1, 0.5, 13, '{}', x'01', '2026-01-01', '2026-01-02');
INSERT INTO batch VALUES (7, 'f', 'a', 'h', 'h', 9, 2, 1, 'committed', 3, NULL, 'known', NULL, 1, '2026-01-01',
    '2026-01-01');
INSERT INTO mask_version VALUES (3, 2, 7, x'0f03', 16, 'abc', 0.375, '2026-01-01');
INSERT INTO decision VALUES (4, 7, 'known', 3, '{}', '2026-01-01');
INSERT INTO training_state VALUES (3, 2, 1, x'00', '2026-01-01');
"""


def migrate(path, step, revision):
    with db.migrating(path) as connection:
        step(schema.migration_config(connection), revision)


def rows(path):
    with sqlite3.connect(path) as connection:
        connection.row_factory = sqlite3.Row
        names = [name for name in tables(path) if name in Base.metadata.tables]
        return {name: [dict(row) for row in connection.execute(f"SELECT * FROM {name}")] for name in names}


def test_the_second_migration_keeps_every_row_and_can_be_taken_back(path):
    migrate(path, command.upgrade, "0001")
    before = tables(path)
    with sqlite3.connect(path) as connection:
        connection.executescript(ROWS)
    stored = rows(path)
    assert db.upgrade(path) == ALL[1:]
    for name, found in rows(path).items():
        kept = stored.get(name, [])
        assert [{key: row[key] for key in old} for row, old in zip(found, kept, strict=True)] == kept
        added = [{key: row[key] for key in row.keys() - old.keys()} for row, old in zip(found, kept, strict=True)]
        assert all(value == {"crashes": 0}.get(key) for row in added for key, value in row.items())
    with sqlite3.connect(path) as connection:
        # Weights counted honestly: 11 of 16 bits. The first schema takes all 16 for weights.
        connection.execute("UPDATE mask_version SET nbits = 11, density = 6.0 / 11")
    migrate(path, command.downgrade, "0001")
    assert tables(path) == before
    assert rows(path) == stored


def store_masks(path, *wanted):
    """A migrated database with one task, of which these are the versions, 1, 2, …"""
    db.upgrade(path)
    store = Database.open(path)
    with store.write() as session:
        fields = tasks.TaskFields(version=1, batches=1, samples=1, density=0.5, bytes=1, reference={})
        task_id = tasks.create(session, fields)
        for version, bits in enumerate(wanted, start=1):
            masks.append_mask(session, masks.MaskRow(task_id, version, None, bits, 8 * len(bits)))
    store.close()


def test_coded_masks_are_raw_bits_again_after_going_back_and_stay_so(path):
    rng = np.random.default_rng(0)
    wanted = [packing.pack(rng.random(8000) < density) for density in (0.01, 0.2, 0.5)]
    store_masks(path, *wanted)
    assert [row["coding"] for row in rows(path)["mask_version"]] == ["gaps", "zstd", None]
    migrate(path, command.downgrade, "0002")
    assert [row["bits"] for row in rows(path)["mask_version"]] == wanted
    db.upgrade(path)
    assert [(row["bits"], row["coding"]) for row in rows(path)["mask_version"]] == [(bits, None) for bits in wanted]
    assert verify(path) == []


def test_a_damaged_mask_keeps_its_schema(path):
    store_masks(path, bytes(1000))
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE mask_version SET bits = x'00'")
    before = rows(path)
    with pytest.raises(RuntimeError, match=r"^mask of task 1, version 1: .+$"):
        migrate(path, command.downgrade, "0002")
    assert rows(path) == before


def test_the_database_itself_refuses_an_unknown_coding(path):
    store_masks(path, bytes(1000))
    with sqlite3.connect(path) as connection, pytest.raises(sqlite3.IntegrityError, match="coding_is_known"):
        connection.execute("UPDATE mask_version SET coding = 'lzma'")


def test_statistics_are_not_lost_by_going_back(path):
    migrate(path, command.upgrade, "0001")
    with sqlite3.connect(path) as connection:
        connection.executescript(ROWS)
    db.upgrade(path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE mask_version SET statistics = x'00000000'")
    before = rows(path)
    with pytest.raises(RuntimeError, match="1 masks have statistics"):
        migrate(path, command.downgrade, "0001")
    assert rows(path) == before


def test_an_id_is_not_given_again_after_a_migration(path):
    migrate(path, command.upgrade, "0001")
    with sqlite3.connect(path) as connection:
        connection.executescript(ROWS)
    db.upgrade(path)
    with sqlite3.connect(path) as connection:
        columns = "name, version, batches, samples, density, bytes, reference, created_at, last_seen_at"
        values = "'new', 1, 1, 1, 0.5, 1, '{}', '2026-01-01', '2026-01-01'"
        made = connection.execute(f"INSERT INTO task ({columns}) VALUES ({values}) RETURNING id").fetchone()
    assert made == (4,)


@pytest.mark.parametrize("refuses", [Database.open, db.upgrade])
def test_a_newer_schema_is_refused(path, refuses):
    db.upgrade(path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaMismatch, match="9999 is newer"):
        refuses(path)
    assert "newer" in verify(path)[0]


def test_an_older_schema_is_not_opened(path):
    sqlite3.connect(path).close()
    path.touch()
    with pytest.raises(SchemaMismatch, match="db upgrade"):
        Database.open(path)
    assert verify(path) == [f"revision {n} is not applied: run `supsupd db upgrade`" for n in ALL]


def test_a_missing_database_is_not_made_by_opening_it(path):
    with pytest.raises(SchemaMismatch, match="does not exist"):
        Database.open(path)
    assert verify(path) == [f"{path} does not exist"]
    assert not path.exists()


@pytest.mark.parametrize("start", ["from nothing", "from the newest"])
def test_an_exception_in_a_migration_leaves_the_old_schema(tmp_path, path, start):
    if start == "from the newest":
        db.upgrade(path)
    before = tables(path)
    with pytest.raises(ZeroDivisionError):
        db.upgrade(path, str(next_migration(tmp_path, "1 / 0")))
    assert tables(path) == before
    assert db.upgrade(path) == ([] if before else ALL)
    assert verify(path) == []


def test_a_kill_in_a_migration_leaves_the_old_schema(tmp_path, path):
    db.upgrade(path)
    before = tables(path)
    location = next_migration(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    killed = subprocess.run([sys.executable, "-c", UPGRADE, path, location], timeout=60)
    assert killed.returncode == -9
    assert tables(path) == before
    assert verify(path) == []


def test_a_migration_that_ends_is_applied(tmp_path, path):
    location = str(next_migration(tmp_path, "pass"))
    assert db.upgrade(path, location) == [*ALL, "0007"]
    assert "half" in tables(path)
    with pytest.raises(SchemaMismatch, match="0007 is newer"):
        Database.open(path)


def test_a_migration_that_orphans_a_row_is_not_applied(tmp_path, path):
    db.upgrade(path)
    orphan = "op.execute(\"INSERT INTO training_state VALUES (7, 1, 1, x'', '2026-01-01')\")"
    with pytest.raises(SchemaMismatch, match="foreign keys"):
        db.upgrade(path, str(next_migration(tmp_path, orphan)))
    assert verify(path) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("DROP INDEX ix_batch_state_id", "missing: batch: index ix_batch_state_id"),
        ("ALTER TABLE cursor ADD COLUMN extra TEXT", "unexpected: cursor: column extra"),
        ("DROP TABLE training_state", "missing: training_state: column task_id"),
        ("INSERT INTO training_state VALUES (7, 1, 1, x'', '2026-01-01')", "missing row of task"),
    ],
)
def test_check_tells_what_differs_from_the_models(path, change, problem):
    db.upgrade(path)
    with sqlite3.connect(path) as connection:
        connection.execute(change)
    assert any(problem in found for found in verify(path))


def test_the_command_line_of_developers_reaches_the_same_migrations(path):
    root = Path(storage.__file__).parent.parent
    alembic = [sys.executable, "-m", "alembic", "-c", root / "alembic.ini", "-x", f"database={path}"]
    for arguments in (["upgrade", "head"], ["check"]):
        done = subprocess.run([*alembic, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert verify(path) == []


# Golden databases: of every released schema, with a row of everything that it had.

MOMENT = datetime(2026, 1, 2, 3, 4, 5, 600, tzinfo=UTC)
BITS = packing.pack(np.arange(40) % 3 == 0)
GOLDEN = {
    "network": [{"id": 1, "architecture": {"kind": "mlp"}, "seed": 2**62, "signs_sha256": "a" * 64,
                 "normalisation": {"rule": "none"}, "normalisation_data": b"\0\1", "classes": ["dög"],
                 "label_kind": "str", "config": {}, "created_at": MOMENT}],
    "task": [{"id": number, "name": f"task-{number}", "version": 2, "batches": 5, "samples": 640, "accuracy": 0.1,
              "entropy": None, "density": 0.5, "bytes": 13, "reference": {"e": [0.1, None]}, "statistics": b"\1",
              "created_at": MOMENT, "last_seen_at": MOMENT, "inputs": b"\2",
              "retired_at": MOMENT if number == 1 else None, "merged_into": 3 if number == 1 else None,
              "key": f"k{number}"} for number in (1, 3)],
    "batch": [{"id": number, "source": "folder", "name": "ä.npz", "sha256": "h" * 64, "dedupe_key": f"{number}" * 64,
               "size": 9, "samples": 2, "labelled": True, "state": state, "task_id": 3, "provisional": None,
               "decision": "known", "reason": "bad_labels: none", "attempts": 1, "created_at": MOMENT,
               "updated_at": MOMENT, "given_task": "k", "form": "npz", "code": "bad_labels", "crashes": 2,
               "retry_of": 7 if number == 8 else None, "sender": "token 1"}
              for number, state in ((7, "committed"), (8, "quarantined"), (9, "unsure"))],
    "mask_version": [{"task_id": 3, "version": 2, "batch_id": 7, "bits": BITS, "nbits": 8 * len(BITS),
                      "sha256": packing.sha256(BITS), "density": packing.popcount(BITS) / (8 * len(BITS)),
                      "created_at": MOMENT, "statistics": None, "reason": "why", "reference": {"e": 1},
                      "coding": None, "made_by": "someone"}],
    "decision": [{"id": 4, "batch_id": 7, "kind": "known", "task_id": 3, "evidence": {"p": 0.1},
                  "created_at": MOMENT, "reason": "because"}],
    "cursor": [{"digest": digest_key("folder", "ä"), "source": "folder", "key": "ä", "position": "1"}],
    "training_state": [{"task_id": 3, "version": 2, "turn": 1, "payload": b"\0", "updated_at": MOMENT}],
    "reservoir": [{"layer": 0, "size": 2, "patterns": 1, "matrix": b"\0", "sha256": packing.sha256(b"\0"),
                   "updated_at": MOMENT}],
    "reservoir_pattern": [{"task_id": 3, "version": 2, "turn": 1}],
    "feature_products": [{"id": 1, "products": b"\0", "sha256": packing.sha256(b"\0"), "updated_at": MOMENT}],
    "sighting": [{"digest": digest_key("nats", "1"), "source": "nats", "identity": "1", "batch_id": 7,
                  "expires_at": MOMENT}],
    "prediction": [{"batch_id": 7, "payload": zlib.compress(b"[]"), "created_at": MOMENT}],
    "gap": [{"id": 2, "source": "nats", "key": "k", "position": "9", "reason": "lost", "created_at": MOMENT,
             "accepted_at": MOMENT}],
}  # fmt: skip


def make_golden(target, revision):
    """A store of an old schema, with rows in every table, as a daemon of that time would have left it."""
    migrate(target, command.upgrade, revision)
    with db.migrating(target) as connection:
        for table in copying.reflect(connection).sorted_tables:
            for row in reversed(GOLDEN[table.name]) if table.name == "task" else GOLDEN[table.name]:
                known = {key: value for key, value in row.items() if key in table.columns}
                connection.execute(table.insert().values(known))


def contents(target):
    """The schema in words, and every row of every table."""
    with backend_of(target).migrating() as connection:
        tables = copying.reflect(connection).sorted_tables
        return schema.describe(connection), {t.name: list(copying.iter_rows(connection, t)) for t in tables}


@pytest.mark.parametrize("revision", ALL)
def test_a_store_of_every_released_schema_keeps_its_rows(store_target, tmp_path, revision):
    make_golden(store_target, revision)
    _, before = contents(store_target)
    assert db.upgrade(store_target, state=tmp_path) == ALL[ALL.index(revision) + 1 :]
    _, after = contents(store_target)
    for name, rows in before.items():
        assert [{key: row[key] for key in old} for row, old in zip(after[name], rows, strict=True)] == rows
    assert verify(store_target) == []
    Database.open(store_target).close()


@pytest.mark.parametrize("revision", ALL[:-1])
def test_one_step_down_gives_back_what_was(store_target, tmp_path, revision):
    make_golden(store_target, revision)
    before = contents(store_target)
    migrate(store_target, command.upgrade, ALL[ALL.index(revision) + 1])
    assert contents(store_target) != before
    db.downgrade(store_target, state=tmp_path)
    assert contents(store_target) == before


def test_the_first_schema_is_not_taken_from_what_is_stored(store_target, tmp_path):
    make_golden(store_target, ALL[0])
    before = contents(store_target)
    with pytest.raises(db.StoreError, match="rows of training_state are stored, and schema 0001 is the first"):
        db.downgrade(store_target, state=tmp_path)
    assert contents(store_target) == before


@pytest.mark.parametrize("revision", ALL[:-1])
def test_a_backup_is_made_before_the_schema_changes_and_brings_it_back(store_target, tmp_path, revision):
    make_golden(store_target, revision)
    before = contents(store_target)
    db.upgrade(store_target, state=tmp_path / "state")
    (file,) = (tmp_path / "state" / "backup").iterdir()
    assert file.name.startswith(f"{revision}-")
    restored = tmp_path / "restored" / "supsup.db"
    restored.parent.mkdir()
    backup.restore_backup(file, backend_of(restored), restored.parent / "spool")
    assert contents(restored)[1] == before[1]
    assert db.upgrade(restored) == ALL[ALL.index(revision) + 1 :]
    assert contents(restored)[1] == contents(store_target)[1]


def test_an_empty_store_needs_no_backup(store_target, tmp_path):
    db.upgrade(store_target, state=tmp_path / "state")
    assert not (tmp_path / "state" / "backup").exists()
    assert contents(store_target)[1] == {name: [] for name in Base.metadata.tables}


def test_a_kill_in_any_migration_leaves_the_old_schema_and_all_rows(store_target, tmp_path):
    make_golden(store_target, "0005")
    before = contents(store_target)
    location = next_migration(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    killed = subprocess.run([sys.executable, "-c", UPGRADE, store_target, location, tmp_path], timeout=60)
    assert killed.returncode == -9
    assert contents(store_target) == before
    assert db.upgrade(store_target, state=tmp_path) == ["0006"]
    assert verify(store_target) == []
