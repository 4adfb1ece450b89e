"""What is said of the routes under /v1."""

from __future__ import annotations

from collections.abc import Mapping

from supsupd.answers import (
    Batch,
    Gap,
    MaskVersion,
    RejectedBatch,
    Reservoir,
    Scan,
    Source,
    StagedBatch,
    Status,
    Story,
    Task,
    TaskInDetail,
)
from supsupd.choices import BATCH_STATES, PAGE_ROWS
from supsupd.serving.http.operation import (
    BINARY,
    BYTES,
    JSON,
    NUMBER,
    STRING,
    Operation,
    Schema,
    either,
    table,
    text,
    words,
)

PRINTABLE = {**text(1, 255), "pattern": r"^[\x20-\x7E]+$"}
PAGE = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 10**18 - 1},
    "after": {"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
}
ID = {"batch": {"type": "integer", "minimum": 0, "maximum": 10**18 - 1, "examples": [1]}}
REFERENCE = {"task": {**text(1, 300), "examples": ["1", "task-2"]}}
_TASK, _BATCH = "/v1/tasks/{task}", "/v1/batches/{batch}"
BATCH_FORMATS = (
    "application/x-npz",
    "application/x-npy",
    "application/x-tar",
    "text/csv",
    "application/vnd.apache.parquet",
    "application/vnd.apache.arrow.file",
    "application/vnd.apache.arrow.stream",
    "application/x-ndjson",
    "application/jsonl",
)


def _one(name: str, schema: Schema) -> dict[str, Schema]:
    """The body {name: value}."""
    return {JSON: table({name: schema}, name, closed=True)}


def _on_task(summary: str, body: Mapping[str, Schema] | None = None) -> Operation:
    return Operation(summary, Task, path=REFERENCE, body=body or {}, errors=(409,))


NATIVE: Mapping[str, Operation] = {
    "GET /openapi.json": Operation("This description.", dict),
    "GET /v1/status": Operation("The daemon at a glance.", Status),
    "GET /v1/tasks": Operation(
        "The tasks in use; the retired and merged ones too if asked.", list[Task], query={"all": words("true", "false")}
    ),
    f"GET {_TASK}": Operation("One task with its decisions.", TaskInDetail, path=REFERENCE, errors=(409,)),
    f"PATCH {_TASK}": _on_task("Renames a task.", _one("name", {**text(1, 64), "pattern": r"^[A-Za-z0-9_.-]+$"})),
    f"GET {_TASK}/history": Operation(
        "Every version of its mask, oldest first.", list[MaskVersion], path=REFERENCE, errors=(409,)
    ),
    f"POST {_TASK}/retire": _on_task("Takes a task out of use; nothing of it is lost."),
    f"POST {_TASK}/reopen": _on_task("Takes a retired task into use again, as it was."),
    f"POST {_TASK}/merge": _on_task(
        "Lets a task answer for another, which is retired.", _one("other", either(NUMBER, STRING))
    ),
    f"POST {_TASK}/split": _on_task("Makes a new task of a task's batches from one on.", _one("from", NUMBER)),
    f"POST {_TASK}/rollback": _on_task("Gives a task the mask of an earlier version.", _one("to", NUMBER)),
    "GET /v1/batches": Operation(
        f"The ledger, oldest first; at most {PAGE_ROWS} rows at once, those after an id.",
        list[Batch],
        query={"state": words(*BATCH_STATES), **PAGE},
    ),
    "POST /v1/batches": Operation(
        "Hands a batch over; the answer comes when its bytes are durable.",
        StagedBatch,
        202,
        query={"name": PRINTABLE},
        required=("name",),
        headers={"Idempotency-Key": PRINTABLE},
        body=dict.fromkeys((BYTES, *BATCH_FORMATS), BINARY) | {JSON: {}},
        errors=(409,),
    ),
    f"GET {_BATCH}": Operation(
        "One batch, by its id or the SHA-256 of its bytes.",
        Batch,
        path={"batch": either(ID["batch"], {"type": "string", "pattern": "^[0-9a-f]{64}$"})},
    ),
    f"GET {_BATCH}/why": Operation("All that was decided about a batch, in words too.", Story, path=ID),
    f"POST {_BATCH}/retry": Operation("Sends a rejected batch in again.", Batch, 202, path=ID, errors=(409,)),
    f"POST {_BATCH}/drop": Operation("Gives up a batch that waits or was rejected.", Batch, path=ID, errors=(409,)),
    "GET /v1/rejected": Operation(
        f"The rejected batches that nobody has dealt with; at most {PAGE_ROWS} at once, those after an id.",
        list[RejectedBatch],
        query=PAGE,
    ),
    "GET /v1/sources": Operation("What batches come from.", list[Source]),
    "POST /v1/sources/{source}/accept": Operation("Accepts what a source lost: it goes on.", Gap),
    "GET /v1/reservoir": Operation("What the Hopfield reservoir holds.", Reservoir),
    "POST /v1/scan": Operation("Asks for a full pass over all sources.", Scan),
}
