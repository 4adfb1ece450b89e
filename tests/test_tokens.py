"""Tokens: what is kept of them, who may write the file, and that time tells nothing."""

import gc
import hashlib
import json
import os
import re
import stat
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from supsupd.tokens import Tokens, TokensRefused, TokenUnknown

BIN = Path(sys.executable).parent
FORM = re.compile(r"supsupd_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")


@pytest.fixture
def tokens(tmp_path):
    return Tokens(tmp_path / "deep" / "state")


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def supsupd(*arguments, state=None, **environment):
    command = [BIN / "supsupd", "token", *arguments, *([] if state is None else ["--state", state])]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


# -- the file ---------------------------------------------------------------------------------------------------------


def test_only_the_hash_of_a_secret_is_kept(tokens):
    token, text = tokens.create("submit", label="the line", days=3)
    identifier, secret = FORM.fullmatch(text).groups()
    kept = tokens.path.read_text()
    assert identifier == token.id
    assert secret not in kept
    assert hashlib.sha256(secret.encode()).hexdigest() in kept
    assert (token.expires - token.created).days == 3
    assert (mode_of(tokens.path), mode_of(tokens.path.parent)) == (0o600, 0o700)


def test_a_token_is_found_as_a_whole_and_not_by_a_part(tokens):
    token, text = tokens.create("admin")
    assert tokens.find(text) == token
    other = tokens.create("predict")[1]
    swapped = text[: -len("_") - 43] + other[-44:]
    for wrong in (
        "",
        text[:-1],
        text + "A",
        text.upper(),
        token.id,
        swapped,
        f" {text}",
        text + "\n",
        "ü" * 60,
        "\udcff",
    ):
        assert tokens.find(wrong) is None


def test_a_revoked_token_opens_nothing(tokens):
    token, text = tokens.create("admin")
    reader = Tokens(tokens.path.parent)
    assert reader.find(text).id == token.id
    assert tokens.revoke(token.id).id == token.id
    assert reader.find(text) is None
    with pytest.raises(TokenUnknown, match=token.id):
        tokens.revoke(token.id)


def test_no_token_is_lost_when_many_are_made_at_once(tokens):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: Tokens(tokens.path.parent).create("predict")[0].id, range(24)))
    assert sorted(token.id for token in tokens.read()) == sorted(made)
    assert sorted(path.name for path in tokens.path.parent.iterdir()) == ["tokens.json"]


def test_a_writer_that_died_is_in_nobodys_way(tokens):
    tokens.create("predict")
    tokens.path.with_suffix(".new").write_text("half of it")
    tokens.create("predict")
    assert len(tokens.read()) == 2


def test_a_file_that_others_may_read_opens_nothing_and_is_not_written(tokens):
    _, text = tokens.create("admin")
    tokens.path.chmod(0o640)
    assert Tokens(tokens.path.parent).find(text) is None
    with pytest.raises(TokensRefused, match="run: chmod 600"):
        tokens.create("predict")
    assert tokens.find(text) is None
    tokens.path.chmod(0o600)
    assert tokens.find(text) is not None


def test_a_file_that_is_gone_opens_nothing(tokens):
    _, text = tokens.create("admin")
    assert tokens.find(text)
    tokens.path.unlink()
    assert tokens.find(text) is None
    assert tokens.read() == []


@pytest.mark.parametrize("label", ["x" * 65, "a\nb", "\x1b[2J"])
def test_a_label_is_short_and_printable(tokens, label):
    with pytest.raises(ValueError, match="expected up to 64 printable characters"):
        tokens.create("predict", label)


def test_time_does_not_tell_which_ids_there_are(tokens):
    _, text = tokens.create("admin")
    for _ in range(30):
        tokens.create("predict")
    wrong = text[:-43] + "A" * 43
    unknown = f"supsupd_{'0' * 12}_{'A' * 43}"
    assert tokens.find(text) and not tokens.find(wrong) and not tokens.find(unknown)
    nanoseconds = {wrong: [], unknown: []}
    gc.disable()
    for turn in range(10_000):
        for asked in (wrong, unknown) if turn % 2 else (unknown, wrong):
            since = time.perf_counter_ns()
            tokens.find(asked)
            nanoseconds[asked].append(time.perf_counter_ns() - since)
    gc.enable()
    ratio = statistics.median(nanoseconds[wrong]) / statistics.median(nanoseconds[unknown])
    assert 0.8 < ratio < 1.25


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_token_last_and_its_secret_nowhere_else(tmp_path):
    state = tmp_path / "state"
    made = supsupd("create", "--role", "submit", "--label", "ci", "--days", "30", state=state)
    assert made.returncode == 0
    text = made.stdout.splitlines()[-1]
    identifier, secret = FORM.fullmatch(text).groups()
    assert Tokens(state).find(text).role == "submit"
    assert made.stdout.count(secret) == 1
    assert secret not in made.stderr
    listed = supsupd("list", state=state)
    assert secret not in listed.stdout + listed.stderr
    assert [word in listed.stdout for word in (identifier, "submit", "ci", "valid")] == [True] * 4
    (row,) = json.loads(supsupd("list", "--json", state=state).stdout)
    assert set(row) == {"id", "role", "label", "created", "expires", "state"}
    assert supsupd("revoke", identifier, state=state).stdout == f"token {identifier} is revoked\n"
    assert Tokens(state).find(text) is None
    again = supsupd("revoke", identifier, state=state)
    assert (again.returncode, again.stderr) == (1, f"there is no token '{identifier}'\n")


def test_the_state_is_that_of_the_daemon_unless_said_otherwise(tmp_path):
    made = supsupd("create", "--role", "predict", SUPSUPD_STATE=str(tmp_path / "set"))
    assert len(Tokens(tmp_path / "set").read()) == 1
    home = {"HOME": str(tmp_path), "XDG_STATE_HOME": ""}
    assert supsupd("create", "--role", "predict", **home).returncode == made.returncode == 0
    assert len(Tokens(tmp_path / ".local" / "state" / "supsupd").read()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["create", "--role", "boss"], 78, "--role: given 'boss'; expected predict, submit or admin\n"),
        (["create", "--role", "predict", "--label", "x" * 65], 78, f"label: given '{'x' * 65}'; expected up to 64 "),
        (["create"], 2, "Usage: "),
        (["create", "--role", "predict", "--days", "0"], 2, "Usage: "),
    ],
)
def test_a_wrong_command_makes_nothing(tmp_path, arguments, code, said):
    result = supsupd(*arguments, state=tmp_path / "state")
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_no_token_is_made_where_others_could_change_it(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o777)
    result = supsupd("create", "--role", "predict", state=tmp_path / "state")
    assert (result.returncode, result.stdout) == (78, "")
    assert "run: chmod go-w" in result.stderr
    assert list((tmp_path / "state").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for another user")
def test_root_makes_tokens_for_the_owner_of_the_state(tmp_path):
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    os.chown(state, 65534, 65534)
    text = supsupd("create", "--role", "predict", state=state).stdout.splitlines()[-1]
    status = (state / "tokens.json").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (65534, 65534, 0o600)
    assert Tokens(state).find(text)
