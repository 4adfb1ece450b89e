"""Each error in a configuration file names the line: where keys stand, and a mutation of every section."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli.supsupd import app
from supsupd.config import ConfigError, Settings, load_settings
from supsupd.toml_lines import key_lines

BIN = Path(sys.executable).parent

# -- where keys stand -------------------------------------------------------------------------------------------------

KEYS = st.one_of(
    st.from_regex(r"[A-Za-z0-9_-]{1,6}", fullmatch=True), st.text(st.characters(codec="utf-8"), max_size=4)
)
SCALARS = st.one_of(
    st.integers(-9, 9).map(str),
    st.sampled_from(
        ["true", "1.5e3", "1979-05-27 07:32:00Z", "'#]}'", '"\\"=,"', '"""a\n"b" # [x]\n"""', "'''\n'\n'''"]
    ),
)
SPACES = st.sampled_from(["", " ", "\t"])
BREAKS = st.sampled_from(["", "\n", " # ] } = ,\n"])


@st.composite
def values(draw, depth=2):
    kind = draw(st.sampled_from(["scalar", "list", "table"] if depth else ["scalar"]))
    if kind == "scalar":
        return draw(SCALARS)
    if kind == "list":
        return (
            "["
            + ",".join(draw(BREAKS) + draw(values(depth - 1)) + draw(BREAKS) for _ in range(draw(st.integers(0, 3))))
            + "]"
        )
    return "{" + ", ".join(draw(pairs(depth - 1)) for _ in range(draw(st.integers(0, 2)))) + "}"


@st.composite
def pairs(draw, depth=2):
    key = draw(SPACES) + "." + draw(SPACES)
    name = key.join(quote(draw, part) for part in draw(st.lists(KEYS, min_size=1, max_size=3)))
    return f"{name}{draw(SPACES)}={draw(SPACES)}{draw(values(depth))}"


def quote(draw, key):
    is_bare = key != "" and key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return key if is_bare and draw(st.booleans()) else json.dumps(key).replace("\x7f", "\\u007f")


@st.composite
def documents(draw):
    lines = []
    for _ in range(draw(st.integers(0, 8))):
        kind = draw(st.sampled_from(["pair", "pair", "table", "list", "blank"]))
        if kind == "pair":
            lines.append(draw(SPACES) + draw(pairs()) + draw(st.sampled_from(["", " # x = 1"])))
        elif kind == "blank":
            lines.append(draw(st.sampled_from(["", "# [a]", "  "])))
        else:
            opening, closing = ("[", "]") if kind == "table" else ("[[", "]]")
            lines.append(
                opening + ".".join(quote(draw, k) for k in draw(st.lists(KEYS, min_size=1, max_size=2))) + closing
            )
    return draw(st.sampled_from(["\n", "\r\n"])).join(lines) + draw(st.sampled_from(["", "\n"]))


def paths_of(node, path=()):
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths_of(value, (*path, key))


@given(documents())
def test_every_key_and_element_has_a_line_which_holds_it(text):
    try:
        parsed = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    lines = key_lines(text)
    assert set(lines) == set(paths_of(parsed))
    shown = text.replace("\r\n", "\n").split("\n")
    for path, line in lines.items():
        if isinstance(path[-1], str):
            shortest = path[-1] if path[-1].isascii() and path[-1].isprintable() else ""
            assert json.dumps(shortest)[1:-1] in shown[line - 1]


def test_a_key_is_found_in_tables_dotted_keys_and_lists_of_tables():
    text = "a.b = 1\n[t]\nx = [\n  1,\n  2]\ny = {z = {w = 3}}\n[[s]]\nk = 1\n"
    text += '[[s]]\nk = 2\n[s.u]\nv = 1\n[[s.w]]\n[t.n]\n"é" = 1\n'
    lines = key_lines(text)
    wanted = {
        ("a", "b"): 1,
        ("t", "x", 1): 5,
        ("t", "y", "z", "w"): 6,
        ("s", 0, "k"): 8,
        ("s", 1): 9,
        ("s", 1, "k"): 10,
        ("s", 1, "u", "v"): 12,
        ("s", 1, "w", 0): 13,
        ("t", "n", "é"): 15,
    }
    assert {path: lines[path] for path in wanted} == wanted


