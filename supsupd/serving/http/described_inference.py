"""What is said of the routes of the Open Inference Protocol, and of Triton's extensions of it, under /v2."""

from __future__ import annotations

from collections.abc import Mapping

from supsupd.choices import METHODS, OBJECTIVE_ALIASES, OBJECTIVES
from supsupd.model_answers import (
    Done,
    Inferred,
    IsLive,
    IsReady,
    LogSettings,
    Model,
    ModelConfig,
    ModelIsReady,
    ModelState,
    Server,
    Statistics,
)
from supsupd.serving.http.operation import (
    BINARY,
    BOOLEAN,
    BYTES,
    JSON,
    NUMBER,
    STRING,
    Operation,
    array,
    either,
    table,
    words,
)
from supsupd.serving.oip.outputs import OUTPUTS
from supsupd.serving.oip.protocol import INPUT
from supsupd.serving.oip.tensors import DATATYPES, LARGEST_SIZE, MAX_DIMENSIONS

MODEL = {
    "model": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$", "examples": ["supsup", "task-1"]},
    "version": {"type": "string", "pattern": "^[0-9]{1,18}$", "examples": ["1"]},
}
SIZE = {"type": "integer", "minimum": 1, "maximum": LARGEST_SIZE}
INPUT_TENSOR = table(
    {
        "name": words(INPUT),
        "shape": {**array(SIZE), "minItems": 2, "maxItems": MAX_DIMENSIONS},
        "datatype": words(*DATATYPES),
        "data": {"type": "array"},
    },
    "name",
    "shape",
    "datatype",
    "data",
)
OUTPUT = table(
    {
        "name": words(*OUTPUTS),
        "parameters": table({"binary_data": BOOLEAN, "classification": {"type": "integer", "minimum": 1}}),
    },
    "name",
)
QUERY = table(
    {
        "id": STRING,
        "inputs": {**array(INPUT_TENSOR), "minItems": 1, "maxItems": 1},
        "outputs": array(OUTPUT),
        "parameters": table(
            {
                "task": either(NUMBER, STRING),
                "per_sample": BOOLEAN,
                "method": words(*METHODS),
                "objective": words(*OBJECTIVES, *OBJECTIVE_ALIASES),
                "timeout": {**NUMBER, "description": "Microseconds; 0: none."},
                "binary_data_output": BOOLEAN,
            }
        ),
    },
    "inputs",
)
LEVELS = table(
    {
        "log_info": BOOLEAN,
        "log_warning": BOOLEAN,
        "log_error": BOOLEAN,
        "log_verbose_level": {"type": "integer"},
        "log_file": words(""),
        "log_format": words("default"),
    },
    closed=True,
)


def _model(path: str) -> dict[str, Operation]:
    return {
        f"GET {path}": Operation("A model's versions, inputs and outputs.", Model, path=MODEL),
        f"GET {path}/ready": Operation("Whether it can be asked: 200, else 503.", ModelIsReady, path=MODEL),
        f"GET {path}/config": Operation("Its configuration, in Triton's words.", ModelConfig, path=MODEL),
        f"GET {path}/stats": Operation("What it has answered.", Statistics, path=MODEL),
        f"POST {path}/infer": Operation(
            "Predicts. Raw tensors stand behind the JSON, in a body of application/octet-stream.",
            Inferred,
            media_types=(BYTES,),
            path=MODEL,
            headers={"Inference-Header-Content-Length": {"type": "integer", "minimum": 0}},
            body={JSON: QUERY, BYTES: BINARY},
            errors=(409, 429, 501),
        ),
    }


def _load(summary: str) -> Operation:
    body = {JSON: table({"parameters": table({})})}
    return Operation(summary, Done, path=MODEL, body=body, body_required=False, errors=(409, 501))


def _not_served(path: str) -> dict[str, Operation]:
    return {f"{method} {path}": Operation("Not served.", path=MODEL, errors=(501,)) for method in ("GET", "POST")}


INFERENCE: Mapping[str, Operation] = {
    "GET /v2": Operation("The server, and the extensions that it speaks.", Server),
    "GET /v2/": Operation("The same.", Server),
    "GET /v2/health/live": Operation("Whether it runs.", IsLive),
    "GET /v2/health/ready": Operation("Whether it can be asked: 200, else 503.", IsReady),
    **_model("/v2/models/{model}"),
    **_model("/v2/models/{model}/versions/{version}"),
    "GET /v2/models/stats": Operation("What all models have answered.", Statistics),
    "POST /v2/repository/index": Operation(
        "Every version of every model.", list[ModelState], body={JSON: table({"ready": BOOLEAN})}, body_required=False
    ),
    "POST /v2/repository/models/{model}/load": _load(
        "Takes the model of a retired task into use again, or rolls it back to the parameter version."
    ),
    "POST /v2/repository/models/{model}/unload": _load("Retires the task of a model."),
    "GET /v2/logging": Operation("What is logged.", LogSettings),
    "POST /v2/logging": Operation("Changes what is logged.", LogSettings, body={JSON: LEVELS}, body_required=False),
    **_not_served("/v2/systemsharedmemory/{rest}"),
    **_not_served("/v2/cudasharedmemory/{rest}"),
    **_not_served("/v2/trace/setting"),
    **_not_served("/v2/models/{model}/trace/setting"),
}
