"""Standard input as a source: JSON lines, frames, and what is wrong with them."""

import contextlib
import json
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.batch import Arrival, BatchRejected, Refusal
from streams.framing import MAGIC, told_by
from streams.stdin import StdinSource


@pytest.fixture
def pipe():
    read, write = os.pipe()
    ends = {read, write}

    class Pipe:
        fd = read

        def write(self, data):
            os.write(write, data)

        def end(self):
            ends.discard(write)
            os.close(write)

    yield Pipe()
    for end in ends:
        os.close(end)


@pytest.fixture
def opened(pipe):
    made = []

    def make(**settings):
        made.append(StdinSource(fd=pipe.fd, **settings))
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


def frame(payload):
    return len(payload).to_bytes(4, "big") + payload


def read_all(data, **settings):
    """The items of an input that holds `data` and ends."""
    read, write = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(write, data) if data else None, os.close(write)))
    writer.start()
    source = StdinSource(fd=read, **settings)
    items = []
    while writer.is_alive():
        items += take(source)
    items += take(source)
    writer.join()
    source.close()
    os.close(read)
    return items


def test_each_line_is_a_batch(pipe, opened):
    pipe.write(b'{"x": [[1]], "id": "a7"}\n\n{"x": [[2]], "name": "shelf/2"}\r\n{"x": [[')
    source = opened()
    first, second = take(source)
    assert (first.form, first.payload, first.name) == ("json", b'{"x": [[1]], "id": "a7"}', "stdin/1")
    assert first.identity == "stdin:a7"
    assert (second.name, second.identity) == ("shelf/2", None)
    pipe.write(b"3]]}\n")
    assert [item.payload for item in take(source)] == [b'{"x": [[3]]}']


def test_each_frame_is_a_batch(pipe, opened):
    source = opened()
    pipe.write(MAGIC[:3])
    assert take(source) == []
    pipe.write(MAGIC[3:] + frame(b"PK\x03\x04abc") + frame(b'{"x": [[1]]}') + frame(b"?")[:-1])
    first, second = take(source)
    assert (first.form, first.payload) == ("npz", b"PK\x03\x04abc")
    assert second.form == "json"
    pipe.write(b"?" + frame(b""))
    assert [(item.form, item.payload) for item in take(source)] == [("npz", b"?"), ("npz", b"")]


def test_positions_and_names_tell_batches_apart(pipe, opened):
    pipe.write(b'{"x": 1}\n{"x": 1}\n')
    first, second = take(opened())
    assert first.key == second.key
    assert first.position != second.position


def test_the_end_is_quiet(pipe, opened):
    pipe.write(b'{"x": 1}\n')
    pipe.end()
    source = opened()
    assert len(take(source)) == 1
    assert take(source) == []
    assert source.problem() is None
    assert source.pending() == 0
    source.wait(0)


@pytest.mark.parametrize("data", [b"", b"\n\n", MAGIC])
def test_an_input_without_batches_has_none(data):
    assert read_all(data) == []


def test_a_whole_last_line_needs_no_newline():
    (item,) = read_all(b'{"x": [[1, 2]], "y": ["}"]}')
    assert isinstance(item, Arrival)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'{"x": [[1, 2', "the input ended within a line, after 12 bytes"),
        (MAGIC + b"\0\0", "the input ended after 2 of 4 bytes"),
        (MAGIC + frame(b"abcdef")[:-2], "the input ended after 4 of 6 bytes"),
        (MAGIC + frame(b"abcdef")[:-6], "the input ended after 0 of 6 bytes"),
    ],
)
def test_a_cut_end_is_truncated(data, text):
    (item,) = read_all(data)
    assert isinstance(item, Refusal)
    assert item.reason == f"truncated: {text}"


def test_a_long_line_is_refused_and_the_next_one_is_read():
    good = b'{"x": 1}'
    for length in (101, 5000, 600_000):
        refused, arrival = read_all(b'{"' + b"x" * length + b"\n" + good + b"\n", max_batch_bytes=100)
        assert refused.code == "too_large"
        assert arrival.payload == good