# -- mutations of a configuration that is right -----------------------------------------------------------------------

RIGHT = {
    "": {"device": '"cpu"', "log_format": '"json"', "log_level": '"info"', "http": '"127.0.0.1:8000"', "stdin": "true"},
    "network": {"kind": '"mlp"', "hidden": "[100]", "width": "1.0", "headroom": "10", "seed": "0"},
    "network.transforms": {"crop": "0", "horizontal_flip": "false"},
    "learning": {"rule": '"threshold"', "lr": "0.001", "steps": "20", "held_out": "0.125", "threads": "1"},
    "recognition": {"scenario": '"NNs"', "false_alarm": "0.001", "memory_rows": "256", "inference": '"exact"'},
    "bank": {"memory_bytes": "1048576"},
    "reservoir": {"enabled": "false", "momentum": "0.9"},
    "intake": {"settle_seconds": "1.0", "max_queue": "256", "dedupe": '"content"', "marker": '"optional"'},
    "columns": {"x": '["a"]', "y": '"label"'},
    "serving": {"max_body_bytes": "1048576", "batch_window_ms": "0.0", "tcp_role": '"admin"', "hosts": '["a"]'},
    "tls": {"certificate": '"/c"', "key": '"/k"'},
    "tracing": {"endpoint": '"http://127.0.0.1:4318"'},
    "sources": {"kind": '"nats"', "name": '"line-3"', "stream": '"s"', "url": '"nats://u:pw@h"'},
}
UNTOUCHED = {"watch", "database", "state", "socket", "grpc", "grpc_socket", "predictions"}
"""Of the kind of others, or given on the command line here."""
OUT_OF_RANGE = {
    "network": [
        ("width", "0.0", "greater than 0"),
        ("headroom", "0", "greater than 0"),
        ("seed", "-1", "greater than or"),
    ],
    "network.transforms": [("crop", "-1", "greater than or equal to 0")],
    "learning": [
        ("lr", "-0.5", "greater than 0"),
        ("held_out", "1.0", "less than 1"),
        ("steps", "0", "greater than 0"),
    ],
    "recognition": [("false_alarm", "0.0", "greater than 0"), ("memory_rows", "-3", "greater than 0")],
    "bank": [("memory_bytes", "0", "greater than 0")],
    "reservoir": [("momentum", "1.0", "less than 1")],
    "intake": [("settle_seconds", "0", "greater than 0"), ("max_queue", "0", "greater than 0")],
    "serving": [("batch_window_ms", "1001.0", "less than or equal to 1000"), ("max_body_bytes", "0", "greater than 0")],
}
UNKNOWN_WORDS = [
    ("", "device", "'auto', 'cpu' or 'cuda'"),
    ("", "log_format", "'auto', 'console' or 'json'"),
    ("", "log_level", "'debug', 'info', 'warning' or 'error'"),
    ("", "http", "HOST:PORT"),
    ("learning", "rule", "'threshold' or 'edge-popup'"),
    ("recognition", "scenario", "'GG', 'GNs', 'GNu' or 'NNs'"),
    ("recognition", "inference", "'exact', 'one-shot', 'binary' or 'recover'"),
    ("intake", "dedupe", "'content' or 'identity'"),
    ("intake", "marker", "'optional' or 'required'"),
    ("serving", "tcp_role", "'predict', 'submit' or 'admin'"),
    ("sources", "kind", "one of 'nats', 'redis', 'kafka'"),
    ("sources", "name", "String should match pattern"),
]


def text_of(tables):
    lines = []
    for name, pairs in tables.items():
        lines += [] if not name else ["[[sources]]"] if name == "sources" else [f"[{name}]"]
        lines += [f"{key} = {value}" for key, value in pairs.items()]
    return "\n".join(lines) + "\n"


def mutation(table, key, value, given, expected):
    """(the right file with this pair put in, the key as it is told, what is given, what is expected)"""
    told = {"": key, "sources": f"sources[0].{key}"}.get(table, f"{table}.{key}")
    return text_of(RIGHT | {table: RIGHT[table] | {key: value}}), told, given, expected


