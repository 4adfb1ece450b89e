"""Every bad file gets its reason, the next good one is learned, and the watched folder stays as it was."""

import io
import os
import struct
import tarfile
import time
import zipfile
import zlib

import numpy as np
import pytest
from daemon_process import DaemonProcess, tree_of, until
from digits import PIXELS, draw

GOOD = 16  # rows


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """One that has learned a task; each test drops its own files into its one folder."""
    with DaemonProcess(tmp_path_factory.mktemp("bad")) as daemon:
        for turn in range(4):
            daemon.drop(f"first/{turn}", **draw(0, turn))
        daemon.start().wait()
        assert daemon.row("first/3")["state"] == "committed"
        daemon.seeds = iter(range(1000, 2000))
        yield daemon


def npz(**arrays):
    target = io.BytesIO()
    np.savez(target, **arrays)
    return target.getvalue()


def claiming(shape):
    """An .npz whose x says that it is of this shape, and holds 80 bytes."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    header = text.ljust(117) + "\n"
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(80))
    return target.getvalue()


def with_nan():
    batch = draw(0, 0, rows=GOOD)
    batch["x"][3, 7] = np.nan
    return npz(**batch)


ROWS = np.ones((GOOD, PIXELS), np.float32)
BAD_BYTES = {
    "empty": (b"", "truncated: 0 bytes"),
    "truncated": (npz(**draw(0, 0))[:4000], "truncated: 4000 bytes, the end of the zip is missing"),
    "not-a-zip": (b"x,y\n1,2\n" * 100, "bad_format: not a zip"),
    "pickled": (npz(x=np.array([{"a": 1}, None], dtype=object)), "forbidden_pickle: x"),
    "claims-32-gib": (claiming((1 << 27, 64)), "bad_shape: x: header claims 34359738368 bytes"),
    "wrong-width": (npz(x=ROWS[:, :-1], y=np.zeros(GOOD, int)), "schema_mismatch: rows of shape (63,) came"),
    "nan": (with_nan(), "non_finite: x: 1 of 1024 values are NaN or infinite, the first at (3, 7)"),
    "label-range": (npz(x=ROWS, y=np.full(GOOD, 100)), "bad_labels: label 100 is out of range"),
    "label-count": (npz(x=ROWS, y=np.zeros(GOOD - 1, int)), "bad_labels: y: shape (15,), expected (16,)"),
}


def good_after(daemon, name):
    daemon.drop(f"{name}/good", **draw(0, next(daemon.seeds)))
    return f"{name}/good"


def check(daemon, name, reason, file="bad.npz"):
    """The file NAME/FILE is refused for `reason`, and a good one beside it is learned."""
    good = good_after(daemon, name)
    before = tree_of(daemon.watch)
    daemon.wait()
    rows = {row["name"]: row for row in daemon.listing("batches", "list")}
    assert rows[f"{name}/{file}"]["state"] == "quarantined"
    assert rows[f"{name}/{file}"]["reason"].startswith(reason)
    assert "\n" not in rows[f"{name}/{file}"]["reason"]
    assert rows[f"{good}.npz"]["state"] == "committed"
    assert tree_of(daemon.watch) == before


def place(daemon, name, file="bad.npz"):
    path = daemon.watch / name / file
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.parametrize("name", BAD_BYTES)
def test_a_bad_file_gets_its_reason_and_the_next_is_learned(daemon, name):
    payload, reason = BAD_BYTES[name]
    place(daemon, name).write_bytes(payload)
    check(daemon, name, reason)


def npy(array):
    target = io.BytesIO()
    np.save(target, array, allow_pickle=True)
    return target.getvalue()


def tar_of_a_link():
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        link = tarfile.TarInfo("1.npy")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/shadow"
        archive.addfile(link)
    return target.getvalue()


OTHER_FORMATS = {
    "objects": ("bad.npy", npy(np.array([[{}]])), "forbidden_pickle: x"),
    "cut-array": ("bad.npy", npy(ROWS)[:3000], "truncated: x: expected 4096 bytes after the header, got 2872"),
    "junk-after": ("bad.npy", npy(ROWS) + b"junk", "trailing_bytes: x: 4 bytes"),
    "words": ("bad.csv", b"a,b\n1,two\n", "bad_dtype: line 2, column 'b': 'two', expected a number"),
    "not-a-number": ("bad.json", b'{"x": [[NaN]]}', "non_finite: NaN"),
    "deep": (
        "bad.jsonl",
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        "bad_format: line 1: nested too deeply",
    ),
    "link-in-a-tar": ("bad.tar", tar_of_a_link(), "not_regular: 1.npy: symlink"),
    "no-table": ("bad.parquet", b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1", "bad_format: damaged Parquet"),
    "no-stream": ("bad.arrow", b"ARROW1\0\0" + bytes(100) + b"ARROW1", "bad_format: damaged Arrow"),
    "unknown": ("bad.xyz", b"?", "unsupported_format: "),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_a_bad_file_of_another_format_gets_its_reason(daemon, name):
    file, payload, reason = OTHER_FORMATS[name]
    place(daemon, name, file).write_bytes(payload)
    check(daemon, name, reason, file)


def test_an_image_of_too_many_pixels_is_refused_by_its_header(daemon):
    header = b"IHDR" + struct.pack(">2L5B", 65_500, 65_500, 8, 0, 0, 0, 0)
    chunks = struct.pack(">L", 13) + header + struct.pack(">L", zlib.crc32(header)) + b"\0\0\0\0IEND\xaeB`\x82"
    place(daemon, "bomb", "images/a/1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    check(daemon, "bomb", "image_too_large: a/1.png", "images")


def test_a_symlink_is_not_followed(daemon, tmp_path):
    target = tmp_path / "elsewhere.npz"
    target.write_bytes(npz(**draw(0, 0)))
    place(daemon, "symlink").symlink_to(target)
    check(daemon, "symlink", "not_regular: symlink")


def test_a_fifo_is_not_opened(daemon):
    os.mkfifo(place(daemon, "fifo"))
    check(daemon, "fifo", "not_regular: FIFO")


def test_a_file_that_still_grows_is_taken_only_once_it_is_complete(daemon):
    payload = npz(**draw(0, next(daemon.seeds)))
    path = daemon.watch / "growing.npz"
    with path.open("wb") as file:
        file.write(payload[:1000])
        file.flush()
        good = good_after(daemon, "growing")
        # A second is longer than `incomplete_seconds`: as long as someone writes, it is waited for.
        until(lambda: time.time() - path.stat().st_mtime > 1)
        until(lambda: (row := daemon.row(good)) and row["state"] == "committed")
        assert daemon.row("growing") is None
        assert daemon.client.status()["sources"][0]["pending"] == 1
        file.write(payload[1000:])
    before = tree_of(daemon.watch)
    daemon.wait()
    assert [row["state"] for row in daemon.client.batches() if row["name"] == "growing.npz"] == ["committed"]
    assert tree_of(daemon.watch) == before


def test_the_daemon_lives_and_knows_one_task_after_all_of_that(daemon):
    assert len(daemon.client.tasks()) == 1
    assert "Traceback" not in daemon.log.read_text()
