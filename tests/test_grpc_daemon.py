"""gRPC of a real daemon, over TCP and a Unix socket at once, beside HTTP."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from daemon_process import DaemonProcess, until
from digits import draw, held_out

from supsupd.tokens import Tokens


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpc")
    with DaemonProcess(folder, "--grpc", "127.0.0.1:0", "--grpc-socket", folder / "grpc.sock") as daemon:
        daemon.token = Tokens(daemon.state).create("predict")[1]
        for turn in range(3):
            daemon.drop(f"{turn}", **draw(0, turn))
        daemon.start().wait()
        yield daemon


def tensor(x):
    made = triton.InferInput("x", list(x.shape), "FP32")
    made.set_data_from_numpy(x)
    return [made]


def listening(daemon):
    """HOST:PORT and path, as the log tells them."""
    return daemon.events("grpc_listening")[0]["listening"]


def children(pid):
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


def test_tcp_and_unix_sockets_and_http_give_the_same_answer(daemon):
    x = held_out(0)[0][:40]
    http = daemon.infer(x)
    address, path = listening(daemon)
    for url, headers in ((address, {"authorization": f"Bearer {daemon.token}"}), (f"unix:{path}", None)):
        with triton.InferenceServerClient(url) as client:
            answer = client.infer("supsup", tensor(x), headers=headers)
        for name in ("label", "task", "known"):
            assert answer.as_numpy(name).tolist() == http[name]["data"]
        assert np.allclose(answer.as_numpy("probabilities").ravel(), http["probabilities"]["data"], atol=1e-6)


def test_the_socket_may_do_everything(daemon):
    with triton.InferenceServerClient(f"unix:{listening(daemon)[1]}") as client:
        client.unload_model("task-1")
        try:
            assert not client.is_model_ready("task-1")
        finally:
            client.load_model("task-1")
        assert client.is_model_ready("task-1")


def test_batches_are_still_decoded_when_a_decoder_has_died(daemon):
    for child in children(daemon.process.pid):
        os.kill(child, signal.SIGKILL)
    daemon.drop("after", **draw(0, 7))
    row = until(lambda: (found := daemon.row("after")) and found["state"] not in ("staged", "training") and found)
    assert row["state"] in ("committed", "unsure")  # refused, had nobody decoded it


def test_a_port_that_is_taken_is_one_line_and_exit_75(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with DaemonProcess(tmp_path, "--grpc", address) as daemon:
            Tokens(daemon.state).create("predict")
            said = f"supsupd: {address} can't be listened on: Address already in use"
            assert daemon.refusal() == (75, [said])
            assert not daemon.socket.exists()


def test_who_serves_no_grpc_does_not_load_it():
    program = "import supsupd.reception, sys; assert 'grpc' not in sys.modules and 'google.protobuf' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=180)


def test_a_daemon_that_is_told_to_stop_leaves_no_socket(daemon):
    assert daemon.stop() == 0  # the last test: it is not started again
    assert [path.name for path in daemon.log.parent.iterdir() if path.is_socket()] == []
