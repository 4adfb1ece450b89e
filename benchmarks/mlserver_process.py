"""MLServer (PyPI `mlserver`) as a process of an environment of its own, with our network and masks behind it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common import ROOT
from servers import Server, ServerFailed, free_ports

RUNTIME = Path(__file__).resolve().with_name("mlserver_runtime.py")
START_SECONDS, STOP_SECONDS, POLL_SECONDS = 120.0, 15.0, 0.2


@dataclass(frozen=True)
class MlserverSettings:
    """Where None, MLServer's own default stands.

    Args:
        workers: processes beside the one that listens; 0: the model runs in that one.
        joined: requests at most that adaptive batching joins; 0: none.
        debug: its default, with a line in the log for each request.
        gzip: its default, middleware that compresses answers for whoever accepts it.
    """

    name: str
    workers: int | None = None
    joined: int = 0
    debug: bool | None = None
    gzip: bool | None = None

    def to_json(self) -> dict[str, object]:
        """What goes into settings.json."""
        found = {"parallel_workers": self.workers, "debug": self.debug, "gzip_enabled": self.gzip}
        return {name: value for name, value in found.items() if value is not None}


@contextmanager
def mlserver_running(python: Path, state: Path, folder: Path, settings: MlserverSettings) -> Iterator[Server]:
    """MLServer over a copy of `state`; `folder` becomes its model repository. Raises ServerFailed."""
    ports = free_ports(3)
    write_repository(folder, state, settings, ports)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLSERVER_")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [python.with_name("mlserver"), "start", folder], cwd=folder, stdout=log, stderr=log, env=environment
        )
    try:
        address = f"127.0.0.1:{ports[0]}"
        _await_ready(process, address)
        yield Server(address, process.pid)
    except Exception as error:
        with (folder / "log").open(encoding="utf-8", errors="replace") as log_lines:
            error.add_note("the end of MLServer's log:\n" + "".join(deque(log_lines, maxlen=20)))
        raise
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def write_repository(folder: Path, state: Path, settings: MlserverSettings, ports: list[int]) -> None:
    """MLServer's settings, the model's and the runtime. The model opens a copy of `state`."""
    (folder / "watch").mkdir()
    shutil.copytree(state, folder / "state")
    shutil.copy(RUNTIME, folder)
    names = ("http_port", "grpc_port", "metrics_port")
    server = {"host": "127.0.0.1", **dict(zip(names, ports, strict=True)), **settings.to_json()}
    extra = {"state": str(folder / "state"), "packages": [str(ROOT), sysconfig.get_path("purelib")]}
    model: dict[str, object] = {"name": "supsup", "implementation": f"{RUNTIME.stem}.Supermasks"}
    model |= {"parameters": {"extra": extra}}
    if settings.joined:
        model |= {"max_batch_size": settings.joined, "max_batch_time": 0.001}
    (folder / "settings.json").write_text(json.dumps(server), encoding="utf-8")
    (folder / "model-settings.json").write_text(json.dumps(model), encoding="utf-8")


def _await_ready(process: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if (code := process.poll()) is not None:
            raise ServerFailed(f"MLServer ended with exit code {code}")
        try:
            urllib.request.urlopen(f"http://{address}/v2/models/supsup/ready", timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_SECONDS)
        else:
            return
    raise ServerFailed(f"MLServer was not ready within {START_SECONDS:g} s")