def mutations():
    for table, pairs in RIGHT.items():
        yield mutation(table, "zz", "1", "1", "one of the keys ")
        for key in pairs.keys() - {"kind"}:
            yield mutation(table, key, "{ zz = 1 }", "a table", "")
    for table in RIGHT.keys() - {"", "sources", "network.transforms"}:
        yield text_of({"": RIGHT[""] | {table: "3"}}), table, "3", "a table of settings"
    for table, cases in OUT_OF_RANGE.items():
        for key, value, expected in cases:
            yield mutation(table, key, value, value, expected)
    for table, key, expected in UNKNOWN_WORDS:
        yield mutation(table, key, '"no such"', "'no such'", expected)
    for missing in ("name", "stream"):
        source = {key: value for key, value in RIGHT["sources"].items() if key != missing}
        yield text_of(RIGHT | {"sources": source}), f"sources[0].{missing}", "nothing", "a value"
    for key, value in RIGHT["learning"].items():  # given twice, broken off, with no value
        yield text_of({"learning": {key: f"{value}\n{key} = 7"}}), key, "'7'", "TOML: Cannot overwrite a value"
        yield text_of({"learning": {key: '"x'}}), key, "'\"x'", "TOML: Illegal character"
        yield text_of({"learning": {key: ""}}), key, "''", "TOML: Invalid value"


MUTATIONS = list(mutations())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_mutation_the_file_is_right(folder):
    file = folder / "right.toml"
    file.write_text(text_of(RIGHT))
    assert load_settings({}, file).sources[0].name == "line-3"


@pytest.mark.parametrize(("text", "key", "given", "expected"), MUTATIONS, ids=range(len(MUTATIONS)))
def test_a_wrong_file_is_refused_by_file_line_key_given_and_expected(folder, text, key, given, expected):
    file = folder / "wrong.toml"
    file.write_text(text)
    result = CliRunner().invoke(
        app, ["config", "check", "--config", str(file), "--state", "state", "--socket", "run/s"]
    )
    assert result.exit_code == 78
    (problem,) = result.stderr.splitlines()
    told = re.fullmatch(r"(.*\.toml):(\d+): (\S+): given (.*); expected (.*)", problem)
    assert told, problem
    assert (told[1], told[3], told[4]) == (str(file), key, given)
    assert told[5].startswith(expected)
    assert told[5]
    line = text.splitlines()[int(told[2]) - 1]
    assert line.startswith("[[sources]]" if given == "nothing" else key.split(".")[-1])
    assert sorted(path.name for path in folder.iterdir()) == ["in", "wrong.toml"]


def test_there_are_many_mutations_of_every_section():
    assert len(MUTATIONS) >= 80
    assert set(Settings.model_fields) <= {*RIGHT, *RIGHT[""], *UNTOUCHED}


def test_a_daemon_does_not_start_with_a_wrong_file(folder):
    file = folder / "wrong.toml"
    file.write_text("[learning]\n\nlr = 0\n")
    command = [BIN / "supsupd", "start", "--watch", "in", "--state", "state", "--socket", "run/s", "--config", file]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    wanted = f"{file}:3: learning.lr: given 0; expected greater than 0\n"
    assert (result.returncode, result.stdout, result.stderr) == (78, "", wanted)
    assert sorted(path.name for path in folder.iterdir()) == ["in", "wrong.toml"]


def test_no_secret_of_a_wrong_file_is_told(folder):
    file = folder / "wrong.toml"
    file.write_text('[[sources]]\nkind = "nats"\nname = "a"\nstream = "s"\npassword = "hunter2"\n')
    with pytest.raises(ConfigError) as caught:
        load_settings({}, file)
    assert "hunter2" not in str(caught.value)
    file.write_text('[[sources]]\nurl = "nats://u:hunter2@h"\nurl = "nats://u:hunter2@h"\n')
    with pytest.raises(ConfigError) as caught:
        load_settings({}, file)
    assert "hunter2" not in str(caught.value)
