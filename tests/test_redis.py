"""What is Redis's own in its source; the laws of all sources are in test_source_contract.py."""

import pytest
from brokers import RedisBench

from streams.batch import Gap, Refusal
from streams.redis import RedisSettings, RedisSource
from streams.source import SourceUnavailable


@pytest.fixture
def bench():
    bench = RedisBench()
    yield bench
    bench.cleanup()


@pytest.fixture
def opened(bench):
    """Makes sources, and closes them."""
    made = []

    def make(cursors=None, **settings):
        made.append(bench.source(cursors or {}, **settings))
        return made[-1]

    yield make
    for source in made:
        source.close()


def take(source):
    items = []
    for item in source.iter_arrivals():
        items.append(item)
        source.acknowledge([item])
    return items


def cursors_of(items):
    return {item.key: item.position for item in items}


def publish(bench, numbers):
    for number in numbers:
        bench.publish(str(number).encode())


def numbers_of(items):
    return [int(item.payload) for item in items]


def test_every_entry_is_acknowledged_once_it_is_durable(bench, opened):
    publish(bench, range(200))
    assert numbers_of(take(opened())) == list(range(200))
    assert bench.pending() == 0


def test_a_group_and_a_stream_are_made_where_they_are_missing(bench, opened):
    source = opened()
    assert take(source) == []
    publish(bench, [0])
    assert numbers_of(take(source)) == [0]


def test_what_a_killed_process_had_fetched_comes_first(bench, opened):
    publish(bench, range(5))
    killed = opened()
    seen = list(killed.iter_arrivals())
    killed.acknowledge(seen[:2])
    publish(bench, range(5, 10))
    again = take(opened(cursors_of(seen[:2])))
    assert numbers_of(again) == list(range(2, 10))
    assert again[0] == seen[2]


def test_what_another_consumer_left_lying_is_taken_over(bench, opened):
    publish(bench, range(3))
    list(opened(consumer="gone").iter_arrivals())
    assert numbers_of(take(opened(claim_idle_seconds=0.001))) == [0, 1, 2]


def test_entries_trimmed_unread_are_a_gap(bench, opened):
    publish(bench, range(3))
    source = opened()
    items = take(source)
    publish(bench, range(3, 6))
    bench.lose()
    publish(bench, [6])
    (gap,) = source.iter_arrivals()
    assert isinstance(gap, Gap)
    assert gap.key == items[0].key
    assert "3 entries are lost" in gap.reason
    assert source.problem() == gap.reason
    source.acknowledge([gap])
    assert source.problem() is None
    assert numbers_of(take(source)) == [6]
    publish(bench, [7])
    assert numbers_of(take(source)) == [7]


def test_entries_trimmed_before_the_first_read_are_a_gap(bench, opened):
    source = opened()
    assert take(source) == []
    publish(bench, range(5))
    bench.lose()
    publish(bench, [5])
    (gap,) = source.iter_arrivals()
    assert "5 entries are lost" in gap.reason


def test_a_gap_is_seen_after_a_restart_unless_it_was_accepted(bench, opened):
    publish(bench, range(3))
    cursors = cursors_of(take(opened()))
    publish(bench, range(3, 6))
    bench.lose()
    publish(bench, [6])
    (gap,) = opened(cursors).iter_arrivals()
    assert isinstance(gap, Gap)
    assert numbers_of(take(opened({gap.key: gap.position}))) == [6]


def test_what_was_acknowledged_beyond_the_cursor_is_a_gap(bench, opened):
    publish(bench, range(6))
    source = opened()
    items = list(source.iter_arrivals())
    source.acknowledge(items[:5])
    restored = opened(cursors_of(items[:2]))
    (gap,) = restored.iter_arrivals()
    assert isinstance(gap, Gap)
    assert f"entries {items[2].position} to {items[5].position} were acknowledged and are not in" in gap.reason
    restored.acknowledge([gap])
    assert numbers_of(take(restored)) == [5]


def test_a_group_that_was_set_back_gives_again_what_was_acknowledged_beyond_the_cursor(bench, opened):
    publish(bench, range(6))
    items = take(opened())
    bench.client.xgroup_setid(bench.stream, "supsupd", items[1].position)
    assert numbers_of(take(opened(cursors_of(items[:2])))) == [2, 3, 4, 5]


