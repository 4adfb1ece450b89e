"""Servers over the small engine, each in a process of its own that ends as the daemon does; light, for there is no
torch in them."""

import json
import os
import resource
import threading
import time
import traceback
from pathlib import Path

from credentials import Credentials
from daemon_process import until
from forked_daemon import Nursery, fork_each
from raw_http import Door
from tiny_engine import TinyEngine

from supsupd.sections import ServingSettings
from supsupd.serving.access import Access
from supsupd.serving.front import Front
from supsupd.serving.http.accepting import raise_file_limit
from supsupd.serving.http.app import create_app
from supsupd.serving.listeners import bind_tcp, bind_unix
from supsupd.serving.server import Server
from supsupd.signals import signals_set


def light_nursery():
    """A context manager: the process that forks them."""
    return Nursery(program=__file__)


class ServedProcess:
    """One of them, which answers once this is made.

    Args:
        nursery: forks it.
        folder: its own.
        files: how many open files it may have; None: as many as we.
        limits: of serving.
    """

    def __init__(self, nursery, folder: Path, files=None, **limits):
        folder.mkdir()
        self.path = folder / "s.sock"
        self._told, self._accepted = folder / "told", folder / "accepted"
        request = {"folder": str(folder), "files": files, "limits": limits}
        token = Credentials(folder / "state").granted["admin"]
        self.child = nursery.bear(request)
        port = int(until(lambda: self._told.exists() and self._told.read_text()))
        self.unix, self.tcp = (Door(kind, str(self.path), port, token) for kind in ("unix", "tcp"))

    def stop(self, number, seconds):
        """Its exit code."""
        self.child.send_signal(number)
        return self.child.wait(seconds)

    def accepted(self):
        """Once it has ended: the queries of the requests that came through to be answered."""
        return set(json.loads(self._accepted.read_text()))


class PatientEngine(TinyEngine):
    """Takes a moment for each pass."""

    def is_light(self, questions):
        return False

    def predict(self, questions):
        time.sleep(0.005)
        return super().predict(questions)


def live(request):
    """A child's whole life."""
    folder, accepted = Path(request["folder"]), []
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(log, 1)  # our own is for the parent's answers
    os.dup2(log, 2)
    try:
        if request["files"]:
            resource.setrlimit(resource.RLIMIT_NOFILE, (request["files"], request["files"]))
        raise_file_limit()
        serve(folder, ServingSettings(**request["limits"]), accepted)
        code = 0
    except BaseException:  # noqa: BLE001 - the log is all that is left of it
        traceback.print_exc()
        code = 1
    (folder / "accepted").write_text(json.dumps(accepted))
    os._exit(code)


def serve(folder, limits, accepted):
    """As the daemon does, until a signal."""
    stopping, front = threading.Event(), Front(PatientEngine(), limits)
    access = Access(lambda: front.limits, Credentials(folder / "state").tokens)
    app = create_app(front, access)

    async def noting(scope, receive, send):
        accepted.append(scope["query_string"].decode())
        await app(scope, receive, send)

    with signals_set(stopping) as wait_for_signal:
        listeners = [bind_unix(folder / "s.sock"), bind_tcp("127.0.0.1", 0)]
        server = Server(front, noting, listeners, access=access)
        server.start()
        (folder / "new").write_text(listeners[1].address.rpartition(":")[2])
        (folder / "new").rename(folder / "told")
        while not stopping.is_set():
            wait_for_signal(60)
        front.draining = True
        time.sleep(limits.drain_seconds)
        assert server.stop(limits.shutdown_seconds / 2), "it did not end"


if __name__ == "__main__":
    fork_each(live)
