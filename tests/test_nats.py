"""What is NATS's own in its source; the laws of all sources are in test_source_contract.py."""

import pytest
from brokers import NatsBench
from structlog.testing import capture_logs

from streams.batch import Arrival, Gap, Refusal
from streams.nats import NatsSettings, NatsSource
from streams.source import SourceUnavailable


@pytest.fixture
def bench():
    bench = NatsBench()
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
    items = list(source.iter_arrivals())
    source.acknowledge(items)
    return items


def take_all(source, count):
    """Passes until so many have come; the broker may make us wait for what it delivered before."""
    items = []
    while len(items) < count:
        items += take(source)
        if len(items) < count:
            source.wait(10)
    return items


def cursors_of(items):
    return {item.key: item.position for item in items}


def publish(bench, numbers, **options):
    for number in numbers:
        bench.publish(str(number).encode(), **options)


def test_every_message_is_acknowledged_once_it_is_durable(bench, opened):
    publish(bench, range(200))
    source = opened()
    items = take_all(source, 200)
    assert [item.payload for item in items] == [str(number).encode() for number in range(200)]
    assert bench.pending() == 0


def test_what_a_killed_process_had_fetched_comes_first(bench, opened):
    publish(bench, range(5))
    killed = opened()
    seen = list(killed.iter_arrivals())
    killed.acknowledge(seen[:2])
    publish(bench, range(5, 10))
    items = take_all(opened(cursors_of(seen[:2])), 8)
    assert [int(item.payload) for item in items] == list(range(2, 10))
    assert items[0].identity == seen[2].identity


def test_a_closed_source_hands_back_what_it_had_fetched(bench, opened):
    publish(bench, range(5))
    source = opened(ack_wait_seconds=3600)
    seen = list(source.iter_arrivals())
    source.close()
    assert [item.identity for item in take_all(opened(), 5)] == [item.identity for item in seen]


def test_a_purge_of_unread_messages_is_a_gap(bench, opened):
    publish(bench, range(3))
    source = opened()
    items = take(source)
    publish(bench, range(3, 6))
    bench.lose()
    publish(bench, [6])
    (gap,) = source.iter_arrivals()
    assert isinstance(gap, Gap)
    assert (gap.key, gap.position) == (items[0].key, "6")
    assert "messages 4 to 6 are lost" in gap.reason
    assert source.problem() == gap.reason
    source.acknowledge([gap])
    assert source.problem() is None
    assert [item.payload for item in take(source)] == [b"6"]


def test_a_gap_is_seen_after_a_restart(bench, opened):
    publish(bench, range(3))
    cursors = cursors_of(take(opened()))
    publish(bench, range(3, 6))
    bench.lose()
    (gap,) = opened(cursors).iter_arrivals()
    assert isinstance(gap, Gap)
    assert list(opened({gap.key: gap.position}).iter_arrivals()) == []


def test_a_purge_of_what_was_read_is_no_gap(bench, opened):
    publish(bench, range(3))
    source = opened()
    take(source)
    bench.lose()
    publish(bench, [3])
    items = take(source)
    assert [item.payload for item in items] == [b"3"]
    assert list(opened(cursors_of(items)).iter_arrivals()) == []


@pytest.mark.parametrize("restart", [False, True])
def test_a_stream_made_anew_is_a_gap_and_its_messages_are_new(bench, opened, restart):
    publish(bench, range(3))
    source = opened()
    old = take(source)
    bench.remake()
    publish(bench, range(3))
    if restart:
        source = opened(cursors_of(old))
    (gap,) = source.iter_arrivals()
    assert isinstance(gap, Gap)
    assert "made anew" in gap.reason
    source.acknowledge([gap])
    new = take(source)
    assert [item.payload for item in new] == [b"0", b"1", b"2"]
    assert not {item.identity for item in new} & {item.identity for item in old}


def test_other_subjects_make_no_gap(bench, opened):
    source = opened(subject=f"{bench.stream}.mine")
    publish(bench, [0], subject="mine")
    take(source)
    publish(bench, range(50), subject="other")
    assert take(source) == []
    bench.lose()
    publish(bench, [1], subject="mine")
    items = take(source)
    assert [item.payload for item in items] == [b"1"]
    assert [type(item) for item in opened(cursors_of(items), subject=f"{bench.stream}.mine").iter_arrivals()] == []


def test_other_subjects_that_the_broker_has_passed_make_no_gap(bench, opened):
    subject = f"{bench.stream}.mine"
    source = opened(subject=subject)
    publish(bench, [0], subject="mine")
    (first,) = source.iter_arrivals()
    publish(bench, range(50), subject="other")
    assert list(source.iter_arrivals()) == [first]  # the broker has looked through the others meanwhile
    source.acknowledge([first])
    source.close()
    assert list(opened(cursors_of([first]), subject=subject).iter_arrivals()) == []