def test_trimming_what_was_read_is_no_gap(bench, opened):
    publish(bench, range(3))
    source = opened()
    take(source)
    bench.lose()
    publish(bench, [3])
    items = take(source)
    assert numbers_of(items) == [3]
    assert take(opened(cursors_of(items))) == []


def test_an_entry_that_was_delivered_and_trimmed_unread_is_a_gap(bench, opened):
    publish(bench, range(3))
    killed = opened()
    seen = list(killed.iter_arrivals())
    killed.acknowledge(seen[:1])
    bench.client.xdel(bench.stream, seen[1].position)
    source = opened(cursors_of(seen[:1]))
    (gap,) = source.iter_arrivals()
    assert gap.position == seen[1].position
    assert "before it was read" in gap.reason
    source.acknowledge([gap])
    assert numbers_of(take(source)) == [2]
    assert bench.pending() == 0


def test_an_entry_whose_acknowledgement_was_lost_may_be_trimmed(bench, opened):
    publish(bench, range(3))
    seen = list(opened().iter_arrivals())
    bench.lose()
    assert take(opened(cursors_of(seen))) == []
    assert bench.pending() == 0


@pytest.mark.parametrize("ids", ["own", "small"])
def test_a_stream_made_anew_is_a_gap_and_its_entries_are_new(bench, opened, ids):
    for number in range(3):
        bench.client.xadd(bench.stream, {"payload": f"{number}"}, id="*" if ids == "own" else f"{number + 5}-0")
    source = opened()
    old = take(source)
    bench.client.delete(bench.stream)
    with pytest.raises(SourceUnavailable):
        list(source.iter_arrivals())
    if ids == "small":
        bench.client.xadd(bench.stream, {"payload": "9"}, id="5-0")
    (gap,) = source.iter_arrivals()
    assert isinstance(gap, Gap)
    source.acknowledge([gap])
    if ids == "own":
        bench.publish(b"9")
    (new,) = take(source)
    assert new.payload == b"9"
    assert new.identity not in {item.identity for item in old}


def test_a_group_that_was_removed_is_made_at_the_cursor(bench, opened):
    publish(bench, range(3))
    cursors = cursors_of(take(opened()))
    bench.client.xgroup_destroy(bench.stream, "supsupd")
    publish(bench, [3])
    assert numbers_of(take(opened(cursors))) == [3]


def test_fields_say_what_an_entry_is(bench, opened):
    bench.publish(b"1,2", content_type="text/csv", name="shelf/one")
    bench.publish(b"1,2", format="parquet")
    bench.publish(b"{}")
    bench.publish(b"?")
    first, second, third, fourth = take(opened())
    assert (first.form, first.name) == ("csv", "shelf/one")
    assert second.form == "parquet"
    assert (third.form, third.name) == ("json", f"{bench.stream}/{third.position}")
    assert fourth.form == "npz"  # whose decoder says what is wrong


def test_names_that_are_no_text_stay_different(bench, opened):
    for name in (b"\xe9", b"\xe8", b"\\udce9", b"\n"):
        bench.publish(b"{}", name=name)
    names = [item.name for item in take(opened())]
    assert names == ["\\udce9", "\\udce8", "\\\\udce9", "\\n"]


def test_an_entry_without_a_payload_or_over_the_limit_is_refused_and_the_next_one_comes(bench, opened):
    bench.client.xadd(bench.stream, {"body": "x"})
    bench.publish(b"x" * 1001)
    bench.publish(b"x" * 1000)
    lacking, large, arrival = take(opened(max_batch_bytes=1000))
    assert isinstance(lacking, Refusal)
    assert isinstance(large, Refusal)
    assert lacking.reason == "bad_format: no field payload"
    assert large.reason == "too_large: 1001 bytes, at most 1000 expected"
    assert arrival.payload == b"x" * 1000
    assert bench.pending() == 0


def test_no_secret_is_told():
    settings = RedisSettings("redis://somebody:hush@127.0.0.1:1", "x")
    source = RedisSource(settings, name="redis", cursors={})
    with pytest.raises(SourceUnavailable, match=r"redis at 127\.0\.0\.1:1: connection refused") as told:
        list(source.iter_arrivals())
    source.close()
    assert "hush" not in str(told.value) + repr(settings) + str(source.problem())


def test_an_entry_ends_the_wait(bench, opened):
    source = opened()
    assert take(source) == []
    publish(bench, [0])
    source.wait(60)
    assert numbers_of(take(source)) == [0]
