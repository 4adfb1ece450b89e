"""Asks a server over many connections at once, each with one question after the other; in a process of its own.

It reads orders (`clients.Order`) as JSON, a line each, and answers each with one line of JSON. It imports nothing of
ours, and is the same for every server.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import gevent
import numpy as np
import uvloop
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

OUTPUTS = ("label", "probabilities", "task", "entropy", "known")
PATH = "/v2/models/supsup/infer"


class Tally:
    """What came back: how long each answered request took, in ms, and how many had which status."""

    def __init__(self, seconds: float) -> None:
        self.statuses: Counter[int] = Counter()
        self.milliseconds: list[float] = []
        self.right = 0
        self.retry_after = 0
        self._begun = time.perf_counter()
        self._end = self._begun + seconds

    @property
    def is_over(self) -> bool:
        return time.perf_counter() >= self._end

    def count(self, status: int, began: float) -> None:
        self.statuses[status] += 1
        if status == 200:
            self.milliseconds.append(1000 * (time.perf_counter() - began))

    def written(self, times: str) -> dict[str, Any]:
        """What goes back; the times lie in the file `times`: there may be hundreds of thousands of them."""
        np.save(times, np.array(self.milliseconds, np.float32))
        return {
            "seconds": time.perf_counter() - self._begun,
            "statuses": dict(self.statuses),
            "right": self.right,
            "retry_after": self.retry_after,
        }


class Questions:
    """The arrays x float32 (questions, rows, inputs), task and label (questions,) of a file; taken in turn."""

    def __init__(self, order: dict[str, Any]) -> None:
        with np.load(order["questions"]) as file:
            self.x, self.tasks, self.labels = file["x"], file["task"].tolist(), file["label"].tolist()
        self.binary, self.given = order["binary"], order["given"]

    def turns(self) -> Iterator[int]:
        return itertools.cycle(range(len(self.x)))

    def parameters(self, number: int) -> dict[str, int]:
        return {"task": self.tasks[number]} if self.given else {}

    def tensor(self, number: int) -> list[InferInput]:
        tensor = InferInput("x", self.x[number].shape, "FP32")
        tensor.set_data_from_numpy(self.x[number], binary_data=self.binary)
        return [tensor]

    def outputs(self) -> list[InferRequestedOutput]:
        return [InferRequestedOutput(name, binary_data=self.binary) for name in OUTPUTS]

    def is_right(self, number: int, label: int, task: int) -> bool:
        return (label, task) == (self.labels[number], self.tasks[number])


def ask_by_tritonclient(order: dict[str, Any]) -> dict[str, Any]:
    """One unmodified client with as many connections as greenlets; a time is from the arrays to the arrays."""
    questions, headers = Questions(order), order["headers"]
    tensors, outputs, turns = (
        [questions.tensor(i) for i in range(len(questions.x))],
        questions.outputs(),
        questions.turns(),
    )
    client = InferenceServerClient(order["address"], concurrency=order["connections"])

    def loop() -> None:
        while not tally.is_over:
            number, began = next(turns), time.perf_counter()
            try:
                answer = client.infer(
                    "supsup",
                    tensors[number],
                    outputs=outputs,
                    headers=dict(headers),
                    parameters=questions.parameters(number),
                )
                label, task = (int(answer.as_numpy(name).flat[0]) for name in ("label", "task"))
            except InferenceServerException as error:
                tally.count(int(error.status() or 0), began)
            else:
                tally.count(200, began)
                tally.right += questions.is_right(number, label, task)

    tally = Tally(order["seconds"])
    gevent.joinall([gevent.spawn(loop) for _ in range(order["connections"])], raise_error=True)
    client.close()
    return tally.written(order["times"])


def requests_of(order: dict[str, Any]) -> list[bytes]:
    """Whole HTTP requests, as the client above sends them."""
    questions, requests = Questions(order), []
    for number in range(len(questions.x)):
        body, json_size = InferenceServerClient.generate_request_body(
            questions.tensor(number), outputs=questions.outputs(), parameters=questions.parameters(number)
        )
        headers = {**order["headers"], "Host": "localhost", "Content-Length": len(body)}
        if json_size is not None:
            headers["Inference-Header-Content-Length"] = json_size
        lines = [f"POST {PATH} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        requests.append("\r\n".join(lines).encode() + body)
    return requests


def field(head: bytes, name: bytes) -> bytes:
    """A header's value, empty where it is not sent; all in small letters."""
    return head.partition(b"\r\n" + name + b":")[2].partition(b"\r\n")[0]


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, bytes]:
    """The status and the header lines of the answer, which is read whole."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    await reader.readexactly(int(field(head, b"content-length")))
    return int(head[9:12]), head


async def ask_raw(order: dict[str, Any]) -> dict[str, Any]:
    """The same requests, made beforehand, over bare connections: it costs the client next to nothing."""
    requests = requests_of(order)
    turns = itertools.cycle(requests)

    async def loop() -> None:
        while not tally.is_over:
            began = time.perf_counter()
            try:
                reader, writer = await connect(order["address"])
                while not tally.is_over:
                    began = time.perf_counter()
                    status, head = await exchange(reader, writer, next(turns))
                    tally.count(status, began)
                    if told := field(head, b"retry-after"):
                        tally.retry_after += 1
                        await asyncio.sleep(int(told))
                writer.close()
            except (OSError, EOFError):
                tally.count(0, began)

    tally = Tally(order["seconds"])
    await asyncio.gather(*(loop() for _ in range(order["connections"])))
    return tally.written(order["times"])


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """`address`: HOST:PORT, or the path of a Unix socket."""
    if address.startswith("/"):
        return await asyncio.open_unix_connection(address)
    host, port = address.rsplit(":", 1)
    return await asyncio.open_connection(host, int(port))


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        answer = uvloop.run(ask_raw(order)) if order["raw"] else ask_by_tritonclient(order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
