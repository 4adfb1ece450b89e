"""All that a daemon can be asked, one method each."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import quote

import numpy as np

from supsupd.answers import (
    Batch,
    Gap,
    MaskVersion,
    RejectedBatch,
    Reservoir,
    Row,
    Scan,
    Source,
    StagedBatch,
    Status,
    Story,
    Task,
    TaskInDetail,
)
from supsupd.choices import PAGE_ROWS
from supsupd.client.calls import Call, Pause, Steps, given, read_ok, read_text, read_yes, request, to_json
from supsupd.client.tensors import infer_request, read_rows
from supsupd.model_answers import Model, ModelConfig, ModelState, Server, Statistics
from supsupd.serving.engine import MODEL_NAME

POLL_SECONDS = 0.2
_STATUS: Call[Status] = Call("GET", "/v1/status")
_SCAN: Call[Scan] = Call("POST", "/v1/scan")


class Requests:
    """All that a daemon can be asked. A task that is an int is an id; a text is its key, name or id."""

    @request
    def status(self) -> Call[Status]:
        """The daemon at a glance."""
        return _STATUS

    @request
    def tasks(self, retired: bool = False) -> Call[list[Task]]:
        """The tasks in use, by id; the retired and merged ones too if asked."""
        return Call("GET", "/v1/tasks", {"all": "true"} if retired else {})

    @request
    def task(self, task: int | str) -> Call[TaskInDetail]:
        """One task with its decisions."""
        return Call("GET", _task_path(task))

    @request
    def rename(self, task: int | str, name: str) -> Call[Task]:
        """The renamed task."""
        return Call("PATCH", _task_path(task), content=to_json({"name": name}))

    @request
    def retire(self, task: int | str) -> Call[Task]:
        """Takes a task out of use: no longer served, recognised or trained. Nothing of it is lost."""
        return Call("POST", _task_path(task) + "/retire")

    @request
    def reopen(self, task: int | str) -> Call[Task]:
        """Takes a retired task into use again, as it was."""
        return Call("POST", _task_path(task) + "/reopen")

    @request
    def merge(self, task: int | str, other: int | str) -> Call[Task]:
        """Lets `task` answer for `other` from now on, which is retired; returns the task."""
        return Call("POST", _task_path(task) + "/merge", content=to_json({"other": other}))

    @request
    def split(self, task: int | str, batch: int) -> Call[Task]:
        """Makes a new task of a task's batches from `batch` on, and returns it."""
        return Call("POST", _task_path(task) + "/split", content=to_json({"from": batch}))

    @request
    def history(self, task: int | str) -> Call[list[MaskVersion]]:
        """Every version of a task's mask, oldest first: when, by whom and why it was made, and whether it is served."""
        return Call("GET", _task_path(task) + "/history")

    @request
    def rollback(self, task: int | str, version: int) -> Call[Task]:
        """Gives a task, as a new version, the mask and the record that it had at `version`; returns the task."""
        return Call("POST", _task_path(task) + "/rollback", content=to_json({"to": version}))

    @request
    def predict(
        self,
        x: np.ndarray,
        task: int | str | None = None,
        per_sample: bool = False,
        method: str | None = None,
        objective: str | None = None,
    ) -> Call[list[Row]]:
        """One {"label", "task", "entropy", "known"} for each row of x (n, ...).

        The task is inferred unless given: of each row by itself if `per_sample`, else of all rows together,
        in the daemon's way or by `method` (exact, one-shot, binary, recover) and `objective` (entropy, g, energy,
        max-logit, features).
        Raises ValueError for an x that is not numbers or not finite.
        """
        parameters = given(task=task, per_sample=per_sample, method=method, objective=objective)
        content, headers = infer_request(x, parameters)
        return Call("POST", f"/v2/models/{MODEL_NAME}/infer", content=content, headers=headers, read=read_rows)

    @request
    def live(self) -> Call[bool]:
        """Whether the daemon runs. Where it does not, DaemonUnavailable is raised."""
        return Call("GET", "/v2/health/live", read=read_yes)

    @request
    def ready(self) -> Call[bool]:
        """Whether it can predict, and is not about to end."""
        return Call("GET", "/v2/health/ready", read=read_yes)

    @request
    def server(self) -> Call[Server]:
        """What the daemon is, and which extensions of the protocol it speaks."""
        return Call("GET", "/v2")

    @request
    def models(self, ready: bool = False) -> Call[list[ModelState]]:
        """Every version of every model, or only those that can be asked."""
        return Call("POST", "/v2/repository/index", content=to_json({"ready": ready}))

    @request
    def model(self, name: str = MODEL_NAME, version: int | None = None) -> Call[Model]:
        """A model's versions, inputs and outputs. Without a version, this and the next three mean the newest."""
        return Call("GET", _model_path(name, version))

    @request
    def model_ready(self, name: str = MODEL_NAME, version: int | None = None) -> Call[bool]:
        """Whether a model can be asked."""
        return Call("GET", _model_path(name, version) + "/ready", read=read_yes)

    @request
    def model_config(self, name: str = MODEL_NAME, version: int | None = None) -> Call[ModelConfig]:
        """A model's configuration, in Triton's words."""
        return Call("GET", _model_path(name, version) + "/config")

    @request
    def statistics(self, name: str = MODEL_NAME, version: int | None = None) -> Call[Statistics]:
        """How often a model was asked, and how long it took, in Triton's words."""
        return Call("GET", _model_path(name, version) + "/stats")

    @request
    def load(self, name: str, version: int | None = None) -> Call[None]:
        """Takes the model of a retired task into use again, or rolls it back to a version."""
        parameters = given(version=version)
        return Call(
            "POST",
            f"/v2/repository/models/{_quoted(name)}/load",
            content=to_json({"parameters": parameters}),
            read=read_ok,
        )

    @request
    def unload(self, name: str) -> Call[None]:
        """Retires the task of a model."""
        return Call("POST", f"/v2/repository/models/{_quoted(name)}/unload", read=read_ok)

    @request
    def metrics(self) -> Call[str]:
        """What the daemon counts, in the text form of Prometheus."""
        return Call("GET", "/metrics", read=read_text)

    @request
    def submit(
        self, name: str, payload: bytes, media_type: str | None = None, key: str | None = None
    ) -> Call[StagedBatch]:
        """Hands over a batch's bytes in any format that a file may have; on return they are durable.

        Without a `media_type`, the name's suffix tells the format, or else the bytes do. The same `key`, or the same
        bytes, again are the same batch.
        """
        headers = given(**{"Content-Type": media_type, "Idempotency-Key": key})
        return Call("POST", "/v1/batches", {"name": name}, payload, headers)

    @request
    def batches(self, state: str | None = None, limit: int | None = None) -> Steps[list[Batch]]:
        """The ledger: what became of every batch."""
        rows: list[Batch] = yield from _pages("/v1/batches", limit, state=state)
        return rows

    @request
    def batch(self, reference: int | str) -> Call[Batch]:
        """One row of the ledger, by its id or the SHA-256 of its bytes."""
        return Call("GET", f"/v1/batches/{_quoted(reference)}")

    @request
    def why(self, batch: int) -> Call[Story]:
        """What was decided about a batch; its `words` are plain lines."""
        return Call("GET", f"/v1/batches/{batch}/why")

    @request
    def rejected(self, limit: int | None = None) -> Steps[list[RejectedBatch]]:
        """The rejected batches that nobody has dealt with."""
        rows: list[RejectedBatch] = yield from _pages("/v1/rejected", limit)
        return rows

    @request
    def retry(self, batch: int) -> Call[Batch]:
        """Sends a rejected batch in again; returns its new row."""
        return Call("POST", f"/v1/batches/{batch}/retry")

    @request
    def drop(self, batch: int) -> Call[Batch]:
        """Gives up a batch that waits or was rejected, with its bytes; returns its row."""
        return Call("POST", f"/v1/batches/{batch}/drop")

    @request
    def sources(self) -> Call[list[Source]]:
        """What batches come from, with what keeps it from working."""
        return Call("GET", "/v1/sources")

    @request
    def accept_gap(self, source: str) -> Call[Gap]:
        """Accepts what a source lost: it goes on."""
        return Call("POST", f"/v1/sources/{_quoted(source)}/accept")

    @request
    def reservoir(self) -> Call[Reservoir]:
        """What the Hopfield reservoir holds, what it costs, and how many masks come back from it."""
        return Call("GET", "/v1/reservoir")

    @request
    def scan(self) -> Call[Scan]:
        """Asks every source for a full pass: {"pass": its number}."""
        return _SCAN

    @request
    def wait(self, timeout: float | None = None) -> Steps[Status]:
        """Waits until all that the sources have now has its state and nothing is queued; returns the
        status then. Raises TimeoutError after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        wanted = (yield from _SCAN)["pass"]
        while True:
            status = yield from _STATUS
            if status["settled"] and all(source["passes"] >= wanted for source in status["sources"]):
                return status
            if deadline is not None and time.monotonic() + POLL_SECONDS > deadline:
                raise TimeoutError(f"not settled after {timeout:g} s: {_unsettled(status, wanted)}")
            yield Pause(POLL_SECONDS)


def _unsettled(status: Status, wanted: int) -> str:
    """What is still to come, and what keeps it away."""
    told = [f"{status['queue']} batches are queued"]
    for source in status["sources"]:
        if source["passes"] < wanted or source["pending"]:
            told.append(f"{source['name']}: {source['problem'] or 'is being read'}")
    return "; ".join(told)


def _task_path(task: int | str) -> str:
    return f"/v1/tasks/{_quoted(task if isinstance(task, str) else f'id:{task}')}"


def _model_path(name: str, version: int | None) -> str:
    return f"/v2/models/{_quoted(name)}" + ("" if version is None else f"/versions/{version}")


def _quoted(text: int | str) -> str:
    """As one part of a path, where dots alone would lead up."""
    quoted = quote(str(text), safe="")
    return quoted.replace(".", "%2E") if quoted in (".", "..") else quoted


def _pages(path: str, limit: int | None, **asked: str | None) -> Steps[list[Any]]:
    """All rows of a list, or the first `limit`, a page at a time."""
    rows: list[Any] = []
    while limit is None or len(rows) < limit:
        wanted = PAGE_ROWS if limit is None else min(PAGE_ROWS, limit - len(rows))
        after = rows[-1]["batch"] if rows else None
        page: list[Any] = yield from Call("GET", path, given(**asked, limit=wanted, after=after))
        rows += page
        if len(page) < wanted:
            break
    return rows
