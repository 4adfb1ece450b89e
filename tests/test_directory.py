"""A watched folder: every finished file once, none before it is finished, and nothing in it is touched."""

import hashlib
import io
import os
import shutil
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from structlog.testing import capture_logs

from streams.batch import Arrival, Refusal
from streams.directory import DirectorySettings, DirectorySource
from streams.formats import Limits, decode
from streams.tree import walk

AT_ONCE = DirectorySettings(settle_seconds=0, incomplete_seconds=0)
NEVER = 1e6


def npz(value=0, **members):
    target = io.BytesIO()
    np.savez(target, x=np.full((4, 3), value, np.float32), **({"y": np.arange(4)} | members))
    return target.getvalue()


def png(value=0):
    target = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(target, "PNG")
    return target.getvalue()


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def take(source):
    """One pass in which everything is acknowledged."""
    items = []
    for item in source.iter_arrivals():
        source.acknowledge(item)
        items.append(item)
    return items


def wait_for(source, count=1, timeout=20.0):
    """Passes as the daemon makes them, until `count` items came."""
    deadline = time.monotonic() + timeout
    items = take(source)
    while len(items) < count:
        assert time.monotonic() < deadline, f"only {items} in {timeout} s"
        source.wait(0.05)
        items += take(source)
    return items


def tree_hash(root):
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        seen = path.lstat()
        digest.update(f"{path} {seen.st_mode} {seen.st_ino} {seen.st_mtime_ns} {seen.st_ctime_ns}".encode())
        if path.is_file() and not path.is_symlink():
            digest.update(path.read_bytes())
    return digest.hexdigest()


