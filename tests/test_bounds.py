"""What a store can hold: SQLite and PostgreSQL give the same answer to the same value."""

import random

import pytest
from sqlalchemy import JSON, Double, Integer, LargeBinary, String, select

from storage import cursors, db, gaps, ledger, tasks
from storage.bounds import storable
from storage.db import Database, ValueRefused
from storage.models import Base, BatchRow, CursorRow, GapRow, TaskRow, utc_now
from storage.tasks import TaskFields

FIELDS = TaskFields(version=1, batches=1, samples=1, density=0.5, bytes=1, reference={})
LONG = "".join(random.Random(7).choices([chr(n) for n in range(0x4E00, 0x9FFF)], k=40_000))
"""Nothing compresses it: PostgreSQL's index rows take 2,704 bytes."""
HALF, NUL = "half \ud800", "nul \0"


@pytest.fixture
def store(store_target):
    db.upgrade(store_target)
    store = Database.open(store_target)
    yield store
    store.close()


def batch_row(**fields):
    given = {"source": "s", "name": "n", "size": 1, "state": "staged", "created_at": utc_now(), "updated_at": utc_now()}
    return BatchRow(**{**given, **fields})


def short_texts():
    return [c for t in Base.metadata.sorted_tables for c in t.columns if isinstance(c.type, String) and c.type.length]


@pytest.mark.parametrize("column", short_texts(), ids=str)
def test_every_short_text_has_one_length_counted_in_characters(store, column):
    """Of all tables: what has one character too many is refused, in words that say where."""
    length = column.type.length
    row = {c.name: value_of(c) for c in column.table.columns if not c.nullable}
    for text, refused in (("\U0001f642" * length, False), ("\U0001f642" * (length + 1), True)):
        with pytest.raises(ValueRefused) as error, store.write() as session:
            session.execute(column.table.insert().values(row | {column.name: text}))
            raise ValueRefused("all is taken back")
        said = f"{column.table.name}.{column.name}: {length + 1} characters, at most {length} expected"
        # A text that fits may still be none of those that a constraint knows.
        assert (said in str(error.value)) is refused


def value_of(column):
    kinds = {String: "x", Integer: 1, Double: 0.5, LargeBinary: b"", JSON: {}}
    return next((value for kind, value in kinds.items() if isinstance(column.type, kind)), utc_now())


@pytest.mark.parametrize(
    "make",
    [
        lambda: batch_row(name=NUL),
        lambda: batch_row(name=HALF),
        lambda: batch_row(form="x" * 33),
        lambda: batch_row(provisional=2**31),
        lambda: batch_row(size=2**63),
        lambda: GapRow(source="s", key=HALF, position="1", reason=NUL, created_at=utc_now()),
        lambda: CursorRow(digest="0" * 64, source="s", key="k", position=NUL),
    ],
)
def test_what_one_kind_refuses_the_other_refuses_too_and_the_store_goes_on(store, make):
    with pytest.raises(ValueRefused, match=r"^[^\n]{1,200}$"), store.write() as session:
        session.add(make())
    with store.write() as session:
        session.add(batch_row(name=LONG))


@pytest.mark.parametrize(
    "change", [{"reason": NUL}, {"reason": HALF}, {"code": "c" * 33}, {"provisional": -(2**31) - 1}]
)
def test_a_change_is_checked_as_a_new_row_is(store, change):
    with store.write() as session:
        session.add(batch_row())
    for bulk in (True, False):
        with pytest.raises(ValueRefused), store.write() as session:
            if bulk:
                session.execute(BatchRow.__table__.update().values(**change))
            else:
                for column, value in change.items():
                    setattr(session.get(BatchRow, 1), column, value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_refused(store, value):
    with pytest.raises(ValueRefused, match="finite"), store.write() as session:
        tasks.create(session, TaskFields(1, 1, 1, 0.5, 1, {}, accuracy=value))


@pytest.mark.parametrize("value", [HALF, float("nan"), {1, 2}, 10**5000], ids=["half", "nan", "set", "digits"])
def test_json_that_one_kind_refuses_the_other_refuses_too(store, value):
    with pytest.raises(ValueRefused), store.write() as session:
        tasks.create(session, TaskFields(1, 1, 1, 0.5, 1, {"a": value}))


@pytest.mark.parametrize("text", [NUL, HALF])
def test_a_question_about_what_cannot_be_there_has_one_answer(store, text):
    with pytest.raises(ValueRefused), store.read() as session:
        session.scalars(select(TaskRow).where(TaskRow.name == text)).all()
    with store.read() as session, pytest.raises(tasks.TaskUnknown):
        tasks.resolve(session, text)


def test_names_of_any_length_are_keys(store):
    """Of files, sources, deliveries, gaps: none is in an index but by its hash."""
    with store.write() as session:
        taken = ledger.take(session, [ledger.Entry(LONG, LONG, "0" * 64, 1, 1, True, "\U0001f642" * 255)])
        ledger.sight(session, LONG, {LONG: taken[0].id})
        cursors.advance(session, LONG, LONG, LONG)
        gaps.report(session, LONG, LONG, LONG, LONG)
        task_id = tasks.create(session, FIELDS)
        key = LONG[: tasks.MAX_KEY]
        tasks.set_key(session, task_id, key)
        assert gaps.accept(session, LONG).reason == LONG
    with store.read() as session:
        assert ledger.find_sightings(session, LONG, [LONG]) == {LONG: 1}
        assert cursors.find_positions(session, LONG, [LONG]) == cursors.load_cursors(session, LONG) == {LONG: LONG}
        assert ledger.newest_named(session, LONG, LONG) == 1
        assert tasks.resolve(session, f"key:{key}").id == task_id


def test_a_text_made_storable_is_one_and_others_stay_as_they_are():
    assert storable(LONG) == LONG
    for text in (HALF, NUL, LONG + HALF + NUL):
        assert len(storable(text, 20)) <= 20
        assert not set(storable(text)) & {"\0", "\ud800"}
