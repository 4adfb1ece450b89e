"""A watched folder: every finished file once, in order, and nothing in it is touched."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
from folders import NEVER, await_tick, npz, png, put, take, wait_for
from structlog.testing import capture_logs

from streams import directory
from streams.batch import Arrival, Refusal
from streams.directory import DirectorySettings
from streams.formats import form_of_name
from streams.tree import walk
from streams.watch import FolderWatch


def tree_hash(root):
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        seen = path.lstat()
        digest.update(f"{path} {seen.st_mode} {seen.st_ino} {seen.st_mtime_ns} {seen.st_ctime_ns}".encode())
        if path.is_file() and not path.is_symlink():
            digest.update(path.read_bytes())
    return digest.hexdigest()


# --- what comes -------------------------------------------------------------------------------------------


def test_a_file_arrives_as_it_is(watched, open_source):
    put(watched / "a.npz", npz(1))
    (item,) = take(open_source())
    assert isinstance(item, Arrival)
    assert (item.source, item.name, item.key, item.form) == ("in", "a.npz", "a.npz", "npz")
    assert item.payload == npz(1)
    assert item.sha256 == hashlib.sha256(npz(1)).hexdigest()


def test_folders_are_watched_at_any_depth(watched, open_source):
    put(watched / "deep" / "er" / "x.parquet" / "b.NPZ", npz(2))
    await_tick()
    put(watched / "deep" / "a.npz", npz(1))
    assert [item.name for item in take(open_source())] == ["deep/er/x.parquet/b.NPZ", "deep/a.npz"]


def test_the_older_file_comes_first_and_names_decide_in_natural_order(watched, open_source):
    for name in ("b10.npz", "b9.npz", "b1.npz"):
        os.utime(put(watched / name, npz()), ns=(5, 5))
    os.utime(put(watched / "z.npz", npz()), ns=(4, 4))
    put(watched / "a.npz", npz())
    names = [item.name for item in take(open_source())]
    assert names == ["z.npz", "b1.npz", "b9.npz", "b10.npz", "a.npz"]


def test_in_a_pass_that_waits_for_room_no_later_file_comes_before_an_earlier_one(watched, open_source, monkeypatch):
    source = open_source(DirectorySettings(settle_seconds=5))
    for name in ("first.npz", "marked.npz", "last.npz"):
        put(watched / name, npz())
        await_tick()
    put(watched / "marked.npz.done", b"")
    ahead, monotonic, wall = [0.0], time.monotonic(), time.time()
    clock = SimpleNamespace(
        monotonic=lambda: monotonic + ahead[0], clock_gettime=lambda clock: wall + ahead[0], CLOCK_REALTIME=0
    )
    monkeypatch.setattr("streams.sightings.time", clock)
    arrivals = source.iter_arrivals()
    assert next(arrivals).name == "marked.npz"
    ahead[0] = 10.0
    assert list(arrivals) == []
    assert [item.name for item in source.iter_arrivals()] == ["first.npz", "marked.npz", "last.npz"]


def test_the_suffix_says_the_form_and_nothing_is_decoded(watched, open_source):
    forms = {"a.csv": "csv", "b.jsonl": "jsonl", "c.npy": "npy", "d.npz": "npz", "e.parquet": "parquet", "f.tar": "tar"}
    for name in forms:
        put(watched / name, b"junk")
    assert {item.name: item.form for item in take(open_source())} == forms


def test_a_file_of_another_kind_is_refused_and_does_not_stop_the_next_one(watched, open_source):
    put(watched / "1.pdf", b"%PDF")
    put(watched / "2.npz", npz())
    foreign, good = take(open_source())
    assert isinstance(foreign, Refusal)
    told = re.findall(r"\.\w+", foreign.reason)
    assert ".npz" in told
    assert all(form_of_name(f"a{suffix}") for suffix in told)
    assert good.name == "2.npz"


def test_temporary_names_are_not_looked_at(watched, open_source):
    for name in (
        ".a.npz",
        "a.npz.tmp",
        "a.part",
        "a.partial",
        "a.filepart",
        "a.npz~",
        ".hidden/a.npz",
        "lost+found/a.npz",
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
    monkeypatch.setattr("streams.load.read_file", lambda *args: opened.append(args))
    started = time.thread_time()
    assert take(source) == []
    assert time.thread_time() - started < 1
    assert opened == []


def test_one_payload_is_in_memory_at_a_time(watched, open_source):
    for i in range(3):
        put(watched / f"{i}.npz", npz(i))
    passing = open_source().iter_arrivals()
    assert next(passing).name == "0.npz"
    await_tick()
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
    await_tick()
    path.write_bytes(npz(2))
    with capture_logs() as logs:
        (second,) = take(source)
    assert second.key == first.key
    assert second.position != first.position
    assert second.sha256 != first.sha256
    assert [entry["event"] for entry in logs] == ["source_changed"]
    await_tick()
    path.chmod(0o600)  # equal bytes under a new position: the ledger's business
    assert [item.sha256 for item in take(source)] == [second.sha256]


def test_what_is_gone_is_forgotten_and_what_is_there_or_only_out_of_sight_is_not(watched, open_source, monkeypatch):
    monkeypatch.setattr(directory, "_FORGET_FROM", 1)
    for name in "abcd":
        put(watched / f"{name}.npz", npz())
    source = open_source()
    items = take(source)
    for item in items[:3]:
        (watched / item.name).unlink()
    hidden = watched.rename(watched.parent / "elsewhere")
    assert take(source) == []  # missing: nothing is forgotten
    hidden.rename(watched)
    assert take(source) == []
    assert source._cursors == {items[3].key: items[3].position}
    assert take(source) == []


# --- the folder itself and the hints ----------------------------------------------------------------------


def test_a_missing_folder_is_said_once_and_resumes_alone(watched, open_source):
    source = open_source(DirectorySettings(settle_seconds=NEVER))
    assert take(source) == []
    with capture_logs() as logs:
        watched.rename(watched.with_name("away"))
        assert take(source) == take(source) == []
        problem = source.problem()
        watched.mkdir()
        assert take(source) == []
    assert [entry["event"] for entry in logs] == ["source_missing", "source_back"]
    assert problem == f"{watched}: No such file or directory"
    assert source.problem() is None
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
        list(walk(str(tmp_path / "none")))


def test_a_folder_that_comes_back_gives_nothing_twice(watched, open_source):
    put(watched / "a.npz", npz())
    source = open_source()
    assert len(take(source)) == 1
    watched.rename(watched.with_name("away"))
    assert take(source) == []
    watched.with_name("away").rename(watched)
    assert take(source) == []
    assert source.problem() is None


def test_a_folder_that_is_unmounted_is_missing_until_it_is_back(tmp_path):
    """In a namespace of its own, where anybody may mount."""
    run = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", UNMOUNT, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    if "unshare" in run.stderr:
        pytest.skip(f"no namespace to mount in: {run.stderr.strip()}")
    assert run.returncode == 0, run.stderr


UNMOUNT = """
import subprocess, sys
from pathlib import Path
from types import SimpleNamespace
from folders import AT_ONCE, npz, put, take
from streams import directory
from streams.directory import DirectorySource