@pytest.fixture
def watched(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def open_source(watched):
    sources = []

    def make(settings=AT_ONCE, cursors=None, root=watched):
        sources.append(DirectorySource(root, name="in", cursors=cursors or {}, settings=settings))
        return sources[-1]

    yield make
    for source in sources:
        source.close()


# --- what comes -------------------------------------------------------------------------------------------


def test_a_file_arrives_as_it_is(watched, open_source):
    put(watched / "a.npz", npz(1))
    (item,) = take(open_source())
    assert isinstance(item, Arrival)
    assert (item.source, item.name, item.key, item.samples, item.labelled) == (
        "in",
        "a.npz",
        "a.npz",
        4,
        True,
    )
    assert item.payload == npz(1)
    assert item.sha256 == hashlib.sha256(npz(1)).hexdigest()


def test_folders_are_watched_at_any_depth(watched, open_source):
    put(watched / "deep" / "er" / "x.npz" / "b.NPZ", npz(2))
    put(watched / "deep" / "a.npz", npz(1))
    assert [item.name for item in take(open_source())] == ["deep/er/x.npz/b.NPZ", "deep/a.npz"]


def test_the_older_file_comes_first_and_names_decide_in_natural_order(watched, open_source):
    for name in ("b10.npz", "b9.npz", "b1.npz"):
        os.utime(put(watched / name, npz()), ns=(5, 5))
    os.utime(put(watched / "z.npz", npz()), ns=(4, 4))
    put(watched / "a.npz", npz())
    names = [item.name for item in take(open_source())]
    assert names == ["z.npz", "b1.npz", "b9.npz", "b10.npz", "a.npz"]


def test_a_bad_file_does_not_stop_the_next_one(watched, open_source):
    put(watched / "1.npz", b"junk")
    put(watched / "2.npz", npz())
    put(watched / "3.csv", b"1,2")
    bad, good, foreign = take(open_source())
    assert isinstance(bad, Refusal)
    assert bad.reason.startswith("bad_format: not a zip")
    assert bad.sha256 == hashlib.sha256(b"junk").hexdigest()
    assert good.name == "2.npz"
    assert foreign.code == "unsupported_format"
    assert foreign.sha256 is None


def test_temporary_names_are_not_looked_at(watched, open_source):
    for name in (
        ".a.npz",
        "a.npz.tmp",
        "a.part",
        "a.partial",
        "a.filepart",
        "a.npz~",
        ".hidden/a.npz",
        "d.tmp/a.npz",
    ):
        put(watched / name, npz())
    source = open_source()
    assert take(source) == []
    assert source.pending() == 0


def test_nothing_that_is_watched_is_changed(watched, open_source):
    put(watched / "a.npz", npz())
    put(watched / "bad.npz", b"junk")
    put(watched / "images" / "cat" / "1.png", png())
    (watched / "link.npz").symlink_to("a.npz")
    before = tree_hash(watched)
    assert len(take(open_source())) == 4
    assert tree_hash(watched) == before


def test_thousands_of_known_files_are_not_read_again(watched, open_source, monkeypatch):
    for i in range(2000):
        put(watched / f"{i}.npz", npz(i))
    source = open_source()
    assert len(take(source)) == 2000
    opened = []
    monkeypatch.setattr("streams.directory.read_file", lambda *args: opened.append(args))
    started = time.thread_time()
    assert take(source) == []
    assert time.thread_time() - started < 1
    assert opened == []


def test_one_payload_is_in_memory_at_a_time(watched, open_source):
    for i in range(3):
        put(watched / f"{i}.npz", npz(i))
    passing = open_source().iter_arrivals()
    assert next(passing).name == "0.npz"
    put(watched / "1.npz", npz(7))  # changed after the look: it waits for the next pass
    assert [item.name for item in passing] == ["2.npz"]


# --- cursors ----------------------------------------------------------------------------------------------


def test_a_replayed_folder_gives_nothing(watched, open_source):
    put(watched / "a.npz", npz())
    put(watched / "bad.npz", b"junk")
    put(watched / "images" / "cat" / "1.png", png())
    source = open_source()
    items = take(source)
    assert len(items) == 3
    assert take(source) == []
    assert take(open_source(cursors={item.key: item.position for item in items})) == []


def test_what_is_not_acknowledged_comes_again(watched, open_source):
    put(watched / "a.npz", npz())
    source = open_source()
    assert list(source.iter_arrivals()) == list(source.iter_arrivals())
    assert len(take(source)) == 1


def test_a_file_that_changes_later_is_new(watched, open_source):
    path = put(watched / "a.npz", npz(1))
    source = open_source()
    (first,) = take(source)
    path.write_bytes(npz(2))
    with capture_logs() as logs:
        (second,) = take(source)
    assert second.key == first.key
    assert second.position != first.position
    assert second.sha256 != first.sha256
    assert [entry["event"] for entry in logs] == ["source_changed"]
    path.chmod(0o600)  # equal bytes under a new position: the ledger's business
    assert [item.sha256 for item in take(source)] == [second.sha256]


# --- finished or not --------------------------------------------------------------------------------------


def test_a_file_waits_until_it_is_quiet(watched, open_source):
    source = open_source(DirectorySettings(settle_seconds=0.3))
    path = put(watched / "a.npz", npz())
    written = time.time()
    assert take(source) == []
    assert source.pending() == 1
    (item,) = wait_for(source)
    assert item.name == path.name
    assert time.time() - written >= 0.29
    assert source.pending() == 0


def test_a_date_in_the_future_is_settled_by_our_own_clock(watched, open_source):
    os.utime(put(watched / "a.npz", npz()), (4e9, 4e9))
    source = open_source(DirectorySettings(settle_seconds=0.2))
    assert take(source) == []
    assert len(wait_for(source)) == 1


def test_an_old_date_does_not_hide_that_a_file_is_fresh(watched, open_source):
    os.utime(put(watched / "a.npz", npz()), (1, 1))
    source = open_source(DirectorySettings(settle_seconds=NEVER))
    assert take(source) == []
    assert source.pending() == 1


@pytest.mark.parametrize("origin", ["in/.a.npz.tmp", "elsewhere/a.npz"])
def test_a_file_renamed_into_place_needs_no_quiet_time(tmp_path, watched, open_source, origin):
    source = open_source(DirectorySettings(settle_seconds=NEVER))
    assert take(source) == []
    put(tmp_path / origin, npz()).rename(watched / "a.npz")
    (item,) = wait_for(source)
    assert item.name == "a.npz"


def test_an_image_folder_renamed_into_place_needs_no_quiet_time(tmp_path, watched, open_source):
    source = open_source(DirectorySettings(settle_seconds=NEVER))
    assert take(source) == []
    put(tmp_path / "elsewhere" / "batch" / "cat" / "1.png", png())
    (tmp_path / "elsewhere" / "batch").rename(watched / "batch")
    (item,) = wait_for(source)
    assert item.name == "batch"


def test_a_file_that_is_open_for_writing_waits_however_quiet(watched, open_source):
    source = open_source()
    with (watched / "a.npz").open("wb") as file:
        file.write(npz())
        file.flush()
        assert take(source) == []
        assert source.pending() == 1
    assert [item.name for item in take(source)] == ["a.npz"]


def test_a_writer_who_comes_while_we_look_disturbs_no_one(watched, open_source):
    path = put(watched / "a.npz", npz())
    source = open_source()
    done = threading.Event()

    def open_and_close():
        for _ in range(300):
            path.open("r+b").close()
        done.set()

    writer = threading.Thread(target=open_and_close)
    writer.start()
    while not done.is_set():  # the kernel tells the holder of a lease with a signal
        list(source.iter_arrivals())
    writer.join()
    assert len(take(source)) == 1


def test_a_growing_file_arrives_once_when_it_is_whole(watched, open_source):
    source = open_source(DirectorySettings(settle_seconds=0, incomplete_seconds=NEVER))
    data = npz(3)
    for start in range(0, len(data), 100):
        with (watched / "a.npz").open("ab") as file:
            file.write(data[start : start + 100])
        if start + 100 < len(data):
            assert take(source) == []
            assert source.pending() == 1
    assert [item.payload for item in take(source)] == [data]
    assert take(source) == []


@pytest.mark.parametrize("part", [b"", npz(5)[:300]], ids=["empty", "half"])
def test_a_truncated_file_is_refused_after_a_while_and_welcome_when_completed(watched, open_source, part):
    path = put(watched / "a.npz", part)
    source = open_source(DirectorySettings(settle_seconds=0, incomplete_seconds=0.3))
    assert take(source) == []
    assert source.pending() == 1
    (refusal,) = wait_for(source)
    assert refusal.code == "truncated"
    assert take(source) == []
    path.write_bytes(npz(5))
    (item,) = wait_for(source)
    assert item.payload == npz(5)


def test_a_file_that_goes_away_is_forgotten(watched, open_source):
    path = put(watched / "a.npz", npz())
    source = open_source(DirectorySettings(settle_seconds=NEVER))
    assert take(source) == []
    path.unlink()
    assert take(source) == []
    assert source.pending() == 0


# --- what is no file --------------------------------------------------------------------------------------


def test_links_and_special_files_are_refused_unopened(tmp_path, watched, open_source):
    secret = put(tmp_path / "secret.npz", npz())
    (watched / "link.npz").symlink_to(secret)
    (watched / "loop.npz").symlink_to("loop.npz")
    (watched / "folder").symlink_to(tmp_path)
    os.mkfifo(watched / "fifo.npz")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(watched / "s.npz"))
        items = take(open_source())
    reasons = {item.name: item.reason for item in items}
    assert reasons.keys() == {"link.npz", "loop.npz", "folder", "fifo.npz", "s.npz"}
    assert all(reasons[name].startswith("not_regular: symlink") for name in ("link.npz", "loop.npz", "folder"))
    assert reasons["fifo.npz"].startswith("not_regular: FIFO")
    assert reasons["s.npz"].startswith("not_regular: socket")


