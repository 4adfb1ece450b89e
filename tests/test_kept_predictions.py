"""Predictions that wait for their folder, in either kind of store: in order, bounded, and superseded by newer ones."""

import os

import pytest

from storage import db, ledger, packing, predictions
from storage.db import Database


@pytest.fixture
def store(store_target):
    db.upgrade(store_target)
    store = Database.open(store_target)
    yield store
    store.close()


def scored(store, number, name="a", source="s"):
    """A batch's id."""
    entry = ledger.Entry(source, name, packing.sha256(b"%d" % number), 1, 1, labelled=False)
    with store.write() as session:
        batch = ledger.stage(session, entry).id
        ledger.claim(session)
        ledger.finish(session, batch, ledger.Outcome("scored"))
    return batch


def test_what_is_kept_comes_back_in_order_and_goes_once(store):
    batches = [scored(store, number, f"{number}") for number in range(3)]
    with store.write() as session:
        for batch in reversed(batches):
            assert predictions.keep(session, batch, b"of %d" % batch, 1000) == []
    with store.write() as session:
        assert [row.id for row in predictions.list_kept(session, 2)] == batches[:2]
        assert [row.id for row in predictions.list_kept(session, 2, batches[1])] == batches[2:]
        assert predictions.load(session, batches[1]) == b"of %d" % batches[1]
        predictions.forget(session, batches[1])
        assert predictions.count(session) == 2
        with pytest.raises(predictions.PredictionCorrupt):
            predictions.load(session, batches[1])


def test_the_oldest_give_way_and_what_alone_is_too_large_gives_way_to_none(store):
    batches = [scored(store, number, f"{number}") for number in range(5)]
    with store.write() as session:
        given_up = [predictions.keep(session, batch, os.urandom(100), 250) for batch in batches[:4]]
        assert given_up == [[], [], [batches[0]], [batches[1]]]
        assert predictions.keep(session, batches[4], os.urandom(300), 250) == [batches[4]]
        assert [row.id for row in predictions.list_kept(session, 9)] == batches[2:4]


def test_a_later_batch_of_the_same_name_source_and_sender_has_the_file(store):
    first, other, again = scored(store, 0), scored(store, 1, source="t"), scored(store, 2)
    with store.write() as session:
        rows = [ledger.load_batch(session, batch) for batch in (first, other, again)]
        assert [predictions.is_superseded(session, row) for row in rows] == [True, False, False]
        rows[2].sender = "token 1"
        session.flush()
        assert not predictions.is_superseded(session, rows[0])
