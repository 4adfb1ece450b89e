"""Whatever a request says, answering it reaches for no address and no file."""

import json
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

from asking import INFER, ask, infer

SERVER = Path(__file__).parent / "audited_server.py"
LURES = (
    "http://169.254.169.254/canary",
    "file:///etc/canary",
    "../../../../etc/canary",
    "\\\\canary\\share",
)


def requests(lure):
    """(method, path, JSON) with a lure in every place that takes a text."""
    encoded = quote(lure, safe="")
    tensor = {"name": lure, "shape": [1, 4], "datatype": lure, "data": [lure], "parameters": {lure: lure}}
    yield "POST", INFER, {"inputs": [tensor], "outputs": [{"name": lure, "parameters": {lure: lure}}], "id": lure}
    for parameters in ({"task": lure}, {"method": lure}, {"objective": lure}, {lure: lure}):
        yield "POST", INFER, infer([[1.0] * 4], parameters=parameters, id=lure)
    for region in ("systemsharedmemory", "cudasharedmemory"):
        yield "POST", f"/v2/{region}/region/{encoded}/register", {"key": lure, "offset": 0, "byte_size": 64}
    yield "POST", "/v2/logging", {"log_file": lure}
    yield "POST", "/v2/trace/setting", {"trace_file": lure}
    yield "POST", "/v2/repository/index", {"repository": lure}
    for name in ("task-1", encoded):
        for parameters in (
            {"config": lure},
            {"version": lure},
            {f"file:{lure}": lure},
            {"config": json.dumps({"backend": lure})},
        ):
            yield "POST", f"/v2/repository/models/{name}/load", {"parameters": parameters}
        yield "GET", f"/v2/models/{name}/versions/{encoded}/ready", None
    yield "GET", f"/v1/tasks/{encoded}", None
    yield "PATCH", "/v1/tasks/1", {"name": lure}


def test_no_request_makes_the_server_reach_out(tmp_path):
    path = tmp_path / "s"
    with subprocess.Popen(
        [sys.executable, SERVER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout.readline() == "ready\n"
        for lure in LURES:
            for method, url, body in requests(lure):
                assert ask(path, method, url, json=body, headers={"Referer": lure}).status_code != 500
        reached, _ = server.communicate(timeout=30)
    assert json.loads(reached) == []
    assert server.returncode == 0
