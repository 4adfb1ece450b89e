"""What is Kafka's own in its source; the laws of all sources are in test_source_contract.py.

What the broker is here: brokers.py.
"""

import pytest
from brokers import KafkaBench

from streams.batch import Arrival, Gap, Refusal
from streams.kafka import KafkaSettings, KafkaSource
from streams.source import SourceUnavailable


@pytest.fixture
def bench():
    bench = KafkaBench(partitions=2)
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


def take_all(source, count):
    items = []
    while len(items) < count:
        items += take(source)
        if len(items) < count:
            source.wait(10)
    return items


def cursors_of(items):
    return {item.key: item.position for item in items}


def publish(bench, numbers, partition=0):
    for number in numbers:
        bench.publish(str(number).encode(), partition)


def numbers_of(items):
    return [int(item.payload) for item in items]


def test_each_partition_comes_in_order(bench, opened):
    publish(bench, range(0, 200, 2), 0)
    publish(bench, range(1, 200, 2), 1)
    items = take_all(opened(), 200)
    for partition in (0, 1):
        mine = [item for item in items if item.key == f"{bench.stream}/{partition}"]
        assert numbers_of(mine) == list(range(partition, 200, 2))
        assert [item.position for item in mine] == [str(offset) for offset in range(1, 101)]


def test_the_cursor_says_where_to_read_on(bench, opened):
    publish(bench, range(5))
    items = take_all(opened(), 5)
    again = take_all(opened(cursors_of(items[:3])), 2)
    assert again == items[3:]


@pytest.mark.parametrize(("start", "expected"), [("earliest", [0, 1]), ("latest", [1])])
def test_without_a_cursor_it_begins_where_it_is_told(bench, opened, start, expected):
    publish(bench, [0])
    source = opened(start=start)
    items = take(source)
    publish(bench, [1])
    assert numbers_of(items + take_all(source, len(expected) - len(items))) == expected


def test_a_cursor_behind_the_end_is_a_gap(bench, opened):
    publish(bench, range(3))
    source = opened({f"{bench.stream}/0": "10"})
    (gap,) = source.iter_arrivals()
    assert isinstance(gap, Gap)
    assert "it ends at 3 but was read up to 10" in gap.reason
    assert source.problem() == gap.reason
    source.acknowledge([gap])
    assert numbers_of(take_all(source, 3)) == [0, 1, 2]
    assert source.problem() is None


def test_what_the_broker_removed_unread_is_a_gap():
    bench = KafkaBench(mock=True)  # which keeps 5 MiB of a partition
    source = bench.source({f"{bench.stream}/0": "1"})
    for number in range(16):
        bench.publish(bytes([number]) * 900_000)
    (gap,) = source.iter_arrivals()
    assert isinstance(gap, Gap)
    assert "are lost: removed before they were read" in gap.reason
    source.acknowledge([gap])
    first = next(source.iter_arrivals())
    assert first.payload[0] == int(gap.position)
    source.close()
    bench.cleanup()


def test_headers_say_what_a_message_is(bench, opened):
    bench.publish(b"1,2", Content_Type="text/csv", Supsupd_Name="shelf/one")
    bench.publish(b"1,2", Supsupd_Format="parquet")
    bench.publish(b"{}")
    bench.publish(b"?")
    first, second, third, fourth = take_all(opened(), 4)
    assert (first.form, first.name) == ("csv", "shelf/one")
    assert second.form == "parquet"
    assert (third.form, third.name) == ("json", f"{bench.stream}/0/2")
    assert fourth.form == "npz"  # whose decoder says what is wrong


def test_a_message_over_the_limit_is_refused_and_the_next_one_comes(bench, opened):
    bench.publish(b"x" * 1001)
    bench.publish(b"x" * 1000)
    refusal, arrival = take_all(opened(max_batch_bytes=1000), 2)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "too_large: 1001 bytes, at most 1000 expected"
    assert isinstance(arrival, Arrival)


def test_a_topic_that_does_not_exist_is_told_and_is_not_made(bench):
    source = KafkaSource(KafkaSettings(bench.servers, "nonesuch", timeout_seconds=2), name="kafka", cursors={})
    for _ in range(2):
        with pytest.raises(SourceUnavailable, match="there is no topic nonesuch"):
            list(source.iter_arrivals())
    source.close()


def test_no_secret_is_told():
    settings = KafkaSettings("127.0.0.1:1", "x", username="me", password="hush", timeout_seconds=0.2)
    source = KafkaSource(settings, name="kafka", cursors={})
    with pytest.raises(SourceUnavailable, match=r"kafka at 127\.0\.0\.1:1: ") as told:
        list(source.iter_arrivals())
    source.close()
    assert "hush" not in str(told.value) + repr(settings) + str(source.problem())


def test_a_message_ends_the_wait(bench, opened):
    source = opened()
    assert take(source) == []
    publish(bench, [0])
    source.wait(60)
    assert numbers_of(take(source)) == [0]
