"""The command lines as their users meet them: real processes, exit codes, and what they print."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from daemon_process import until
from tiny_engine import INPUTS, TinyEngine, serving

from supsupd.client import Client, DaemonUnavailable

BIN = Path(sys.executable).parent


def run(*command, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SUPSUPD_")}
    return subprocess.run(
        [BIN / command[0], *map(str, command[1:])],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=180,
    )


def one_line(result):
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    return result.stderr


@pytest.fixture
def engine():
    return TinyEngine()


@pytest.fixture
def served(engine, tmp_path):
    with serving(engine, tmp_path / "s.sock"):
        yield tmp_path / "s.sock"


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.npz"
    np.savez(file, x=np.random.default_rng(4).normal(size=(5, INPUTS)))
    return file


def test_importing_the_clients_command_line_loads_nothing_heavy():
    heavy = "{'torch', 'httpx', 'sqlalchemy', 'numpy', 'pydantic', 'rich'}"
    code = f"import sys, cli.supsup_cli; print(sorted({heavy} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_a_wrong_setting_is_told_without_waiting_for_torch():
    code = (
        "import sys, cli.supsupd\n"
        "try: cli.supsupd.app(['start', '--device', 'tpu'])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "78 False\n"


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["tasks", "list", "--json"],
        ["tasks", "show", "1"],
        ["tasks", "rename", "1", "a"],
        ["tasks", "retire", "1"],
        ["tasks", "reopen", "1"],
        ["tasks", "merge", "1", "2"],
        ["tasks", "split", "1", "--from", "3"],
        ["tasks", "history", "1"],
        ["tasks", "rollback", "1", "--to", "3"],
        ["tasks", "why", "1"],
        ["batches", "list"],
        ["wait", "--timeout", "1"],
        ["predict", "ROWS"],
    ],
    ids=" ".join,
)
def test_without_a_daemon_one_line_says_so_and_the_exit_code_is_69(command, rows, tmp_path):
    command = [rows if word == "ROWS" else word for word in command]
    result = run("supsup-cli", *command, SUPSUPD_SOCKET=str(tmp_path / "none.sock"))
    assert result.returncode == 69
    assert one_line(result).startswith(f"no supsupd answers at {tmp_path}/none.sock")


def test_the_socket_comes_from_either_flag_or_the_environment(served):
    for command, environment in (
        (["--socket", served, "status"], {"SUPSUPD_SOCKET": "/none"}),
        (["status", "--socket", served], {"SUPSUPD_SOCKET": "/none"}),
        (["--socket", "/none", "status", "--socket", served], {}),
        (["status"], {"SUPSUPD_SOCKET": str(served)}),
    ):
        result = run("supsup-cli", *command, **environment)
        assert (result.returncode, result.stderr) == (0, "")
        assert "network.hidden" in result.stdout


@pytest.mark.parametrize("closed", [(0,), (0, 2), (0, 1, 2)])
def test_closed_standard_streams_are_empty_ones_and_no_other_file(tmp_path, closed):
    close = " ".join(f"{number}>&-" for number in closed)
    start = f"exec {BIN / 'supsupd'} start --stdin --state state --socket sock >log 2>log {close}"
    with subprocess.Popen(["sh", "-c", start], cwd=tmp_path) as it:
        try:
            with Client(tmp_path / "sock") as client:
                until(lambda: it.poll() is not None or answers(client))
                assert it.poll() is None
                assert client.wait(30)["batches"]["quarantined"] == 0
            assert {Path(f"/proc/{it.pid}/fd/{number}").readlink() for number in closed} == {Path(os.devnull)}
        finally:
            it.kill()


def answers(client):
    try:
        return client.status()
    except DaemonUnavailable:
        return None


def test_json_is_one_array_of_objects(served, rows):
    def array(*command):
        result = run("supsup-cli", "--socket", served, *command, "--json")
        assert (result.returncode, result.stderr) == (0, "")
        value = json.loads(result.stdout)
        assert isinstance(value, list)
        assert all(isinstance(row, dict) for row in value)
        return value

    assert array("status")[0]["tasks"] == 2
    assert [task["task"] for task in array("tasks", "list")] == [1, 2]
    assert array("tasks", "show", 2)[0]["decisions"][0]["decision"] == "new"
    assert array("tasks", "retire", 1)[0]["retired"]
    assert [task["task"] for task in array("tasks", "list")] == [2]
    assert [task["task"] for task in array("tasks", "list", "--all")] == [1, 2]
    assert array("tasks", "reopen", "task-1")[0]["retired"] is None
    assert array("tasks", "merge", 2, 1)[0]["task"] == 2
    assert array("tasks", "split", 2, "--from", 4)[0]["name"] == "from-4"
    assert array("tasks", "rollback", 1, "--to", 3)[0]["version"] == 4
    assert array("tasks", "history", 1)[0]["sha256"] == "0" * 64
    assert array("tasks", "why", 1)[0]["words"]
    assert array("batches", "list") == []
    predicted = array("predict", rows, "--per-sample")
    assert len(predicted) == 5
    assert list(predicted[0]) == ["label", "task", "entropy", "known"]
    assert {row["task"] for row in array("predict", rows, "--task", 2)} == {2}


def test_people_get_a_table_that_a_pipe_does_not_cut(served, engine):
    name = "folder/" + "x" * 200 + ".npz"
    engine.ledger.append({"batch": 1, "name": name, "sha256": "ab" * 32, "state": "staged", "reason": None})
    result = run("supsup-cli", "--socket", served, "batches", "list", "--state", "staged")
    heading, row = result.stdout.splitlines()
    assert heading.split() == ["batch", "sender", "name", "sha256", "state", "task", "decision", "reason"]
    assert row.split() == ["1", "-", name, "ab" * 32, "staged", "-", "-", "-"]


def test_names_from_outside_reach_the_terminal_harmless(served, engine):
    engine.ledger.append({"batch": 1, "name": "\x1b[2J[red]\n\udcff", "state": "staged"})
    result = run("supsup-cli", "--socket", served, "batches", "list", PYTHONIOENCODING="utf-8")
    assert result.returncode == 0
    assert "\\x1b[2J[red]\\n\\udcff" in result.stdout


def test_a_task_is_shown_and_renamed(served, engine):
    renamed = run("supsup-cli", "--socket", served, "tasks", "rename", 2, "digits")
    assert (renamed.returncode, renamed.stdout) == (0, "task 2 is now digits\n")
    shown = run("supsup-cli", "--socket", served, "tasks", "show", 2)
    assert "digits" in shown.stdout
    assert "a task of its own" in shown.stdout


def test_what_an_operator_does_is_told_in_one_line(served, engine):
    for command, told in (
        (["retire", "task-1"], "task 1 is retired\n"),
        (["reopen", 1], "task 1 is in use again\n"),
        (["merge", 1, "task-2"], "task 1 answers for task-2 too: 7 batches\n"),
        (["split", 1, "--from", 17], "task 3 has 7 batches from 17 on\n"),
        (["rollback", "task-1", "--to", 5], "task 1 is as it was at version 5, in version 6\n"),
        (["why", 1], "batch 1: \\x1b[2J\n1. known\n"),
    ):
        result = run("supsup-cli", "--socket", served, "tasks", *command)
        assert (result.returncode, result.stdout) == (0, told)
    heading, row = run("supsup-cli", "--socket", served, "tasks", "history", 1).stdout.splitlines()
    assert heading.split()[:3] == ["version", "created", "made_by"]
    assert row.split() == ["1", "-", "daemon", "-", "-", "-", "0" * 12, "yes", "\\x1b[2J"]
    listed = run("supsup-cli", "--socket", served, "tasks", "list", "--all").stdout
    assert "merged_into" in listed.splitlines()[0]


def test_the_daemons_no_is_one_line_and_exit_code_1(served, engine):
    for command, reason in (
        (["tasks", "show", 9], "there is no task 9"),
        (["tasks", "split", "nobody", "--from", 1], "there is no task nobody"),
        (["tasks", "rollback", 9, "--to", 1], "there is no task 9"),
        (["tasks", "why", 9], "there is no batch 9"),
        (["tasks", "rename", 1, "task-2"], "the name task-2 is taken"),
        (["batches", "list", "--state", "lost"], "state must be one of staged, training"),
    ):
        result = run("supsup-cli", "--socket", served, *command)
        assert result.returncode == 1
        assert reason in one_line(result)


def test_wait_returns_0_once_settled_and_1_when_time_is_up(served, engine):
    result = run("supsup-cli", "--socket", served, "wait", "--timeout", 30)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    engine.polls_until_settled = 10**9
    late = run("supsup-cli", "--socket", served, "wait", "--timeout", 0.3)
    assert late.returncode == 1
    assert one_line(late).startswith("not settled after 0.3 s")


def save_bad_files(folder):
    np.savez(folder / "no-x.npz", y=np.ones(3))
    np.save(folder / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(folder / "nan.npy", np.full((1, INPUTS), np.nan))
    np.save(folder / "text.npy", np.array([["a"] * INPUTS]))
    (folder / "empty.npz").touch()
    (folder / "noise.npz").write_bytes(b"PK\x03\x04" + os.urandom(100))
    (folder / "huge.npy").write_bytes(
        b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr':'<f8','fortran_order':False,'shape':(9000000000,9000)}".ljust(118)
    )
    return ["no-x.npz", "objects.npy", "nan.npy", "text.npy", "empty.npz", "noise.npz", "huge.npy"]


def test_a_file_without_rows_is_one_line_and_exit_code_65(served, tmp_path):
    for name in save_bad_files(tmp_path):
        result = run("supsup-cli", "--socket", served, "predict", tmp_path / name)
        assert result.returncode == 65, name
        assert one_line(result).startswith(f"{tmp_path / name}: ")


def test_an_npy_file_is_rows_too(served, tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2, INPUTS), np.uint8))
    result = run("supsup-cli", "--socket", served, "predict", tmp_path / "x.npy")
    assert result.stdout.splitlines()[0].split() == ["label", "task", "entropy", "known"]
    assert len(result.stdout.splitlines()) == 3


def test_wrong_usage_is_exit_code_2(tmp_path):
    for command in (
        ["tasks", "split", "1"],
        ["tasks", "why", "x"],
        ["predict", tmp_path / "none.npz"],
        ["fly"],
        ["wait", "--timeout", "soon"],
    ):
        assert run("supsup-cli", *command).returncode == 2


@pytest.mark.parametrize("program", ["supsupd", "supsup-cli"])
def test_both_programs_know_their_version_and_help(program):
    assert run(program, "--version").stdout == f"{program} 0.1.0\n"
    assert "Commands:" in run(program, "--help").stdout


def test_a_checked_config_is_printed_as_toml_that_loads_again(tmp_path):
    (tmp_path / "in").mkdir()
    file = tmp_path / "c.toml"
    file.write_text(f'watch = ["{tmp_path}/in"]\n[network]\nhidden = [64]\n')
    result = run("supsupd", "config", "check", "--config", file, SUPSUPD_LEARNING__STEPS="5")
    first, *printed = result.stdout.splitlines()
    assert (result.returncode, first) == (0, "ok")
    assert {"network.hidden = [64]", "learning.steps = 5"} <= set(printed)
    again = tmp_path / "again.toml"
    again.write_text("\n".join(printed))
    assert run("supsupd", "config", "check", "--config", again).stdout == result.stdout


@pytest.mark.parametrize("command", [["config", "check"], ["start"]], ids=" ".join)
def test_a_bad_config_is_a_line_for_each_problem_and_exit_code_78(command, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("colour = 1\n[learning]\nlr = -1\n")
    result = run("supsupd", *command, "--config", file, "--watch", tmp_path, "--state", tmp_path / "s" / "t")
    assert result.returncode == 78
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [[f"{file}:3", "learning.lr"], [f"{file}:1", "colour"]]
    assert not (tmp_path / "s").exists()
