"""A client with one row at a time over one bare connection, in a process of its own, until its input ends.

Its one argument is JSON: {"host", "port", "headers", "row": hexadecimal bytes}. What it found is JSON on its output.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time

PAUSE_SECONDS = 0.005
PATH = "/v2/models/supsup/infer"
RAW_ROW = {"Inference-Header-Content-Length": "0"}
"""The body is one row in FP32 and nothing else."""


def main() -> None:
    asked = json.loads(sys.argv[1])
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    times, failures = [], []
    connection = http.client.HTTPConnection(asked["host"], asked["port"], timeout=120)
    row, headers = bytes.fromhex(asked["row"]), asked["headers"] | RAW_ROW
    while not ended.wait(PAUSE_SECONDS):
        began = time.monotonic()
        connection.request("POST", PATH, row, headers)
        answer = connection.getresponse()
        body = answer.read()
        times.append(time.monotonic() - began)
        if answer.status != 200:
            failures.append(body.decode()[:200])
    print(json.dumps({"seconds": times, "failures": failures}))


if __name__ == "__main__":
    main()
