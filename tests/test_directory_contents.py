"""What lies in a watched folder: files that are none, odd names, image folders, pairs of arrays."""

import contextlib
import errno
import hashlib
import os
import re
import socket
import tempfile
from pathlib import Path

import numpy as np
import pytest
from folders import NEVER, await_tick, names, npy, npz, png, put, take, wait_for
from structlog.testing import capture_logs

from streams.batch import Arrival
from streams.directory import DirectorySettings
from streams.formats import decode
from streams.source import SourceUnavailable

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


def test_a_folder_named_like_a_file_of_arrays_is_no_file(watched, open_source):
    put(watched / "x.npz" / "y" / "x.npy", npy(np.ones((2, 2))))
    (item,) = take(open_source())
    assert (item.name, item.reason) == ("x.npz", "not_regular: directory, expected a regular file")


@pytest.fixture
def shut_out():
    """A folder that another user cannot read all of, and that user: root may read everything."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        put(root / "a.npz", npz()).chmod(0)
        inner = put(root / "folder" / "b.npz", npz())
        inner.chmod(0o644)
        inner.parent.chmod(0)
        put(root / "good.npz", npz(1)).chmod(0o644)
        owner = os.geteuid()
        if owner == 0:
            os.seteuid(65534)
        try:
            yield root, lambda: os.seteuid(owner), lambda: os.seteuid(65534 if owner == 0 else owner)
        finally:
            os.seteuid(owner)
            (root / "folder").chmod(0o700)


def test_what_may_not_be_read_is_told_and_tried_again_until_it_may(open_source, shut_out):
    root, become_owner, become_other = shut_out
    source = open_source(root=root)
    with capture_logs() as logs:
        assert names(take(source)) == ["good.npz"]
        assert take(source) == take(source) == []
    assert [entry["event"] for entry in logs] == ["unreadable"]  # once, not in every pass
    assert source.pending() == 0
    expected = "2 cannot be read, the first is {}: EACCES, expected what the daemon may read"
    assert source.problem() in (expected.format("a.npz"), expected.format("folder"))
    become_owner()
    (root / "a.npz").chmod(0o644)
    (root / "folder").chmod(0o755)
    become_other()
    assert sorted(names(take(source))) == ["a.npz", "folder/b.npz"]
    assert source.problem() is None
    assert source.pending() == 0


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
    assert items["monday"].form == "images"
    batch = decode(items["monday"].payload, form="images")
    assert batch.y.tolist() == ["cat", "cat", "dog"]
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
    assert [len(decode(item.payload, form=item.form).x) for item in (first, second)] == [1, 2]


def test_links_in_an_image_folder_are_not_followed(tmp_path, watched, open_source):
    put(tmp_path / "secret" / "1.png", png())
    put(watched / "b" / "cat" / "1.png", png())
    (watched / "b" / "cat" / "2.png").symlink_to(tmp_path / "secret" / "1.png")
    (watched / "b" / "dog").symlink_to(tmp_path / "secret")
    items = {item.name: item for item in take(open_source())}
    assert len(decode(items["b"].payload, form="images").x) == 1
    assert items["b/cat/2.png"].code == items["b/dog"].code == "not_regular"


def test_the_images_of_a_batch_share_one_cap(watched, open_source):
    for i in range(3):
        put(watched / "b" / "cat" / f"{i}.png", png(i))
    settings = DirectorySettings(settle_seconds=0, max_batch_bytes=2 * len(png()))
    assert [item.code for item in take(open_source(settings))] == ["too_large"]


def test_equal_folders_give_equal_bytes(watched, open_source):
    for batch in "ab":
        for name in ("cat/2.png", "cat/10.png", "dog/1.png"):
            put(watched / batch / name, png(len(name)))
    first, second = take(open_source())
    assert first.payload == second.payload
    assert first.sha256 == hashlib.sha256(first.payload).hexdigest()


# --- pairs of arrays --------------------------------------------------------------------------------------


def test_samples_and_labels_in_two_files_are_one_batch(watched, open_source):
    put(watched / "a.x.npy", npy(np.ones((3, 2))))
    put(watched / "a.y.npy", npy(np.arange(3)))
    put(watched / "plain.npy", npy(np.ones((2, 2))))
    pair, plain = sorted(take(open_source()), key=lambda item: item.name)
    assert (pair.name, pair.form) == ("a.x.npy", "npz")
    assert decode(pair.payload).y.tolist() == [0, 1, 2]
    assert pair.sha256 == hashlib.sha256(pair.payload).hexdigest()
    assert (plain.name, plain.form) == ("plain.npy", "npy")


@pytest.mark.parametrize("first, second, code", [("x", "y", "no_labels"), ("y", "x", "no_inputs")])
def test_one_of_two_waits_for_the_other_and_is_refused_without_it(watched, open_source, first, second, code):
    contents = {"x": npy(np.ones((3, 2))), "y": npy(np.arange(3))}
    put(watched / f"a.{first}.npy", contents[first])
    source = open_source(DirectorySettings(settle_seconds=0, incomplete_seconds=NEVER))
    assert take(source) == []
    assert source.pending() == 1
    cursors = {}
    source = open_source(cursors=cursors)
    (refusal,) = take(source)
    assert refusal.reason.startswith(f"{code}: expected a.{second}.npy beside it")
    assert take(source) == []
    put(watched / f"a.{second}.npy", contents[second])
    (pair,) = take(source)
    assert decode(pair.payload).y.tolist() == [0, 1, 2]


def test_a_pair_renamed_into_place_one_after_the_other_needs_no_quiet_time(watched, open_source):
    source = open_source(DirectorySettings(settle_seconds=NEVER, incomplete_seconds=NEVER))
    assert take(source) == []
    put(watched / ".x", npy(np.ones((3, 2)))).rename(watched / "a.x.npy")
    put(watched / ".probe", npz()).rename(watched / "probe.npz")
    assert names(wait_for(source)) == ["probe.npz"]  # so that the hint of the samples came, too
    put(watched / ".y", npy(np.arange(3))).rename(watched / "a.y.npy")
    (pair,) = wait_for(source)
    assert pair.name == "a.x.npy"
    assert not pair.may_grow


def test_new_labels_make_a_new_batch_of_a_pair(watched, open_source):
    put(watched / "a.x.npy", npy(np.ones((3, 2))))
    put(watched / "a.y.npy", npy(np.arange(3)))
    source = open_source()
    (first,) = take(source)
    await_tick()
    put(watched / "a.y.npy", npy(np.arange(3)[::-1].copy()))
    (second,) = take(source)
    assert (second.key, second.position == first.position) == (first.key, False)


def test_a_pair_shares_one_cap(watched, open_source):
    put(watched / "a.x.npy", npy(np.ones((3, 2))))
    put(watched / "a.y.npy", npy(np.arange(3)))
    settings = DirectorySettings(settle_seconds=0, max_batch_bytes=200)
    assert names(take(open_source(settings))) == ["too_large"]


# --- what leads elsewhere, or too far ---------------------------------------------------------------------


def deep(root, folders, name):
    """A file so many folders deep, on a path that no system call takes as a whole."""
    fd = os.open(root, os.O_RDONLY)
    for _ in range(folders):
        with contextlib.suppress(FileExistsError):
            os.mkdir("d" * 250, dir_fd=fd)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    with open(name, "wb", opener=lambda path, flags: os.open(path, flags, 0o644, dir_fd=fd)) as file:
        file.write(npz(1))
    os.close(fd)


def test_files_on_paths_over_those_that_a_system_call_takes_arrive(watched, open_source):
    deep(watched, 18, "one.npz")
    deep(watched, 18, "\n\udce9.npz")
    source = open_source()
    items = take(source)
    assert [item.payload for item in items] == [npz(1), npz(1)]
    assert all(item.form == "npz" and item.name.isprintable() for item in items)
    assert all(len(item.key.encode()) <= 4096 for item in items)
    assert len({item.key for item in items}) == 2
    assert take(source) == []
    assert take(open_source(cursors={item.key: item.position for item in items})) == []


def test_a_folder_that_lies_too_deep_is_refused_in_one_line(watched, open_source):
    path = watched
    for _ in range(64):
        path = path / "d"
    put(path / "taken.npz", npz(1))
    put(path / "d" / "not.npz", npz(2))
    items = take(open_source())
    assert sorted(names(items)) == ["d/" * 64 + "taken.npz", "too_deep"]
    (refusal,) = (item for item in items if not isinstance(item, Arrival))
    assert refusal.name == "/".join("d" * 65)
    assert refusal.reason == "too_deep: a folder in 64 others, expected at most 64 in each other"


@pytest.mark.parametrize("above", [False, True])
def test_a_watched_folder_that_a_link_replaces_is_told_and_not_followed(tmp_path, open_source, above):
    put(tmp_path / "secret" / "in" / "a.npz", npz(7))
    put(tmp_path / "parent" / "in" / "b.npz", npz(1))
    source = open_source(root=tmp_path / "parent" / "in")
    assert names(take(source)) == ["b.npz"]
    place = tmp_path / "parent" if above else tmp_path / "parent" / "in"
    place.rename(tmp_path / "away")
    place.symlink_to(tmp_path / "secret" / ("" if above else "in"))
    told = f"{tmp_path}/parent/in: {place} is a symbolic link now, expected the folder that was there at the start"
    for _ in range(2):
        with pytest.raises(SourceUnavailable, match=re.escape(told)):
            take(source)
        assert source.problem() == told
    place.unlink()
    (tmp_path / "away").rename(place)
    assert take(source) == []
    assert source.problem() is None


def test_a_watched_link_is_followed_once(tmp_path, watched, open_source):
    link = tmp_path / "link"
    link.symlink_to(watched)
    source = open_source(root=link)
    put(watched / "a.npz", npz(1))
    link.unlink()
    link.symlink_to(put(tmp_path / "secret" / "b.npz", npz(7)).parent)
    assert names(take(source)) == ["a.npz"]


def test_a_folder_that_a_link_replaces_after_the_look_gives_no_foreign_bytes(tmp_path, watched, open_source):
    put(watched / "1.npz", npz(1))
    put(watched / "sub" / "2.npz", npz(2))
    put(watched / "3" / "3.npz", npz(3))
    (tmp_path / "secret").mkdir()
    passing = open_source().iter_arrivals()
    assert next(passing).name == "1.npz"
    (watched / "sub").rename(tmp_path / "secret" / "sub")  # the very file that was seen, but by another way
    (watched / "sub").symlink_to(tmp_path / "secret" / "sub")
    assert names(passing) == ["3/3.npz"]


def test_a_folder_that_cannot_be_listed_for_want_of_descriptors_is_not_passed_over(watched, open_source, monkeypatch):
    put(watched / "sub" / "a.npz", npz(1))
    source = open_source()
    listed = os.scandir

    def scandir(fd):
        if "/sub" in str(Path(f"/proc/self/fd/{fd}").readlink()):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return listed(fd)

    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", scandir)
        with pytest.raises(SourceUnavailable, match="Too many open files"):
            take(source)
    assert names(take(source)) == ["sub/a.npz"]
    assert source.problem() is None