def test_a_file_replaced_by_a_trap_after_the_look_is_not_opened(tmp_path, watched, open_source):
    put(watched / "1.npz", npz(1))
    for name in ("2.npz", "3.npz", "4.npz"):
        put(watched / name, npz(2))
    passing = open_source().iter_arrivals()
    assert next(passing).name == "1.npz"
    for name in ("2.npz", "3.npz", "4.npz"):
        (watched / name).unlink()
    (watched / "2.npz").symlink_to(put(tmp_path / "secret.npz", npz(3)))
    os.mkfifo(watched / "3.npz")
    assert list(passing) == []


def test_a_file_that_may_not_be_read_is_refused(open_source):
    root = Path(f"/tmp/supsupd-test-{os.getpid()}")  # tmp_path is closed to other users
    root.mkdir(mode=0o755)
    put(root / "a.npz", npz()).chmod(0)
    put(root / "folder" / "b.npz", npz()).parent.chmod(0)
    source = open_source(root=root)
    owner = os.geteuid()
    try:
        if owner == 0:
            os.seteuid(65534)  # root may read everything
        items = take(source)
    finally:
        os.seteuid(owner)
        (root / "folder").chmod(0o700)
        shutil.rmtree(root)
    assert {(item.name, item.code) for item in items} == {("a.npz", "unreadable"), ("folder", "unreadable")}
    assert all("EACCES" in item.reason for item in items)


def test_a_file_over_the_cap_is_refused_unread(watched, open_source):
    with (watched / "a.npz").open("wb") as file:
        file.truncate(1 << 40)
    (item,) = take(open_source())
    assert item.reason.startswith("too_large: 1099511627776 bytes")


