"""The spool: bytes under their hash, durable, verified, and gone when nobody needs them."""

import hashlib
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.spool import Spool, SpoolCorrupt

PAYLOAD = b"sixteen bytes.." * 100


def digest(payload):
    return hashlib.sha256(payload).hexdigest()


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path / "spool")


@given(payload=st.binary(max_size=1000))
def test_load_gives_back_what_store_was_given(tmp_path_factory, payload):
    spool = Spool(tmp_path_factory.mktemp("spool"))
    spool.store({digest(payload): payload})
    assert spool.load(digest(payload)) == payload
    assert spool.names() == {digest(payload)}


def test_storing_and_removing_twice_is_harmless(spool):
    for _ in range(2):
        spool.store({digest(PAYLOAD): PAYLOAD})
    assert spool.names() == {digest(PAYLOAD)}
    for _ in range(2):
        spool.remove(digest(PAYLOAD))
    assert spool.names() == set()


def test_storing_again_mends_a_damaged_payload(spool, tmp_path):
    spool.store({digest(PAYLOAD): PAYLOAD})
    (tmp_path / "spool" / digest(PAYLOAD)).write_bytes(PAYLOAD[:-1])
    spool.store({digest(PAYLOAD): PAYLOAD})
    assert spool.load(digest(PAYLOAD)) == PAYLOAD


@pytest.mark.parametrize("damaged", [b"", PAYLOAD[:-1], PAYLOAD + b"\0", b"S" + PAYLOAD[1:]])
def test_a_damaged_payload_is_never_given_out(spool, tmp_path, damaged):
    spool.store({digest(PAYLOAD): PAYLOAD})
    (tmp_path / "spool" / digest(PAYLOAD)).write_bytes(damaged)
    with pytest.raises(SpoolCorrupt, match="another hash"):
        spool.load(digest(PAYLOAD))


def test_a_missing_payload_says_so(spool):
    with pytest.raises(SpoolCorrupt, match="missing"):
        spool.load(digest(PAYLOAD))


@pytest.mark.parametrize("name", ["", "../lock", "a" * 63, "A" * 64, "g" * 64, "a" * 64 + "\n", "/" + "a" * 63])
def test_only_a_sha256_is_a_name(spool, name):
    for use in (lambda: spool.store({name: PAYLOAD}), lambda: spool.load(name), lambda: spool.remove(name)):
        with pytest.raises(ValueError, match="not a SHA-256"):
            use()


def test_a_payload_under_the_hash_of_another_is_never_given_out(spool):
    spool.store({digest(b"other"): PAYLOAD})
    with pytest.raises(SpoolCorrupt, match="another hash"):
        spool.load(digest(b"other"))


def test_clean_keeps_what_is_needed_and_nothing_else(spool, tmp_path):
    needed, orphan = b"needed", b"orphan"
    for payload in (needed, orphan):
        spool.store({digest(payload): payload})
    (tmp_path / "spool" / f"{digest(needed)}.x1.tmp").write_bytes(b"half")
    assert spool.clean({digest(needed), digest(b"not here")}) == 2
    assert [path.name for path in (tmp_path / "spool").iterdir()] == [digest(needed)]


def test_a_failed_write_leaves_nothing(spool, tmp_path):
    (tmp_path / "spool" / digest(PAYLOAD)).mkdir()
    with pytest.raises(OSError, match="directory"):
        spool.store({digest(PAYLOAD): PAYLOAD})
    assert [path.name for path in (tmp_path / "spool").iterdir()] == [digest(PAYLOAD)]


def test_directory_and_files_are_private(spool, tmp_path):
    spool.store({digest(PAYLOAD): PAYLOAD})
    assert stat.S_IMODE((tmp_path / "spool").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "spool" / digest(PAYLOAD)).stat().st_mode) == 0o600
