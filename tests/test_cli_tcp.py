"""`supsup-cli` over TCP: where its address and its token come from, and where the token never goes."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from certificates import Authority
from credentials import Credentials
from daemon_process import until
from test_cli import BIN, one_line, run
from tiny_engine import TinyEngine, port_of, serving

from supsupd.config import CLIENT_VARIABLES, load_settings
from supsupd.sections import ServerTlsSettings, ServingSettings
from supsupd.serving.access import Access
from supsupd.serving.listeners import tls_context


@pytest.fixture
def credentials(tmp_path):
    (tmp_path / "state").mkdir(mode=0o700)
    return Credentials(tmp_path / "state")


@pytest.fixture
def token(credentials):
    return credentials.granted["admin"].removeprefix("Bearer ")


@pytest.fixture
def token_file(token, tmp_path):
    file = tmp_path / "token"
    file.write_text(f"made for: me\n{token}\n")
    return file


@pytest.fixture
def engine():
    return TinyEngine()


@pytest.fixture
def url(engine, credentials, tmp_path):
    access = Access(ServingSettings, credentials.tokens)
    with serving(engine, tmp_path / "s.sock", tcp=True, access=access) as server:
        yield f"http://127.0.0.1:{port_of(server)}"


def test_address_and_token_come_from_flags_or_the_environment_and_flags_win(url, token, token_file, tmp_path):
    for command, environment in (
        (["--url", url, "--token-file", token_file, "status"], {}),
        (["status", "--url", url, "--token-file", token_file], {"SUPSUPD_URL": "http://127.0.0.1:1"}),
        (["--token-file", token_file, "status", "--url", url], {"SUPSUPD_SOCKET": "/none"}),
        (["status"], {"SUPSUPD_URL": url, "SUPSUPD_TOKEN": token}),
        (["status"], {"SUPSUPD_URL": url, "SUPSUPD_TOKEN_FILE": str(token_file), "SUPSUPD_TOKEN": "wrong"}),
        (["status", "--socket", tmp_path / "s.sock"], {"SUPSUPD_URL": "http://127.0.0.1:1"}),
        (["--url", "http://127.0.0.1:1", "status", "--socket", tmp_path / "s.sock"], {}),
    ):
        result = run("supsup-cli", *command, **environment)
        assert (result.returncode, result.stderr) == (0, ""), command
        assert "network.hidden" in result.stdout


def test_without_a_valid_token_one_line_says_so(url, token_file):
    for environment in ({}, {"SUPSUPD_TOKEN": "wrong"}):
        result = run("supsup-cli", "status", "--url", url, **environment)
        assert result.returncode == 1
        assert one_line(result).startswith("unauthenticated")


@pytest.mark.parametrize(
    ("contents", "said"),
    [(None, "No such file"), ("", "no token in it"), ("tökén", "no token in it")],
    ids=["none", "empty", "not ASCII"],
)
def test_a_token_file_that_holds_none_is_told_in_one_line(url, tmp_path, contents, said):
    file = tmp_path / "odd"
    if contents is not None:
        file.write_text(contents)
    result = run("supsup-cli", "status", "--url", url, "--token-file", file)
    assert result.returncode == 66
    assert one_line(result).startswith(f"{file}: {said}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", "http://a", "--socket", "b"], "two daemons"),
        (["--url", "sock"], "expected http"),
        (["--url", "http://a:port"], "Invalid port"),
        (["--url", "https://localhost", "--ca", "/none"], "No such file"),
    ],
    ids=["both", "no URL", "no port", "no authority"],
)
def test_an_address_that_cannot_be_one_is_refused(arguments, said):
    result = run("supsup-cli", "status", *arguments)
    assert result.returncode in (2, 66)
    assert said in re.sub(r"\s+", " ", result.stderr)
    assert "Traceback" not in result.stderr


def test_over_tls_the_authority_is_named(engine, credentials, token_file, tmp_path):
    authority = Authority(tmp_path)
    own, mine = authority.issue(), authority.issue("client")
    tls = tls_context(ServerTlsSettings(certificate=own.certificate, key=own.key, client_ca=authority.certificate))
    both = tmp_path / "both.pem"
    both.write_text(mine.certificate.read_text() + mine.key.read_text())
    access = Access(ServingSettings, credentials.tokens)
    with serving(engine, tmp_path / "s.sock", tcp=True, access=access, tls=tls) as server:
        command = ["status", "--url", f"https://127.0.0.1:{port_of(server)}", "--token-file", token_file]
        right = ["--ca", authority.certificate, "--certificate", both]
        assert run("supsup-cli", *command, *right).returncode == 0
        assert run("supsup-cli", *command, *right[:2]).returncode == 69
        assert run("supsup-cli", *command).returncode == 69


def test_the_token_is_in_no_argument_and_in_no_output(engine, url, token, token_file, tmp_path):
    """While a command waits for its answer, all that the system tells of it is looked at."""
    np.save(tmp_path / "x.npy", np.ones((1000, 4)))
    engine.gate.clear()
    command = [BIN / "supsup-cli", "predict", tmp_path / "x.npy", "--url", url, "--token-file", token_file]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until(engine.entered.is_set)
        arguments = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        engine.gate.set()
        printed, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert b"--token-file" in arguments
    for text in (arguments.decode(), printed, errors):
        assert token not in text


def test_the_clients_variables_are_no_settings_of_the_daemon(tmp_path, monkeypatch):
    for name in CLIENT_VARIABLES:
        monkeypatch.setenv(f"SUPSUPD_{name}", "x")
    assert load_settings({"watch": [str(tmp_path)]}).watch == [tmp_path]
