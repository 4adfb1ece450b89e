"""A watched folder: no file comes before it is finished."""

import os
import threading
import time
from dataclasses import replace

import pytest
from folders import NEVER, await_tick, names, npz, png, put, take, wait_for

from streams import tree
from streams.directory import DirectorySettings
from streams.mounts import find_remote, remote_kind


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


@pytest.mark.parametrize("seconds", [-(2**40), -1, 2**31, 2**33, 2**40])
def test_a_date_of_any_year_is_settled_by_our_own_clock(watched, open_source, seconds):
    os.utime(put(watched / "a.npz", npz()), (seconds, seconds))  # as near to it as the file system can store
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
    assert not item.may_grow


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
    """As intake has it: what is cut off is postponed."""
    source = open_source(DirectorySettings(settle_seconds=0, incomplete_seconds=NEVER))
    data = npz(3)
    for start in range(0, len(data), 100):
        with (watched / "a.npz").open("ab") as file:
            file.write(data[start : start + 100])
        if start + 100 < len(data):
            (item,) = source.iter_arrivals()
            assert item.may_grow
            source.postpone(item)
            assert take(source) == []
            assert source.pending() == 1
    assert [item.payload for item in take(source)] == [data]
    assert take(source) == []


def test_what_is_postponed_comes_again_once_and_may_not_grow_then(watched, open_source):
    path = put(watched / "a.npz", npz(5)[:300])
    source = open_source(DirectorySettings(settle_seconds=0, incomplete_seconds=0.3))
    (item,) = source.iter_arrivals()
    assert item.may_grow
    source.postpone(item)
    assert take(source) == []
    assert source.pending() == 1
    (again,) = wait_for(source)
    assert again == replace(item, may_grow=False)
    assert take(source) == []
    path.write_bytes(npz(5))
    (whole,) = take(source)
    assert whole.payload == npz(5)


def test_postponing_what_has_changed_meanwhile_changes_nothing(watched, open_source):
    path = put(watched / "a.npz", npz(1)[:300])
    source = open_source(DirectorySettings(settle_seconds=0, incomplete_seconds=NEVER))
    (item,) = source.iter_arrivals()
    path.write_bytes(npz(1))
    (whole,) = source.iter_arrivals()
    source.postpone(item)
    assert list(source.iter_arrivals()) == [whole]


def test_a_file_replaced_while_it_is_read_comes_whole_and_once(watched, open_source):
    versions = [npz(value) * 50 for value in range(200)]
    path = put(watched / "a.npz", versions[0])
    source = open_source()

    def replace_all():
        for version in versions[1:-1]:
            put(watched / ".new", version).rename(path)
        await_tick()  # all are of one size
        put(watched / ".new", versions[-1]).rename(path)

    writer = threading.Thread(target=replace_all)
    writer.start()
    came = []
    while writer.is_alive():
        came += take(source)
    writer.join()
    came += take(source)
    payloads = [item.payload for item in came]
    assert payloads[-1] == versions[-1]
    assert payloads == [version for version in versions if version in payloads]
    assert take(source) == []


def test_times_in_whole_seconds_must_be_two_seconds_old(watched, open_source, monkeypatch):
    """A change within the same second would show nowhere. No file system here has such times: they are cut off."""
    monkeypatch.setattr(tree, "_SECOND", 1)
    put(watched / ".a", npz()).rename(watched / "a.npz")
    source = open_source()
    assert take(source) == []
    seen = (watched / "a.npz").stat().st_ctime
    assert len(wait_for(source)) == 1
    assert time.time() - seen >= 1.99


def test_an_image_folder_is_as_old_as_the_newest_of_all_that_is_in_it(watched):
    put(watched / "batch" / "cat" / "1.png", png())
    touched = []
    for change in (
        lambda: put(watched / "batch" / "cat" / "2.png", png()),
        lambda: put(watched / "batch" / "dog" / "1.png", png()),
        lambda: put(watched / "batch" / "cat" / ".3.png.Xy7", png()[:9]),  # as rsync does
        (watched / "batch" / "eel").mkdir,  # its images are yet to come
    ):
        before = time.time_ns()
        await_tick()
        change()
        (candidate,) = tree.walk(str(watched))
        touched.append(candidate.touched_ns)
        assert touched[-1] > before
    assert touched == sorted(touched)


def test_a_file_that_goes_away_is_forgotten(watched, open_source):
    path = put(watched / "a.npz", npz())
    source = open_source(DirectorySettings(settle_seconds=NEVER))
    assert take(source) == []
    path.unlink()
    assert take(source) == []
    assert source.pending() == 0


@pytest.mark.parametrize("name", ["day", "deep/day"])
def test_a_file_in_a_folder_renamed_into_place_needs_no_quiet_time(tmp_path, watched, open_source, name):
    (watched / "deep").mkdir()
    source = open_source(DirectorySettings(settle_seconds=NEVER))
    assert take(source) == []
    put(tmp_path / "elsewhere" / "a.npz", npz()).parent.rename(watched / name)
    (item,) = wait_for(source)
    assert item.name == f"{name}/a.npz"
    assert not item.may_grow


# --- network file systems ---------------------------------------------------------------------------------


def test_a_share_is_polled_and_trusts_neither_hints_nor_times_nor_leases(watched, open_source):
    os.utime(put(watched / "old.npz", npz()), (1, 1))
    source = open_source(DirectorySettings(settle_seconds=0.2, watching="polling"))
    assert take(source) == []
    assert not [thread for thread in threading.enumerate() if "otify" in thread.name]
    put(watched / ".a", npz()).rename(watched / "a.npz")
    with (watched / "open.npz").open("wb") as file:
        file.write(npz())
        file.flush()
        begun = time.monotonic()
        assert take(source) == []
        assert len(wait_for(source, 3)) == 3
    assert time.monotonic() - begun >= 1.99


def test_a_marked_file_on_a_share_comes_at_once(watched, open_source):
    put(watched / "a.npz", npz())
    put(watched / "a.npz.done", b"")
    source = open_source(DirectorySettings(settle_seconds=NEVER, watching="polling"))
    assert names(take(source)) == ["a.npz"]


MOUNTS = """\
21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 21 0:25 / /proc rw - proc proc rw
40 21 0:40 / /mnt/nas rw - nfs4 nas:/export rw,vers=4.2
41 21 0:41 / /mnt/my\\040share rw - cifs //nas/share rw
42 21 0:42 / /home/u/cloud rw - fuse.sshfs u@h: rw
43 21 8:1 / /media/usb rw - fuseblk /dev/sda1 rw
44 21 0:43 / /mnt/over rw - nfs4 nas:/a rw
45 44 254:1 / /mnt/over rw - xfs /dev/vdb rw
46 40 254:2 / /mnt/nas/local rw - ext4 /dev/vdc rw
"""


@pytest.mark.parametrize(
    "folder, kind",
    [
        ("/var/in", None),
        ("/mnt/nas", "nfs4"),
        ("/mnt/nas/deep/er", "nfs4"),
        ("/mnt/nasty", None),
        ("/mnt/my share/in", "cifs"),
        ("/home/u/cloud/in", "fuse.sshfs"),
        ("/home/u", "fuse.sshfs"),  # a share below it
        ("/media/usb/in", None),  # a disk, though in user space
        ("/mnt/over", None),  # the later mount covers the earlier
        ("/mnt/nas/local/in", None),
    ],
)
def test_what_others_may_write_to_unseen_is_known_by_its_mount(folder, kind):
    assert find_remote(folder, MOUNTS) == kind


def test_this_folder_is_local(tmp_path):
    assert remote_kind(tmp_path) is None
