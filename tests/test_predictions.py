"""Files of predictions: below their folder whatever the name, never through a link, durable; what fails is kept."""

import os
import re
import string
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supsupd.predictions import LONGEST_NAME, LONGEST_PART, PredictionFolder, place_of

HOSTILE = [
    "../../x",
    "/etc/cron.d/x",
    "../state/tokens",
    "",
    ".",
    "..",
    "/",
    "//",
    "a//b",
    ".hidden",
    "a/./b",
    "a\0b",
    "line\nbreak",
    "\udce9" * 46,
    "é" * 255,
    "x" * 255,
    "x" * 4096,
    "d/" * 2000 + "x",
    "a.json/b",
    "a.json/",
    "%2e%2e/x",
    "~root",
    "CON",
    "a\\..\\b",
    "x" * 250 + ".json/y",
]
PLACES = st.tuples(
    st.text(max_size=300) | st.sampled_from(HOSTILE),
    st.none() | st.text(max_size=70) | st.sampled_from(HOSTILE),
    st.text(max_size=5000)
    | st.text(alphabet="./a%~@", max_size=30)
    | st.sampled_from(HOSTILE)
    | st.binary(max_size=2000).map(os.fsdecode),
)


def test_usual_names_can_be_read():
    assert place_of("/data/in", None, "night/07.npz") == ("%2Fdata%2Fin", "night", "07.npz.json")
    assert place_of("socket", "token 3f", "07.npz") == ("socket", "@token%203f", "07.npz.json")


@given(PLACES)
@settings(max_examples=500, deadline=None)
def test_a_path_lies_below_the_folder_and_is_bounded_whatever_the_name(place):
    parts = place_of(*place)
    for part in parts:
        assert re.fullmatch(rf"[{re.escape(string.ascii_letters + string.digits)}%~@_.-]+", part)
        assert not part.startswith(".")
        assert len(part) <= LONGEST_PART
    assert all(not folder.endswith(".json") for folder in parts[:-1])
    assert parts[-1].endswith(".json")
    assert len("/".join(parts)) <= LONGEST_NAME + 3 * LONGEST_PART


@given(st.lists(PLACES, min_size=2, max_size=8, unique=True))
@settings(max_examples=300, deadline=None)
def test_different_batches_have_different_paths_and_no_file_is_the_folder_of_another(places):
    paths = [place_of(*place) for place in places]
    assert len(set(paths)) == len(paths)
    folders = {path[:end] for path in paths for end in range(1, len(path))}
    assert folders.isdisjoint(paths)


SHORT = st.text(alphabet="ab./%@~\0", max_size=6)


@given(SHORT, SHORT, SHORT)
@settings(max_examples=500, deadline=None)
def test_a_short_path_says_what_it_is_of(source, sender, name):
    first, second, *rest = place_of(source, sender, name)
    rest[-1] = rest[-1].removesuffix(".json")
    first, second, *rest = ["" if part == "%" else unquote(part) for part in (first, second.removeprefix("@"), *rest)]
    assert (first, second, "/".join(rest)) == (source, sender, name)


@pytest.mark.parametrize("source", ["socket", *HOSTILE])
def test_a_real_file_system_takes_every_hostile_name(tmp_path, source):
    folder, names = PredictionFolder(tmp_path / "out"), [*HOSTILE, "a", "x" * 250, "x" * 251]
    for sender in (None, "a", *HOSTILE[:3]):
        for name in names:
            folder.write(place_of(source, sender, name), name.encode("utf-8", "surrogatepass"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5 * len(names)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.read_bytes() for path in files} == {name.encode("utf-8", "surrogatepass") for name in names}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o600"}


@pytest.mark.parametrize("kind", ["source", "folder", "link to a file"])
def test_no_link_below_the_folder_is_followed(tmp_path, kind):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    (out / "socket").mkdir(parents=True)
    if kind == "source":
        (out / "socket").rmdir()
        (out / "socket").symlink_to(elsewhere)
    else:
        (out / "socket/night").symlink_to(elsewhere if kind == "folder" else elsewhere / "made")
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        PredictionFolder(out).write(place_of("socket", None, "night/x"), b"1")
    assert list(elsewhere.iterdir()) == []


def test_a_link_in_the_place_of_the_file_is_replaced_and_what_it_names_stays(tmp_path):
    secret = tmp_path / "tokens.json"
    secret.write_text("mine")
    place = place_of("socket", None, "x")
    (tmp_path / "out/socket").mkdir(parents=True)
    (tmp_path / "out" / "/".join(place)).symlink_to(secret)
    PredictionFolder(tmp_path / "out").write(place, b"1")
    assert secret.read_text() == "mine"
    assert (tmp_path / "out/socket/x.json").read_bytes() == b"1"
    assert not (tmp_path / "out/socket/x.json").is_symlink()


def test_the_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    PredictionFolder(tmp_path / "out").write(("x.json",), b"1")
    assert (tmp_path / "real/x.json").read_bytes() == b"1"


def test_what_could_not_be_renamed_leaves_nothing_behind(tmp_path):
    (tmp_path / "out/socket/x.json/full").mkdir(parents=True)
    with pytest.raises(OSError, match=r"[Dd]irectory"):
        PredictionFolder(tmp_path / "out").write(place_of("socket", None, "x"), b"1")
    assert [path.name for path in (tmp_path / "out/socket").iterdir()] == ["x.json"]
