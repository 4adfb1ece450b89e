"""Logs: one stream on stderr, as objects for machines, or as lines that no terminal obeys for people."""

import json
import subprocess
import sys

SCRIPT = """
import logging, structlog
from supsupd import logs
logs.configure({format!r}, "info")
log = structlog.get_logger("supsupd.storage")
log.info("batch_staged", name="a\\x1b[2J.npz", batch=3)
log.debug("hidden")
logging.getLogger("uvicorn.error").info("hidden")
logging.getLogger("uvicorn.error").warning("%s is slow", "disk")
secret = "swordfish"
try:
    1 / 0
except ZeroDivisionError:
    log.exception("loop_failed")
"""


def lines(log_format):
    script = SCRIPT.format(format=log_format)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == ""
    assert "hidden" not in result.stderr
    assert "swordfish" not in result.stderr
    assert "\x1b" not in result.stderr
    return result.stderr.splitlines()


def test_json_logs_are_an_object_a_line_whoever_speaks():
    for log_format in ("json", "auto"):  # auto: stderr is a pipe here
        staged, slow, failed = map(json.loads, lines(log_format))
        assert (staged["event"], staged["logger"], staged["batch"]) == ("batch_staged", "supsupd.storage", 3)
        assert (slow["event"], slow["logger"], slow["level"]) == ("disk is slow", "uvicorn.error", "warning")
        assert "ZeroDivisionError" in failed["exception"]


def test_console_logs_are_lines_for_people():
    staged, slow, failed, *traceback = lines("console")
    assert "batch_staged" in staged
    assert "batch=3" in staged
    assert "disk is slow" in slow
    assert "loop_failed" in failed
    assert traceback[-1] == "ZeroDivisionError: division by zero"


# -- whoever reads the log stops reading ------------------------------------------------------------------------------

STALLED = """
import sys, structlog, time
from supsupd import logs
logs.configure("json", "info", logs.PatientHandler(sys.stderr.fileno()))
log = structlog.get_logger("supsupd.test")
for number in range(3000):
    log.info("said", number=number, filling="x" * 1000)
print(logs.problem(), flush=True)
sys.stdin.readline()
while logs.problem() is not None:
    time.sleep(0.01)
log.info("the end")
"""


def start_stalled(script):
    return subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_pipe_that_nobody_reads_holds_up_nothing_and_what_was_lost_is_told():
    with start_stalled(STALLED) as process:
        told = process.stdout.readline()  # all has been said by then
        assert told.startswith("whoever reads stderr has stopped: ")
        said, errors = process.communicate("go on\n", timeout=60)
    *numbered, lost, end = map(json.loads, errors.splitlines())
    assert (process.returncode, said) == (0, "")
    assert [line["number"] for line in numbered] == list(range(len(numbered)))
    assert (lost["event"], lost["lines"]) == ("log_lines_lost", 3000 - len(numbered))
    assert 100 < len(numbered) < 3000
    assert end["event"] == "the end"


def test_a_process_ends_though_nobody_reads_its_log():
    with start_stalled(STALLED.replace("while logs.problem() is not None", "while False")) as process:
        process.stdout.readline()
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.wait(60) == 0
        process.stderr.close()


def test_as_long_as_lines_are_written_each_is_before_what_follows():
    script = STALLED.replace('"x" * 1000', '""').replace("3000", "50").split("print")[0] + "import os; os._exit(0)"
    with start_stalled(script) as process:
        _, errors = process.communicate(timeout=60)
    assert [json.loads(line)["number"] for line in errors.splitlines()] == list(range(50))
