"""Tar archives: nothing in them is a path, and a WebDataset shard is the batch that its samples say."""

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from streams import tar
from streams.batch import BatchRejected
from streams.formats import Limits, decode, sniff


def npy(array):
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()


def png(value):
    target = io.BytesIO()
    Image.fromarray(np.full((4, 6), value, np.uint8)).save(target, "PNG")
    return target.getvalue()


def shard(*members, format=tarfile.PAX_FORMAT, **fields):
    """`members` are names with bytes; `fields` are those of every TarInfo."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))
    return target.getvalue()


def read(payload, limits=None, with_task=False):
    return decode(payload, limits or Limits(), with_task, form="tar")


def rejection(payload, limits=None, with_task=False):
    with pytest.raises(BatchRejected) as caught:
        read(payload, limits, with_task)
    assert str(caught.value).isprintable()
    return caught.value


ROW = npy(np.arange(3, dtype=np.float32))
TWO = (("d/1.npy", ROW), ("d/1.cls", b"4\n"), ("d/2.npy", ROW), ("d/2.cls", b"5"))


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_files_of_one_key_are_one_sample(format):
    batch = read(shard(*TWO, format=format))
    assert batch.x.shape == (2, 3)
    assert batch.x.dtype == np.float32
    assert batch.y.tolist() == [4, 5]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names_and_broken_times_are_read(format):
    key = "dög/" * 30 + "k" * 150
    batch = read(shard((f"{key}.npy", ROW), (f"{key}.cls", b"cat"), format=format, mtime=1.5))
    assert batch.y.tolist() == ["cat"]


def test_images_come_as_pixels_and_json_tells_label_and_task():
    members = [("1.png", png(7)), ("1.json", b'{"label": "a", "task": "t"}')]
    members += [("2.x.png", png(8)), ("2.json", b'{"y": "b", "task": "t"}'), ("2.txt", b"a caption")]
    batch = read(shard(*members), with_task=True)
    assert batch.x[:, 0, 0].tolist() == [7, 8]
    assert batch.y.tolist() == ["a", "b"]
    assert batch.task == "t"
    assert sniff(shard(*members)) == "tar"


def test_samples_without_labels_are_an_unlabelled_batch_and_hidden_files_are_ignored():
    assert read(shard(("1.npy", ROW), ("._1.npy", b"?"), ("README", b"?"))).y is None


def test_what_is_packed_is_what_tarfile_reads():
    members = [("a/1.png", b"one"), ("b/" + "n" * 200 + ".png", b"two"), ("é/3.png", b"")]
    with tarfile.open(fileobj=io.BytesIO(tar.pack(members))) as archive:
        read_back = [(info.name, archive.extractfile(info).read(), info.mtime, info.uid) for info in archive]
    assert read_back == [(name, data, 0, 0) for name, data in members]
    assert [(name, bytes(data)) for name, data in tar.iter_files(tar.pack(members))] == members


def typed(kind):
    return shard(("1.npy", b""), type=kind, linkname="/etc/passwd")


def broken_sum():
    payload = bytearray(shard(*TWO))
    payload[0] ^= 1
    return bytes(payload)


def pax(records):
    """An extended header with these bytes, and a member after it."""
    info = tarfile.TarInfo("h")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(-(-len(records) // 512) * 512, b"\0") + shard(*TWO)


def claiming(size):
    info = tarfile.TarInfo("1.npy")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


BAD = {
    "empty": (b"", "truncated", "0 bytes"),
    "cut in a header": (shard(*TWO)[:100], "truncated", "missing"),
    "cut in a file": (shard(*TWO)[:600], "truncated", "of"),
    "cut between files": (shard(*TWO)[:1024], "truncated", "missing"),
    "no tar": (b"hello" * 200, "bad_format", "no tar"),
    "bytes after the end": (shard(*TWO) + b"x" * 512, "trailing_bytes", "after the end"),
    "wrong checksum": (broken_sum(), "bad_format", "checksum"),
    "a link": (typed(tarfile.LNKTYPE), "not_regular", "1.npy: link"),
    "a symlink": (typed(tarfile.SYMTYPE), "not_regular", "1.npy: symlink"),
    "a device": (typed(tarfile.CHRTYPE), "not_regular", "1.npy: device"),
    "a FIFO": (typed(tarfile.FIFOTYPE), "not_regular", "1.npy: FIFO"),
    "sparse": (typed(tarfile.GNUTYPE_SPARSE), "not_regular", "1.npy: sparse file"),
    "sparse by pax": (pax(b"22 GNU.sparse.major=1\n"), "not_regular", "sparse"),
    "unknown type": (typed(b"V"), "bad_format", "unknown type"),
    "absolute": (shard(("/etc/1.npy", ROW)), "bad_member_name", "/etc/1.npy"),
    "parent": (shard(("../1.npy", ROW)), "bad_member_name", "../1.npy"),
    "not UTF-8": (shard(("\udcff.npy", ROW), format=tarfile.GNU_FORMAT), "bad_member_name", "udcff"),
    "newline": (shard(("a\nb.npy", ROW)), "bad_member_name", "no safe"),
    "twice": (shard(("1.npy", ROW), ("1.npy", ROW)), "bad_member_name", "two members"),
    "apart": (shard(TWO[0], TWO[2], TWO[1], TWO[3]), "bad_member_name", "not beside it"),
    "pax bomb": (pax(b"x" * (1 << 20)), "too_large", "1048576 bytes"),
    "pax of nonsense": (pax(b"nonsense"), "bad_format", "extended header"),
    "pax length": (pax(b"999 path=a\n"), "bad_format", "extended header"),
    "pax size": (pax(b"11 size=-5\n"), "bad_format", "size"),
    "claims much": (claiming(1 << 40), "truncated", "missing"),
    "no samples": (shard(("README", b"?")), "bad_shape", "no samples"),
    "no x": (shard(("1.cls", b"1")), "schema_mismatch", "sample 1 has no png"),
    "two x": (shard(("1.npy", ROW), ("1.png", png(1))), "schema_mismatch", "second"),
    "two kinds": (shard(("1.npy", ROW), ("2.png", png(1))), "schema_mismatch", "1 images and 1 arrays"),
    "two shapes": (shard(("1.npy", ROW), ("2.npy", npy(np.zeros(4, np.float32)))), "schema_mismatch", "2.npy"),
    "two types": (shard(("1.npy", ROW), ("2.npy", npy(np.zeros(3)))), "schema_mismatch", "float64"),
    "object array": (shard(("1.npy", npy(np.array([{}])))), "forbidden_pickle", "1.npy"),
    "cut array": (shard(("1.npy", ROW[:-1])), "truncated", "1.npy"),
    "NaN": (shard(("1.npy", npy(np.array([np.nan])))), "non_finite", "1 of 1"),
    "some labels": (shard(*TWO[:3]), "bad_labels", "1 of 2"),
    "mixed labels": (shard(*TWO[:3], ("d/2.cls", b"cat")), "bad_labels", "int, str"),
    "long label": (shard(TWO[0], ("d/1.cls", b"a" * 2000)), "bad_labels", "2000 bytes"),
    "label no text": (shard(TWO[0], ("d/1.cls", b"\xff")), "bad_labels", "UTF-8"),
    "deep json": (shard(TWO[0], ("d/1.json", b'{"y":' * 100_000 + b"}" * 100_000)), "bad_format", "nested"),
    "bad image": (shard(("1.png", png(1)[:41] + bytes(4) + png(1)[45:])), "image_rejected", "1.png"),
    "image bomb": (
        shard(("1.png", png(1)[:16] + b"\0\1\0\0" * 2 + png(1)[24:])),
        "image_rejected",
        "1.png",
    ),
}


@pytest.mark.parametrize("payload, code, words", BAD.values(), ids=BAD.keys())
def test_each_bad_shard_gets_its_reason(payload, code, words):
    error = rejection(payload)
    assert error.code == code, error
    assert words in error.text


def test_two_tasks_are_none():
    members = [
        (f"{i}.{kind}", data) for i in "12" for kind, data in (("npy", ROW), ("json", b'{"task": %s}' % i.encode()))
    ]
    assert rejection(shard(*members), with_task=True).code == "bad_task"
    assert read(shard(*members)).task is None


def test_samples_are_counted_as_they_come():
    assert rejection(shard(*TWO), Limits(samples=1)).code == "too_many_samples"


@given(
    st.lists(st.tuples(st.integers(0, 9999), st.binary(min_size=1, max_size=12)), max_size=4),
    st.integers(0, 10_240),
    st.sampled_from([shard(*TWO), shard(("1.png", png(3)), ("1.json", b'{"y": 1}')), pax(b"16 path=abc.npy\n")]),
)
def test_any_damage_gives_a_batch_or_a_rejection(damage, cut, payload):
    damaged = bytearray(payload[: max(1, len(payload) - cut)])
    for at, replacement in damage:
        start = at % len(damaged)
        damaged[start : start + len(replacement)] = replacement
    try:
        assert len(read(bytes(damaged), with_task=True).x) >= 1
    except BatchRejected as error:
        assert str(error).isprintable()


@given(st.binary(max_size=2000))
def test_any_bytes_give_a_batch_or_a_rejection(payload):
    for form in ("tar", "images"):
        with pytest.raises(BatchRejected):
            decode(payload, form=form)