def test_what_was_acknowledged_beyond_the_cursor_is_a_gap(bench, opened):
    publish(bench, range(6))
    source = opened()
    items = list(source.iter_arrivals())
    source.acknowledge(items[:5])
    restored = opened(cursors_of(items[:2]))
    (gap,) = restored.iter_arrivals()
    assert isinstance(gap, Gap)
    assert gap.position == "5"
    assert "messages 3 to 5 were acknowledged and are not in the store" in gap.reason
    restored.acknowledge([gap])
    assert [item.payload for item in take_all(restored, 1)] == [b"5"]


def test_a_consumer_taken_away_gives_again_what_was_acknowledged_beyond_the_cursor(bench, opened):
    publish(bench, range(6))
    items = take_all(opened(), 6)
    bench.run(bench.streams.delete_consumer(bench.stream, "supsupd"))
    assert [item.identity for item in take_all(opened(cursors_of(items[:2])), 4)] == [i.identity for i in items[2:]]


def test_a_consumer_made_anew_goes_on_behind_the_cursor(bench, opened):
    publish(bench, range(3))
    source = opened()
    cursors = cursors_of(take(source))
    bench.run(bench.streams.delete_consumer(bench.stream, "supsupd"))
    publish(bench, [3])
    assert [item.payload for item in take(opened(cursors))] == [b"3"]


def test_headers_say_what_a_message_is(bench, opened):
    bench.publish(b"1,2", Content_Type="text/csv", Supsupd_Name="shelf/one\n")
    bench.publish(b"1,2", Supsupd_Format="parquet")
    bench.publish(b"{}")
    bench.publish(b"?")
    first, second, third, fourth = take(opened())
    assert (first.form, first.name) == ("csv", "shelf/one")
    assert second.form == "parquet"
    assert (third.form, third.name) == ("json", f"{bench.stream}/3")
    assert fourth.form == "npz"  # whose decoder says what is wrong


def test_a_message_over_the_limit_is_refused_and_the_next_one_comes(bench, opened):
    bench.publish(b"x" * 1001)
    bench.publish(b"x" * 1000)
    refusal, arrival = take(opened(max_batch_bytes=1000))
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "too_large: 1001 bytes, at most 1000 expected"
    assert isinstance(arrival, Arrival)
    assert bench.pending() == 0


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"max_deliver": 5, "ack_policy": "explicit"}, "gives up after 5 deliveries, expected max_deliver -1"),
        ({"ack_policy": "none"}, "expected explicit"),
        ({"deliver_subject": "somewhere", "ack_policy": "explicit"}, "expected a pull consumer"),
    ],
)
def test_a_consumer_that_would_lose_messages_is_not_used(bench, opened, config, complaint):
    bench.run(bench.streams.add_consumer(bench.stream, durable_name="supsupd", **config))
    with pytest.raises(SourceUnavailable, match=complaint):
        list(opened().iter_arrivals())


def test_a_consumer_for_other_subjects_is_not_used(bench, opened):
    subject = f"{bench.stream}.mine"
    list(opened(subject=subject).iter_arrivals())
    with pytest.raises(SourceUnavailable, match=f"is for {subject}, expected all subjects"):
        list(opened().iter_arrivals())


def test_a_stream_that_does_not_exist_is_told_and_found_once_it_does(bench, opened):
    bench.run(bench.streams.delete_stream(bench.stream))
    source = opened()
    with pytest.raises(SourceUnavailable, match=f"there is no stream {bench.stream}"):
        list(source.iter_arrivals())
    bench.run(bench.streams.add_stream(name=bench.stream, subjects=[f"{bench.stream}.>"]))
    publish(bench, [0])
    assert len(take(source)) == 1


def test_no_secret_is_told():
    settings = NatsSettings("nats://somebody:hush@127.0.0.1:1", "x")
    source = NatsSource(settings, name="nats", cursors={})
    with pytest.raises(SourceUnavailable, match=r"nats at 127\.0\.0\.1:1: connection refused") as told:
        list(source.iter_arrivals())
    source.close()
    assert "hush" not in str(told.value) + repr(settings) + str(source.problem())


def test_a_message_ends_the_wait(bench, opened):
    source = opened()
    assert take(source) == []
    publish(bench, [0])
    source.wait(60)
    assert len(take(source)) == 1


def test_a_work_queue_is_emptied_and_makes_no_gap():
    bench = NatsBench(retention="workqueue")
    publish(bench, range(100))
    source = bench.source({})
    items = take_all(source, 100)
    publish(bench, [100])
    source.close()
    source = bench.source(cursors_of(items))
    assert [item.payload for item in take(source)] == [b"100"]
    assert bench.run(bench.streams.stream_info(bench.stream)).state.messages == 0
    source.close()
    bench.cleanup()


def test_a_stream_that_may_discard_unread_messages_is_warned_of_once():
    bench = NatsBench(max_msgs=10)
    source = bench.source({})
    with capture_logs() as logs:
        take(source)
        take(source)
    source.close()
    bench.cleanup()
    assert [(entry["event"], entry["limits"]) for entry in logs] == [("stream_may_discard", ["max_msgs"])]