@pytest.mark.parametrize(
    "raw, name",
    [
        (b"line\nbreak.npz", "line\\nbreak.npz"),
        (b"\x1b[31mred.npz", "\\x1b[31mred.npz"),
        (b"caf\xe9.npz", "caf\\udce9.npz"),
        (b"\xe2\x80\xaertl.npz", "\\u202ertl.npz"),
        (b"-rf.npz", "-rf.npz"),
        ("schön 1.npz".encode(), "schön 1.npz"),
        (b"a" * 251 + b".npz", "a" * 251 + ".npz"),
    ],
)
def test_every_name_is_printable(watched, open_source, raw, name):
    put(watched / os.fsdecode(raw), npz())
    (item,) = take(open_source())
    assert item.name == item.key == name
    assert item.name.isprintable()


def test_different_names_stay_different(watched, open_source):
    for raw in (b"\xe9.npz", b"\\udce9.npz", b"\\\\udce9.npz"):
        put(watched / os.fsdecode(raw), npz())
    source = open_source()
    assert len({item.key for item in take(source)}) == 3
    assert take(source) == []


# --- image folders ----------------------------------------------------------------------------------------


def test_a_folder_of_class_folders_is_one_batch(watched, open_source):
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        put(watched / "monday" / name, png(len(name)))
    put(watched / "monday" / "cat" / "Thumbs.db", b"")
    put(watched / "monday" / "more.npz", npz())
    items = {item.name: item for item in take(open_source())}
    assert items.keys() == {"monday", "monday/cat/Thumbs.db", "monday/more.npz"}
    batch = decode(items["monday"].payload)
    assert batch.y.tolist() == ["cat", "cat", "dog"]
    assert items["monday"].samples == 3
    assert items["monday/cat/Thumbs.db"].code == "unsupported_format"


def test_the_watched_folder_itself_can_hold_the_classes(watched, open_source):
    put(watched / "cat" / "1.png", png())
    put(watched / "loose.png", png())
    items = {item.name: item for item in take(open_source())}
    assert isinstance(items["."], Arrival)
    assert items["loose.png"].code == "image_rejected"


def test_one_more_image_makes_a_new_batch(watched, open_source):
    put(watched / "b" / "cat" / "1.png", png())
    source = open_source()
    (first,) = take(source)
    put(watched / "b" / "dog" / "1.png", png())
    (second,) = take(source)
    assert first.position != second.position
    assert (first.samples, second.samples) == (1, 2)


def test_one_bad_image_refuses_its_batch_and_a_half_one_may_still_be_completed(watched, open_source):
    put(watched / "b" / "cat" / "1.png", png())
    path = put(watched / "b" / "cat" / "2.png", png()[:-8])
    source = open_source(DirectorySettings(settle_seconds=0, incomplete_seconds=NEVER))
    assert take(source) == []
    path.write_bytes(b"no image")
    (refusal,) = take(source)
    assert refusal.reason.startswith("image_rejected: cat/2.png")


def test_links_in_an_image_folder_are_not_followed(tmp_path, watched, open_source):
    put(tmp_path / "secret" / "1.png", png())
    put(watched / "b" / "cat" / "1.png", png())
    (watched / "b" / "cat" / "2.png").symlink_to(tmp_path / "secret" / "1.png")
    (watched / "b" / "dog").symlink_to(tmp_path / "secret")
    items = {item.name: item for item in take(open_source())}
    assert items["b"].samples == 1
    assert items["b/cat/2.png"].code == items["b/dog"].code == "not_regular"


def test_the_images_of_a_batch_share_one_cap(watched, open_source):
    for i in range(3):
        put(watched / "b" / "cat" / f"{i}.png", png(i))
    settings = DirectorySettings(settle_seconds=0, max_batch_bytes=2 * len(png()), limits=Limits())
    assert [item.code for item in take(open_source(settings))] == ["too_large"]


# --- the folder itself and the hints ----------------------------------------------------------------------


def test_a_missing_folder_is_said_once_and_resumes_alone(watched, open_source):
    source = open_source(DirectorySettings(settle_seconds=NEVER))
    assert take(source) == []
    with capture_logs() as logs:
        watched.rename(watched.with_name("away"))
        assert take(source) == take(source) == []
        watched.mkdir()
        assert take(source) == []
    assert [entry["event"] for entry in logs] == ["source_missing", "source_back"]
    put(watched / ".a", npz()).rename(watched / "a.npz")  # only a hint makes it arrive
    assert [item.name for item in wait_for(source)] == ["a.npz"]


