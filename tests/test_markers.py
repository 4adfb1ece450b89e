"""A marker beside a batch says that it is whole; a checksum is believed only if it is true."""

import hashlib
import os
import subprocess

import numpy as np
import pytest
from folders import NEVER, await_tick, names, npy, npz, png, put, take, wait_for

from streams.directory import DirectorySettings

SLOW = DirectorySettings(settle_seconds=NEVER, incomplete_seconds=NEVER)
REQUIRED = DirectorySettings(settle_seconds=0, incomplete_seconds=0, marker="required")


def sums(*paths, cwd):
    """As sha256sum writes them."""
    return subprocess.run(["sha256sum", *paths], cwd=cwd, capture_output=True, check=True).stdout


@pytest.mark.parametrize("name", ["a.npz", "b/a.csv", "line\nbreak.npz", "back\\slash.npz", "caf\udce9.npz"])
@pytest.mark.parametrize("suffix", [".done", ".sha256"])
def test_a_marked_file_comes_at_once_and_the_marker_itself_never(watched, open_source, name, suffix):
    path = put(watched / name, npz())
    marker = path.with_name(path.name + suffix)
    put(marker, b"" if suffix == ".done" else sums(path.name, cwd=path.parent))
    source = open_source(SLOW)
    (item,) = take(source)
    assert item.payload == npz()
    assert not item.may_grow
    assert take(source) == []
    assert source.pending() == 0


def test_an_unmarked_file_waits_as_before(watched, open_source):
    put(watched / "a.npz", npz())
    put(watched / "b.npz.done", b"")  # of a file that is not there yet
    source = open_source(SLOW)
    assert take(source) == []
    assert source.pending() == 1


def test_nothing_is_taken_without_a_marker_where_one_is_required(watched, open_source):
    put(watched / "a.npz", npz())
    put(watched / "notes.txt", b"")
    put(watched / "b" / "cat" / "1.png", png())
    source = open_source(REQUIRED)
    assert take(source) == []
    assert source.pending() == 3
    put(watched / "a.npz.done", b"")
    assert names(take(source)) == ["a.npz"]
    assert source.pending() == 2


def test_a_marker_that_comes_ends_the_wait(watched, open_source):
    put(watched / "a.npz", npz())
    source = open_source(SLOW)
    assert take(source) == []
    put(watched / "a.npz.done", b"")
    assert names(wait_for(source)) == ["a.npz"]


def test_an_older_marker_means_what_was_there_before(watched, open_source):
    path = put(watched / "a.npz", npz(1))
    marker = put(watched / "a.npz.done", b"")
    source = open_source(REQUIRED)
    assert len(take(source)) == 1
    await_tick()
    path.write_bytes(npz(2))
    assert take(source) == []
    assert source.pending() == 1
    await_tick()
    os.utime(marker)
    assert [item.payload for item in take(source)] == [npz(2)]


def test_a_marker_taken_away_changes_nothing(watched, open_source):
    put(watched / "a.npz", npz())
    marker = put(watched / "a.npz.sha256", sums("a.npz", cwd=watched))
    source = open_source()
    assert len(take(source)) == 1
    marker.unlink()
    assert take(source) == []


@pytest.mark.parametrize(
    "line",
    ["{0}", "{0}  a.npz", "{0} *./a.npz", "{0}  /elsewhere/a.npz.part\r", "{1}  a.npz"],
    ids=["bare", "plain", "binary", "renamed", "capitals"],
)
def test_every_usual_way_to_write_a_sum_is_read(watched, open_source, line):
    put(watched / "a.npz", npz())
    digest = hashlib.sha256(npz()).hexdigest()
    put(watched / "a.npz.sha256", line.format(digest, digest.upper()).encode() + b"\n")
    assert names(take(open_source())) == ["a.npz"]