root, away = Path(sys.argv[1], "in"), Path(sys.argv[1], "away")
for folder in (root, away):
    folder.mkdir()
mount = lambda *args: subprocess.run(["mount", *args], check=True)
mount("-t", "tmpfs", "none", str(away))
put(away / "a.npz", npz())
mount("--bind", str(away), str(root))
source = DirectorySource(root, name="in", cursors={}, settings=AT_ONCE)
assert [item.name for item in take(source)] == ["a.npz"]
subprocess.run(["umount", str(root)], check=True)
assert take(source) == []
assert source.problem() == f"{root}: empty, and on another file system than before; is it mounted?", source.problem()
mount("--bind", str(away), str(root))
put(away / "b.npz", npz())
assert [item.name for item in take(source)] == ["b.npz"]
assert source.problem() is None
source.close()
"""


def test_more_files_at_once_than_the_system_has_hints_for(watched, open_source):
    """20,000 of them; its queue holds 16,384."""
    source = open_source()
    assert take(source) == []
    expected = [f"{i // 1000}/{i}.npz" for i in range(20_000)]
    for folder in range(20):
        (watched / str(folder)).mkdir()
    for name in expected:
        (watched / name).write_bytes(name.encode())
    tracemalloc.start()
    came = []
    for item in source.iter_arrivals():
        source.acknowledge([item])
        came.append((watched / item.name).stat().st_mtime_ns)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(came) == len(expected)
    assert came == sorted(came)
    assert peak < 64 << 20
    assert take(source) == []
    assert source.pending() == 0


def test_known_files_of_many_image_folders_are_not_held_in_memory(watched, open_source):
    for batch in range(30):
        for image in range(100):
            put(watched / f"{batch}" / "cat" / f"{image}.png", b"")
    source = open_source()
    assert len(take(source)) == 30
    tracemalloc.start()
    assert take(source) == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_poke_ends_a_wait_that_hints_may_not(watched, open_source):
    watch = FolderWatch(watched)
    waiting = threading.Thread(target=watch.wait, args=(60.0,), kwargs={"pause": 60.0})
    waiting.start()
    watch.poke()
    waiting.join(20)
    assert not waiting.is_alive()