def test_a_folder_replaced_between_two_passes_is_watched_again(watched, open_source):
    source = open_source(DirectorySettings(settle_seconds=NEVER))
    assert take(source) == []
    shutil.rmtree(watched)
    watched.mkdir()
    path = put(watched / "a.npz", npz())
    deadline = time.monotonic() + 20
    while not take(source):  # a pass may come before the hint that the old folder has gone
        assert time.monotonic() < deadline
        path.rename(watched / ".a").rename(path)
        source.wait(0.05)


def test_a_watched_link_to_a_folder_works_with_hints(tmp_path, watched, open_source):
    link = tmp_path / "link"
    link.symlink_to(watched)
    (watched / "sub").mkdir()
    source = open_source(DirectorySettings(settle_seconds=NEVER), root=link)
    assert take(source) == []
    put(watched / "sub" / ".a", npz()).rename(watched / "sub" / "a.npz")
    assert [item.name for item in wait_for(source)] == ["sub/a.npz"]


def test_a_new_file_ends_the_wait_and_our_own_reading_does_not(watched, open_source):
    source = open_source()
    assert take(source) == []
    waiting = threading.Thread(target=source.wait, args=(60.0,))
    waiting.start()
    put(watched / "a.npz", npz())
    waiting.join(20)
    assert not waiting.is_alive()
    started = time.monotonic()
    while time.monotonic() - started < 20:  # the hints of the writing itself run dry
        take(source)
        before = time.monotonic()
        source.wait(0.5)
        if time.monotonic() - before >= 0.45:
            return
    pytest.fail("reading a file wakes the reader for ever")


def test_a_walk_of_a_missing_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        list(walk(tmp_path / "none"))


# --- which task a batch says it belongs to ----------------------------------------------------------------


def told(items):
    return {item.name: item.task if isinstance(item, Arrival) else item.code for item in items}


def test_nobody_looks_for_a_task_unless_asked(watched, open_source):
    put(watched / "line3" / "a.npz", npz(1, task="x"))
    (item,) = take(open_source())
    assert (item.task, item.payload) == (None, npz(1, task="x"))


@pytest.mark.parametrize("rule", ["labelled", "all"])
def test_a_task_comes_with_the_file_or_else_by_its_folder(watched, open_source, rule):
    put(watched / "line3" / "a.npz", npz(1))
    put(watched / "line3" / "b.npz", npz(2, task="other"))
    put(watched / "c.npz", npz(3, task=7))
    put(watched / "d.npz", npz(4))
    put(watched / "deep" / "er" / "e.npz", npz(5))
    put(watched / "line3" / "images" / "cat" / "1.png", png())
    put(watched / "bare" / "cat" / "1.png", png(1))
    assert told(take(open_source(replace(AT_ONCE, tasks=rule)))) == {
        "line3/a.npz": "line3",
        "line3/b.npz": "other",
        "c.npz": "7",
        "d.npz": "no_task",
        "deep/er/e.npz": "deep/er",
        "line3/images": "line3",
        "bare": "no_task",
    }


def test_an_unlabelled_batch_must_name_its_task_only_where_all_must(watched, open_source):
    x = np.ones((2, 3))
    for name, members in (("a.npz", {}), ("b/c.npz", {}), ("d.npz", {"task": "t"})):
        target = io.BytesIO()
        np.savez(target, x=x + len(name), **members)
        put(watched / name, target.getvalue())
    found = told(take(open_source(replace(AT_ONCE, tasks="labelled"))))
    assert found == {"a.npz": None, "b/c.npz": None, "d.npz": "t"}
    found = told(take(open_source(replace(AT_ONCE, tasks="all"))))
    assert found == {"a.npz": "no_task", "b/c.npz": "b", "d.npz": "t"}


def test_a_folder_that_names_the_task_is_written_into_the_batch(watched, open_source):
    """So that the samples alone say all of it, and the same ones in two folders are two batches."""
    for folder in "ab":
        put(watched / folder / "1.npz", npz(1))
        put(watched / folder / "2.npz", npz(1))
    items = take(open_source(replace(AT_ONCE, tasks="all")))
    assert len({item.sha256 for item in items}) == 2
    for item in items:
        assert item.sha256 == hashlib.sha256(item.payload).hexdigest()
        batch = decode(item.payload, with_task=True)
        assert batch.task == item.task == item.name[0]
        assert batch.sha256() == decode(npz(1)).sha256()


def test_a_folder_may_be_too_long_for_a_task(watched, open_source):
    put(watched / ("a" * 200) / ("b" * 100) / "1.npz", npz(1))
    (item,) = take(open_source(replace(AT_ONCE, tasks="all")))
    assert item.reason == "bad_task: a folder of 301 characters, at most 255 expected"