@pytest.mark.parametrize(
    "content, text",
    [
        (b"", "a.npz.sha256: empty"),
        (b"junk", "a.npz.sha256: no lines of"),
        (b"0" * 64 + b"  a.npz\n", f"a.npz: is {hashlib.sha256(npz()).hexdigest()}, its marker has {'0' * 64}"),
        (b"0" * 64 + b"  b.npz\n" + b"0" * 64 + b"  c.npz\n", "a.npz: is"),
    ],
)
def test_a_sum_that_is_not_true_is_waited_for_then_refused(watched, open_source, content, text):
    put(watched / "a.npz", npz())
    marker = put(watched / "a.npz.sha256", content)
    source = open_source(DirectorySettings(settle_seconds=0, incomplete_seconds=NEVER))
    assert take(source) == []
    assert source.pending() == 1
    source = open_source()
    (refusal,) = take(source)
    assert refusal.reason.startswith(f"checksum_mismatch: {text}")
    assert refusal.reason.isprintable()
    assert take(source) == []
    assert take(open_source(cursors={refusal.key: refusal.position})) == []
    await_tick()
    marker.write_bytes(sums("a.npz", cwd=watched))
    assert names(take(source)) == ["a.npz"]


def test_a_sum_that_comes_before_its_file_is_whole_waits_for_it(watched, open_source):
    put(watched / "a.npz", npz(1)[:300])
    put(watched / "a.npz.sha256", hashlib.sha256(npz(1)).hexdigest().encode())
    source = open_source(SLOW)
    assert take(source) == []
    put(watched / "a.npz", npz(1))
    assert [item.payload for item in take(source)] == [npz(1)]


@pytest.mark.parametrize("marker", ["day.done", "day/.done"])
def test_a_marked_image_folder_comes_at_once(watched, open_source, marker):
    put(watched / "day" / "cat" / "1.png", png())
    put(watched / "day" / "dog" / "1.png", png(1))
    put(watched / marker, b"")
    (item,) = take(open_source(SLOW))
    assert (item.name, item.form, item.may_grow) == ("day", "images", False)


@pytest.mark.parametrize("place", ["", "day"], ids=["beside", "inside"])
def test_an_image_folder_is_whole_when_all_its_sums_are_true(watched, open_source, place):
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        put(watched / "day" / name, png(len(name)))
    files = [str(path.relative_to(watched / place)) for path in (watched / "day").glob("*/*")]
    put(watched / "day.sha256", sums(*files, cwd=watched / place))
    (watched / "day" / "dog" / "1.png").rename(watched / "1.png.part")
    source = open_source(SLOW)
    assert take(source) == []
    (refusal,) = take(open_source())
    assert refusal.reason == "checksum_mismatch: 1 images are missing, first dog/1.png"
    (watched / "1.png.part").rename(watched / "day" / "dog" / "1.png")
    (item,) = take(source)
    assert item.name == "day"


def test_an_image_that_no_sum_speaks_of_is_not_taken(watched, open_source):
    put(watched / "day" / "cat" / "1.png", png())
    put(watched / "day.sha256", sums("day/cat/1.png", cwd=watched))
    put(watched / "day" / "dog" / "1.png", png())
    (refusal,) = take(open_source())
    assert refusal.reason.startswith("checksum_mismatch: dog/1.png: is ")


@pytest.mark.parametrize("markers", [["a.done"], ["a.x.npy.done", "a.y.npy.done"]])
def test_a_pair_is_marked_by_its_common_name_or_each_alone(watched, open_source, markers):
    put(watched / "a.x.npy", npy(np.ones((3, 2))))
    put(watched / "a.y.npy", npy(np.arange(3)))
    for name in markers:
        assert take(open_source(SLOW)) == []
        put(watched / name, b"")
    assert names(take(open_source(SLOW))) == ["a.x.npy"]


def test_the_sums_of_a_pair_are_all_checked(watched, open_source):
    put(watched / "a.x.npy", npy(np.ones((3, 2))))
    put(watched / "a.y.npy", npy(np.arange(3)))
    marker = put(watched / "a.sha256", sums("a.x.npy", "a.y.npy", cwd=watched))
    assert names(take(open_source(SLOW))) == ["a.x.npy"]
    await_tick()
    marker.write_bytes(sums("a.x.npy", "a.x.npy", cwd=watched))
    assert names(take(open_source())) == ["checksum_mismatch"]
