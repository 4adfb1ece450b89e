"""The decoders of what strangers send, fuzzed for a few seconds each from a kept corpus. `make fuzz` takes longer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("fuzz")
SECONDS = 1


def fuzz(name, folder, *options):
    """The fuzzer's process, ended, with what it found in `folder`."""
    (folder / "new").mkdir()
    command = [sys.executable, FOLDER / "fuzz.py", name, f"-max_total_time={SECONDS}", "-seed=6", *options]
    # A child of a small process: a program inherits the peak of memory of who starts it, which the fuzzer limits.
    return subprocess.run(
        ["sh", "-c", '"$0" "$@"; exit $?', *command, folder / "new", FOLDER / "corpus" / name],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_every_decoder_has_a_corpus():
    listed = subprocess.check_output([sys.executable, FOLDER / "fuzz.py"], stderr=subprocess.DEVNULL, text=True)
    assert set(listed.split()) == {path.name for path in (FOLDER / "corpus").iterdir()}


@pytest.mark.parametrize("name", sorted(path.name for path in (FOLDER / "corpus").iterdir()))
def test_no_input_raises_what_is_not_declared_or_takes_long(name, tmp_path):
    told = fuzz(name, tmp_path)
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr[-3000:]
    assert "Done" in told.stderr
