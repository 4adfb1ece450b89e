"""The spool through a loss of power: every state that the disk can be left in, at every moment of every protocol."""

from pathlib import Path

import pytest
from sim_files import SimFiles

from storage.packing import sha256 as digest_of
from storage.spool import Spool, SpoolCorrupt

PAYLOADS = {digest_of(payload): payload for payload in (b"one batch" * 9, b"two batches" * 9, b"three" * 20)}
FIRST, SECOND, THIRD = PAYLOADS
MOST_STATES = 1024
HALF_WRITTEN = {f"{FIRST}.0123.tmp": b"one ba", f"{SECOND}.4567.tmp": b""}


def stored(*hashes):
    return {sha256: PAYLOADS[sha256] for sha256 in hashes}


class Protocol:
    """What is done to a spool: from which state, how, and which payloads must be whole all along, or at its end."""

    def __init__(self, act, *, before=(), during=(), after=(), gone=(), rubbish=None):
        self.act, self.during, self.after, self.gone = act, during, after, gone
        self.before = stored(*before) | (rubbish or {})


PROTOCOLS = {
    "store one": Protocol(lambda spool: spool.store(stored(FIRST)), after=[FIRST]),
    "store two": Protocol(lambda spool: spool.store(stored(FIRST, SECOND)), after=[FIRST, SECOND]),
    "store three": Protocol(lambda spool: spool.store(stored(*PAYLOADS)), after=PAYLOADS),
    "store one of two again": Protocol(
        lambda spool: spool.store(stored(FIRST, SECOND)), before=[FIRST], during=[FIRST], after=[FIRST, SECOND]
    ),
    "remove one of two": Protocol(lambda spool: spool.remove(FIRST), before=[FIRST, SECOND], during=[SECOND]),
    "remove what is not there": Protocol(lambda spool: spool.remove(FIRST), before=[SECOND], during=[SECOND]),
    "clean": Protocol(
        lambda spool: spool.clean({SECOND}), before=[FIRST, SECOND, THIRD], during=[SECOND], rubbish=HALF_WRITTEN
    ),
}


def root_of(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def is_whole(spool, sha256):
    try:
        return spool.load(sha256) == PAYLOADS[sha256]
    except SpoolCorrupt:
        return False


def bad_states(root, protocol, kind=SimFiles, **options):
    """(how many states there are, what is wrong with some)."""
    files = kind(root, dict(protocol.before), **options)
    try:
        protocol.act(Spool(root, files))
        kept = {len(files.moments) - 1: set(protocol.after)}
    except OSError:
        kept = {}  # nothing was promised
    count, problems = 0, []
    for turn, moment in enumerate(files.moments):
        for state in moment.states():
            count += 1
            wanted = set(protocol.during) | kept.get(turn, set())
            problems += [f"after {moment.operation!r}: {problem}" for problem in judge(root, state, wanted)]
    return count, problems


def judge(root, state, wanted):
    """What is wrong with a folder that was found like this, and what cleaning it does not mend."""
    files = SimFiles(root, state)
    spool = Spool(root, files)
    problems = [f"{sha256[:6]} is lost" for sha256 in wanted if not is_whole(spool, sha256)]
    problems += [f"{sha256[:6]} is damaged" for sha256 in spool.names() if not is_whole(spool, sha256)]
    begun = len(files.moments)
    spool.clean(wanted)
    if set(files.names(root)) != wanted & set(state):
        problems.append(f"cleaning leaves {files.names(root)}")
    for moment in files.moments[begun:]:  # and the power may fail again
        problems += [f"{s[:6]} is lost by cleaning" for again in moment.states() for s in wanted if s not in again]
    return problems


@pytest.mark.parametrize("name", PROTOCOLS)
def test_no_loss_of_power_loses_or_damages_a_stored_payload(name, tmp_path):
    count, problems = bad_states(root_of(tmp_path), PROTOCOLS[name])
    print(f"{name}: {count} states")  # noqa: T201 - the number belongs to the result
    assert 1 < count <= MOST_STATES
    assert problems == []


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_refusal_in_between_promises_nothing_and_damages_nothing(name, tmp_path):
    whole = SimFiles(root_of(tmp_path), dict(PROTOCOLS[name].before))
    PROTOCOLS[name].act(Spool(root_of(tmp_path), whole))
    for number in range(1, len(whole.moments)):
        assert bad_states(root_of(tmp_path), PROTOCOLS[name], fails=number)[1] == []


class NeverSyncsFiles(SimFiles):
    def sync(self, descriptor):
        pass


class NeverSyncsFolders(SimFiles):
    def sync_folder(self, folder):
        pass


class RenamesFirst(SimFiles):
    """The bytes get their name, and are synced afterwards."""

    def write(self, path, data):
        number = super().write(path, data)
        final = path.with_name(path.name.partition(".")[0])
        super().rename(path, final)
        return number

    def rename(self, source, target):
        pass


@pytest.mark.parametrize(
    ("kind", "found"), [(NeverSyncsFiles, "damaged"), (NeverSyncsFolders, "lost"), (RenamesFirst, "damaged")]
)
@pytest.mark.parametrize("name", ["store one", "store two", "store three"])
def test_a_missing_or_late_sync_is_found(kind, found, name, tmp_path):
    problems = bad_states(root_of(tmp_path), PROTOCOLS[name], kind)[1]
    assert any(found in problem for problem in problems)
