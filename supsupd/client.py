"""A running daemon, from Python: one method for each thing that the socket can do. Needs no torch."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

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

    def tasks(self, retired: bool = False) -> list[dict[str, Any]]:
        """The tasks in use, by id; the retired and merged ones too if asked."""
        return self._ask("GET", "/v1/tasks", params={"all": "true"} if retired else {})

    def task(self, task: int | str) -> dict[str, Any]:
        """One task with its decisions. A text is its key, name or id."""
        return self._ask("GET", _task_path(task))

    def rename(self, task: int | str, name: str) -> dict[str, Any]:
        """The renamed task."""
        return self._ask("PATCH", _task_path(task), content=_to_json({"name": name}))

    def retire(self, task: int | str) -> dict[str, Any]:
        """Takes a task out of use: no longer served, recognised or trained. Nothing of it is lost."""
        return self._ask("POST", _task_path(task) + "/retire")

    def reopen(self, task: int | str) -> dict[str, Any]:
        """Takes a retired task into use again, as it was."""
        return self._ask("POST", _task_path(task) + "/reopen")

    def merge(self, task: int | str, other: int | str) -> dict[str, Any]:
        """Lets `task` answer for `other` from now on, which is retired; returns the task."""
        return self._ask("POST", _task_path(task) + "/merge", content=_to_json({"other": other}))

    def split(self, task: int | str, batch: int) -> dict[str, Any]:
        """Makes a new task of a task's batches from `batch` on, and returns it."""
        return self._ask("POST", _task_path(task) + "/split", content=_to_json({"from": batch}))

    def history(self, task: int | str) -> list[dict[str, Any]]:
        """Every version of a task's mask, oldest first: when, by whom and why it was made, and whether it is served."""
        return self._ask("GET", _task_path(task) + "/history")

    def rollback(self, task: int | str, version: int) -> dict[str, Any]:
        """Gives a task, as a new version, the mask and the record that it had at `version`; returns the task."""
        return self._ask("POST", _task_path(task) + "/rollback", content=_to_json({"to": version}))

    def why(self, batch: int) -> dict[str, Any]:
        """What was decided about a batch: {"batch", "decisions", "versions", "words"}; `words` are plain lines."""
        return self._ask("GET", f"/v1/batches/{batch}/why")

    def batches(self, state: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """The ledger: what became of every batch."""
        query = {key: value for key, value in (("state", state), ("limit", limit)) if value is not None}
        return self._ask("GET", "/v1/batches", params=query)

    def predict(
        self,
        x: np.ndarray,
        task: int | str | None = None,
        per_sample: bool = False,
        method: str | None = None,
        objective: str | None = None,
    ) -> list[dict[str, Any]]:
        """One {"label", "task", "entropy", "known"} for each row of x (n, ...).

        The task is inferred unless given: of each row by itself if `per_sample`, else of all rows together,
        in the daemon's way or by `method` (exact, one-shot, binary, recover) and `objective` (entropy, g, energy,
        max-logit, features).
        Raises ValueError for an x that is not numbers or not finite.
        """
        parameters = {"task": task, "per_sample": per_sample, "method": method, "objective": objective}
        body = _to_json(_infer_request(x, {key: value for key, value in parameters.items() if value is not None}))
        answer = self._ask("POST", "/v2/models/supsup/infer", content=body)
        columns = {output["name"]: output["data"] for output in answer["outputs"]}
        rows = zip(*(columns[field] for field in ROW_FIELDS), strict=True)
        return [dict(zip(ROW_FIELDS, row, strict=True)) for row in rows]

    def batch(self, reference: int | str) -> dict[str, Any]:
        """One row of the ledger, by its id or the SHA-256 of its bytes."""
        return self._ask("GET", f"/v1/batches/{reference}")

    def rejected(self, limit: int | None = None) -> list[dict[str, Any]]:
        """The rejected batches that nobody has dealt with."""
        return self._ask("GET", "/v1/rejected", params={} if limit is None else {"limit": limit})

    def retry(self, batch: int) -> dict[str, Any]:
        """Sends a rejected batch in again; returns its new row."""
        return self._ask("POST", f"/v1/batches/{batch}/retry")

    def drop(self, batch: int) -> dict[str, Any]:
        """Gives up the bytes of a rejected batch; returns its row."""
        return self._ask("POST", f"/v1/batches/{batch}/drop")

    def submit(
        self, name: str, payload: bytes, media_type: str | None = None, key: str | None = None
    ) -> dict[str, Any]:
        """Hands over a batch's bytes in any format that a file may have; on return they are durable.

        Without a `media_type`, the name's suffix tells the format, or else the bytes do. The same `key`, or the same
        bytes, again are the same batch.
        """
        given = {"Content-Type": media_type, "Idempotency-Key": key}
        headers = {name: value for name, value in given.items() if value is not None}
        return self._ask("POST", "/v1/batches", params={"name": name}, content=payload, headers=headers)

    def sources(self) -> list[dict[str, Any]]:
        """What batches come from, with what keeps it from working."""
        return self._ask("GET", "/v1/sources")

    def accept_gap(self, source: str) -> dict[str, Any]:
        """Accepts what a source lost: it goes on."""
        return self._ask("POST", f"/v1/sources/{quote(source, safe='')}/accept")

    def reservoir(self) -> dict[str, Any]:
        """What the Hopfield reservoir holds, what it costs, and how many masks come back from it."""
        return self._ask("GET", "/v1/reservoir")

    def scan(self) -> dict[str, Any]:
        """Asks every source for a full pass: {"pass": its number}."""
        return self._ask("POST", "/v1/scan")

    def wait(self, timeout: float | None = None) -> dict[str, Any]:
        """Waits until all that the sources have now has its state and nothing is queued; returns the
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


def _infer_request(x: np.ndarray, parameters: dict[str, Any]) -> dict[str, Any]:
    datatype = DATATYPE_OF.get(x.dtype.newbyteorder("="))
    if datatype is None:
        raise ValueError(f"x must hold numbers, not {x.dtype}")
    if not np.isfinite(x).all():
        raise ValueError("x holds NaN or infinity")
    data = x.ravel().tolist()
    return {
        "inputs": [{"name": "x", "shape": list(x.shape), "datatype": datatype, "data": data}],
        "outputs": [{"name": field} for field in ROW_FIELDS],
        "parameters": parameters,
    }


def _task_path(task: int | str) -> str:
    """An int is an id and nothing else; a text is what the daemon makes of it."""
    return f"/v1/tasks/{quote(task if isinstance(task, str) else f'id:{task}', safe='')}"


def _to_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
