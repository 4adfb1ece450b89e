"""A running daemon, from Python: one method for each thing that the socket can do. Needs no torch."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np

from supsupd.serving.protocol import DATATYPE_OF

POLL_SECONDS = 0.2
ROW_FIELDS = ("label", "task", "entropy", "known")


class DaemonUnavailable(Exception):
    """No daemon answers at the socket."""


class DaemonError(Exception):
    """The daemon said no: `status` is the HTTP status, `text` its reason."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Client:
    """A connection to the daemon at the Unix `socket`, with `timeout` seconds for each request.

    Every method raises DaemonUnavailable or DaemonError. A context manager; one thread at a time.
    """

    def __init__(self, socket: Path | str, timeout: float = 60.0) -> None:
        self.socket = Path(socket)
        self.timeout = timeout
        transport = httpx.HTTPTransport(uds=str(socket))
        self._http = httpx.Client(transport=transport, base_url="http://supsupd", timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def status(self) -> dict[str, Any]:
        """The daemon at a glance."""
        return self._ask("GET", "/v1/status")

    def tasks(self) -> list[dict[str, Any]]:
        """All tasks, by id."""
        return self._ask("GET", "/v1/tasks")

    def task(self, task: int) -> dict[str, Any]:
        """One task with its decisions."""
        return self._ask("GET", f"/v1/tasks/{task}")

    def rename(self, task: int, name: str) -> dict[str, Any]:
        """The renamed task."""
        return self._ask("PATCH", f"/v1/tasks/{task}", content=_to_json({"name": name}))

    def batches(self, state: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """The ledger: what became of every batch."""
        query = {key: value for key, value in (("state", state), ("limit", limit)) if value is not None}
        return self._ask("GET", "/v1/batches", params=query)

    def predict(self, x: np.ndarray, task: int | None = None, per_sample: bool = False) -> list[dict[str, Any]]:
        """One {"label", "task", "entropy", "known"} for each row of x (n, ...).

        The task is inferred unless given: of each row by itself if `per_sample`, else of all rows together.
        Raises ValueError for an x that is not numbers or not finite.
        """
        body = _to_json(_infer_request(x, task, per_sample))
        answer = self._ask("POST", "/v2/models/supsup/infer", content=body)
        columns = {output["name"]: output["data"] for output in answer["outputs"]}
        rows = zip(*(columns[field] for field in ROW_FIELDS), strict=True)
        return [dict(zip(ROW_FIELDS, row, strict=True)) for row in rows]

    def submit(self, name: str, payload: bytes) -> dict[str, Any]:
        """Hands over an .npz file's bytes as a batch; on return they are durable."""
        return self._ask("POST", "/v1/batches", params={"name": name}, content=payload)

    def scan(self) -> dict[str, Any]:
        """Asks every source for a full pass: {"pass": its number}."""
        return self._ask("POST", "/v1/scan")

    def wait(self, timeout: float | None = None) -> dict[str, Any]:
        """Waits until all that is in the watched folders now has its state and nothing is queued; returns the
        status then. Raises TimeoutError after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        wanted = self.scan()["pass"]
        while True:
            status = self.status()
            if status["settled"] and all(source["passes"] >= wanted for source in status["sources"]):
                return status
            if deadline is not None and time.monotonic() + POLL_SECONDS > deadline:
                raise TimeoutError(f"not settled after {timeout:g} s: {status['queue']} batches are queued")
            time.sleep(POLL_SECONDS)

    def _ask(self, method: str, path: str, **request: Any) -> Any:
        try:
            response = self._http.request(method, path, **request)
        except httpx.TimeoutException:
            raise DaemonUnavailable(f"supsupd at {self.socket} did not answer in {self.timeout:g} s") from None
        except httpx.TransportError as error:
            raise DaemonUnavailable(f"no supsupd answers at {self.socket}: {error}") from None
        return _read_answer(response)


def _read_answer(response: httpx.Response) -> Any:
    try:
        answer = response.json()
    except ValueError:
        raise DaemonError(response.status_code, f"HTTP {response.status_code} without a JSON answer") from None
    if response.is_success:
        return answer
    text = answer.get("error") if isinstance(answer, dict) else None
    raise DaemonError(response.status_code, text or f"HTTP {response.status_code}")


def _infer_request(x: np.ndarray, task: int | None, per_sample: bool) -> dict[str, Any]:
    datatype = DATATYPE_OF.get(x.dtype.newbyteorder("="))
    if datatype is None:
        raise ValueError(f"x must hold numbers, not {x.dtype}")
    if not np.isfinite(x).all():
        raise ValueError("x holds NaN or infinity")
    parameters: dict[str, Any] = {"per_sample": per_sample}
    if task is not None:
        parameters["task"] = task
    data = x.ravel().tolist()
    return {
        "inputs": [{"name": "x", "shape": list(x.shape), "datatype": datatype, "data": data}],
        "outputs": [{"name": field} for field in ROW_FIELDS],
        "parameters": parameters,
    }


def _to_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