def test_a_long_frame_is_refused_and_the_next_one_is_read():
    for length in (101, 5000, 600_000):
        refused, arrival = read_all(MAGIC + frame(b"x" * length) + frame(b"PK\x03\x04"), max_batch_bytes=100)
        assert refused.reason == f"too_large: a frame of {length} bytes, at most 100 expected"
        assert arrival.payload == b"PK\x03\x04"


def test_no_more_is_read_than_may_be_held(pipe, opened):
    pipe.write(b'{"x": 1}\n' * 1000)
    source = opened()
    assert len(list(source.iter_arrivals())) == 64
    source.wait(0)
    assert source.pending() == 64
    assert len(take(source)) == 1000


def test_data_end_a_wait(pipe, opened):
    source = opened()
    pipe.write(b"{}\n")
    source.wait(60)
    assert len(take(source)) == 1


@given(st.lists(st.binary(max_size=300), max_size=20), st.integers(1, 64))
def test_frames_come_out_as_they_went_in(payloads, limit):
    items = read_all(MAGIC + b"".join(frame(payload) for payload in payloads), max_batch_bytes=limit)
    expected = [payload if len(payload) <= limit else None for payload in payloads]
    assert [item.payload if isinstance(item, Arrival) else None for item in items] == expected


@given(
    st.dictionaries(st.sampled_from(["name", "id", "x", "y", "task"]), st.text() | st.lists(st.text() | st.integers()))
)
def test_what_an_object_tells_is_read_as_json_reads_it(told):
    line = json.dumps(told, ensure_ascii=False).encode("utf-8", "surrogatepass")
    if any(isinstance(told.get(key), list) for key in ("name", "id")):
        with pytest.raises(BatchRejected, match="bad_format"):
            told_by(line)
    else:
        assert told_by(line) == {key: told[key] for key in ("name", "id") if key in told}


@pytest.mark.parametrize("digits", [1, 33, 5000])
def test_an_integer_tells_as_many_digits_as_it_has(digits):
    assert told_by(b'{"id": %s, "x": [[1]]}' % (b"7" * digits)) == {"id": "7" * digits}


@pytest.mark.parametrize(
    "line, told",
    [
        (b'{"\\u0069d": "a"}', {"id": "a"}),
        (b'{"meta": ' + b"[" * 40 + b"]" * 40 + b', "id": "a"}', {"id": "a"}),
        (b'{"id": "a", "id": "b"}', {"id": "b"}),
        (b'{"id": "a", "id": null}', {}),
        (b'{"meta": {"id": "a"}, "y": ["id"]}', {}),
    ],
)
def test_an_id_is_found_wherever_json_has_it(line, told):
    assert told_by(line) == told


def test_a_long_id_and_a_long_name_are_kept_by_their_hash():
    long = "é" * 5000
    lines = [{"id": long + end, "name": long + end, "x": [[1.0]]} for end in ("a", "b", "a")]
    first, second, again = read_all("".join(json.dumps(line) + "\n" for line in lines).encode())
    assert first.identity == again.identity != second.identity
    assert first.name == again.name != second.name
    assert len(first.identity.encode()) <= 4096
    assert len(first.name.encode()) <= 256


@pytest.mark.parametrize("value, shown", [("1.5", "1.5"), ("true", "true"), ("[1]", "[1]"), ('{"a": 1}', "{")])
def test_an_id_that_is_neither_text_nor_integer_is_refused_in_one_line(value, shown):
    bad, good = read_all(f'{{"id": {value}, "x": [[1]]}}\n{{"id": 2, "x": [[1]]}}\n'.encode())
    assert bad.reason == f'bad_format: "id" is {shown}, expected a string or an integer'
    assert good.identity == "stdin:2"


@given(st.binary())
def test_no_line_breaks_the_reader(line):
    with contextlib.suppress(BatchRejected):
        told_by(line)
    for item in read_all(line):
        assert isinstance(item, Arrival | Refusal)
