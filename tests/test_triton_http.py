"""tritonclient.http and its asyncio form, as they come, in a process of their own, over TCP with a token."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_engine import TinyEngine, port_of, serving

from supsupd.sections import ServingSettings
from supsupd.serving.access import Access
from supsupd.tokens import Tokens

SCRIPT = Path(__file__).parent / "triton_http_calls.py"


@pytest.mark.parametrize("form", ["waiting", "awaited"])
def test_an_unmodified_client_can_make_every_call_that_it_has(tmp_path, form):
    tokens = Tokens(tmp_path)
    _, token = tokens.create("admin")
    access = Access(ServingSettings, tokens, ["127.0.0.1"])
    with serving(TinyEngine(labels=("a", "b", "c")), tmp_path / "s", tcp=True, access=access) as server:
        url = f"127.0.0.1:{port_of(server)}"
        done = subprocess.run([sys.executable, SCRIPT, form, url, token], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
