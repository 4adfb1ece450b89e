"""The configuration: its order, its checks, and one line for each thing that is wrong."""

import os
import re

import pytest

from supsupd.config import ConfigError, load_settings


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SUPSUPD_"):
            monkeypatch.delenv(name)


@pytest.fixture
def watched(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


def write(tmp_path, text):
    file = tmp_path / "supsupd.toml"
    file.write_text(text)
    return file


def problems(flags, file=None):
    with pytest.raises(ConfigError) as caught:
        load_settings(flags, file)
    assert str(caught.value) == "\n".join(caught.value.problems)
    assert all("\n" not in line for line in caught.value.problems)
    return caught.value.problems


def test_flags_go_over_environment_over_file_over_defaults(tmp_path, watched, monkeypatch):
    file = write(tmp_path, 'device = "cpu"\nlog_level = "debug"\n[learning]\nlr = 0.5\nsteps = 7\nminibatch = 9\n')
    monkeypatch.setenv("SUPSUPD_LOG_LEVEL", "error")
    monkeypatch.setenv("SUPSUPD_LEARNING__LR", "0.25")
    flags = {"watch": [watched], "device": "cuda", "learning": {"steps": 3}}
    settings = load_settings(flags, file)
    assert (settings.device, settings.log_level) == ("cuda", "error")
    learning = settings.learning
    assert (learning.steps, learning.lr, learning.minibatch, learning.optimiser) == (3, 0.25, 9, "rmsprop")


def test_a_flag_that_is_not_given_hides_nothing(tmp_path, watched):
    file = write(tmp_path, 'device = "cpu"\n')
    assert load_settings({"watch": [watched], "device": None, "state": None}, file).device == "cpu"


def test_lists_in_the_environment_are_written_like_path(tmp_path, watched, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("SUPSUPD_WATCH", f"{watched}:{other}:")
    monkeypatch.setenv("SUPSUPD_NETWORK__HIDDEN", "64,32")
    monkeypatch.setenv("SUPSUPD_PREDICTIONS", "")
    settings = load_settings()
    assert settings.watch == [watched, other]
    assert settings.network.hidden == [64, 32]
    assert settings.predictions is None


def test_paths_become_absolute_and_know_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    settings = load_settings({"watch": ["in"], "state": "~/state", "socket": "s.sock"})
    assert [str(settings.watch[0]), str(settings.socket)] == [f"{tmp_path}/in", f"{tmp_path}/s.sock"]
    assert str(settings.store) == "/home/somebody/state/supsup.db"


@pytest.mark.parametrize(("said", "meant"), [("H", "entropy"), ("G", "g"), ("g", "g"), ("max-logit", "max-logit")])
def test_an_objective_may_be_called_as_in_the_paper(watched, monkeypatch, said, meant):
    monkeypatch.setenv("SUPSUPD_RECOGNITION__OBJECTIVE", said)
    assert load_settings({"watch": [watched]}).recognition.objective == meant


@pytest.mark.parametrize(
    ("scenario", "rule", "shared"),
    [("GG", "all", False), ("GNs", "labelled", True), ("GNu", "labelled", False), ("NNs", "ignored", True)],
)
def test_a_scenario_says_who_names_a_task_and_whose_labels_count(watched, scenario, rule, shared):
    recognition = load_settings({"watch": [watched], "recognition": {"scenario": scenario}}).recognition
    assert (recognition.task_rule, recognition.labels_shared) == (rule, shared)
    assert load_settings({"watch": [watched]}).recognition.scenario == "NNs"


def test_settings_cannot_be_changed(watched):
    settings = load_settings({"watch": [watched]})
    with pytest.raises(ValueError, match="frozen"):
        settings.device = "cuda"
    with pytest.raises(ValueError, match="frozen"):
        settings.learning.lr = 1.0


def test_loading_creates_nothing(tmp_path, watched):
    flags = {"watch": [watched], "state": tmp_path / "s", "socket": tmp_path / "r" / "x.sock"}
    load_settings({**flags, "predictions": tmp_path / "p"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


BAD_FILES = [
    ("colour = 1", "colour: given 1; expected one of the keys bank, columns, database, device, grpc"),
    ("[learning]\nlrr = 1", "learning.lrr: given 1; expected one of the keys active_tasks"),
    ("[learning]\nlr = 0", "learning.lr: given 0; expected greater than 0"),
    ("[learning]\nlr = nan", "learning.lr: given nan; expected"),
    ('[learning]\nrule = "magic"', "learning.rule: given 'magic'; expected 'threshold' or 'edge-popup'"),
    ("[learning]\nsteps = 2.5", "learning.steps: given 2.5; expected a valid integer"),
    ("[learning]\nheld_out = 1.0", "learning.held_out: given 1.0; expected less than 1"),
    ("learning = 3", "learning: given 3; expected a table of settings"),
    ("[network]\nhidden = [300, 0]", "network.hidden[1]: given 0; expected greater than 0"),
    ("[network]\nseed = -1", "network.seed: given -1; expected greater than or equal to 0"),
    (
        '[recognition]\nobjective = "hope"',
        "recognition.objective: given 'hope'; expected 'entropy', 'g', 'energy', 'max-logit' or 'features'",
    ),
    ('[recognition]\nscenario = "NNu"', "recognition.scenario: given 'NNu'; expected 'GG', 'GNs', 'GNu' or 'NNs'"),
    ('[network]\noutputs = 1\n[recognition]\nobjective = "G"', "network.outputs: given 1; expected 2 or more"),
    ("[serving]\nmax_body_bytes = 0", "serving.max_body_bytes: given 0; expected greater than 0"),
    ('[intake]\nsettle_seconds = "soon"', "intake.settle_seconds: given 'soon'; expected a valid number"),
    ('device = "tpu"', "device: given 'tpu'; expected 'auto', 'cpu' or 'cuda'"),
    ('log_format = "xml"', "log_format: given 'xml'; expected 'auto', 'console' or 'json'"),
    (
        'http = "localhost:80"\ngrpc = "localhost:80"',
        "grpc: given 'localhost:80'; expected another one than that of http",
    ),
    ('http = "localhost"', "http: given 'localhost'; expected HOST:PORT, such as 127.0.0.1:8000"),
    ('socket = "/s"\ngrpc_socket = "/s"', "grpc_socket: given '/s'; expected another one than that of socket"),
    ('state = ""', "state: given ''; expected a path that is not empty"),
    (f'socket = "/{"s" * 120}"', f"socket: given '/{'s' * 120}'; expected a path of at most 107 bytes"),
]


@pytest.mark.parametrize(("text", "wanted"), BAD_FILES, ids=[text[:30] for text, _ in BAD_FILES])
def test_a_bad_value_gives_one_line_with_file_key_given_and_expected(tmp_path, watched, text, wanted):
    file = write(tmp_path, text)
    (problem,) = problems({"watch": [watched]}, file)
    key = re.split(r"[.:\[]", wanted.split(": ")[0].removesuffix("[1]"))[-1]
    line = next(number for number, line in enumerate(text.splitlines(), 1) if line.startswith(key))
    assert problem.startswith(f"{file}:{line}: {wanted}")


def test_every_problem_is_told_at_once_and_by_its_origin(tmp_path, watched, monkeypatch):
    monkeypatch.setenv("SUPSUPD_LEARNING__STEPS", "many")
    monkeypatch.setenv("SUPSUPD_COLOUR", "red")
    file = write(tmp_path, 'log_level = "loud"\n')
    lines = problems({"watch": [watched], "device": "tpu"}, file)
    assert len(lines) == 4
    assert any(line.startswith("command line: --device: given 'tpu'; expected ") for line in lines)
    assert any(line.startswith("environment: SUPSUPD_LEARNING__STEPS: given 'many'; ") for line in lines)
    assert any(line.startswith("environment: SUPSUPD_COLOUR: given 'red'; ") for line in lines)
    assert any(line.startswith(f"{file}:1: log_level: given 'loud'; ") for line in lines)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"\nx = = 1", ":2: x: given '= 1'; expected TOML: Invalid value at column 5"),
        (b"x = 1\nx = 2\n", ":2: x: given '2'; expected TOML: Cannot overwrite a value at column 6"),
        (b"[x", ":1: [x: given ''; expected TOML: Expected ']' at the end of a table declaration"),
        (b"password = 'a\n", ":1: password: given ***; expected TOML"),
        (b"\n\nx = '\xff'", ":3: given the byte 0xff; expected TOML in UTF-8"),
        (None, ": No such file"),
    ],
)
def test_a_file_that_is_not_toml_is_named(tmp_path, watched, content, wanted):
    file = tmp_path / "f.toml"
    if content is not None:
        file.write_bytes(content)
    (line,) = problems({"watch": [watched]}, file)
    assert line.startswith(f"{file}{wanted}")


def test_a_watched_folder_must_exist_and_there_must_be_one(tmp_path):
    (tmp_path / "file").touch()
    lines = problems({"watch": [tmp_path / "none", tmp_path / "file"]})
    assert [line.startswith("command line: --watch: given ") for line in lines] == [True, True]
    (line,) = problems({})
    assert line == "defaults: watch: given []; expected at least one folder to watch, unless stdin or sources are set"


@pytest.mark.parametrize("key", ["state", "socket", "grpc_socket", "predictions"])
def test_what_the_daemon_writes_lies_outside_what_it_watches(tmp_path, watched, key):
    (tmp_path / "link").symlink_to(watched)
    (line,) = problems({"watch": [tmp_path / "link"], key: watched / "x"})
    flag = key.replace("_", "-")
    assert f"--{flag}: given" in line
    for path in (watched / "deep" / "x", tmp_path / "link" / "x", watched / ".." / "in" / "x"):
        (line,) = problems({"watch": [watched], key: path})
        assert line.startswith(f"command line: --{flag}: given ")
        assert line.endswith(f"expected a path outside the watched folder {watched}")


def test_no_watched_folder_lies_in_another(tmp_path, watched):
    assert "outside the watched folder" in problems({"watch": [tmp_path, watched]})[0]
    assert "outside the watched folder" in problems({"watch": [watched, watched]})[0]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hunter2@db/x",
        "postgresql://me:hun@ter2@db/x",
        "postgresql://me@db/x?password=hunter2",
        "postgresql://db/x?sslmode=require&sslpassword=hunter2&password=hun%20ter2&user=me",
    ],
)
def test_no_password_of_a_database_is_shown(watched, url):
    settings = load_settings({"watch": [watched], "database": url})
    shown = settings.model_dump(mode="json")["database"]
    (line,) = problems({"watch": [watched], "database": url.replace("postgresql", "mysql")})
    for text in (shown, line):
        assert "***" in text and "ter2" not in text
    assert settings.database == url
