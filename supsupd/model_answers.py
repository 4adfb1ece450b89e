"""What the daemon answers under /v2, in the words of the Open Inference Protocol and of Triton's extensions of it."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from supsupd.answers import closed


@closed
class Server(TypedDict):
    """What the daemon is."""

    name: str
    version: str
    extensions: list[str]
    """Of the protocol."""


@closed
class TensorMetadata(TypedDict):
    """An input or an output of a model."""

    name: str
    datatype: str
    shape: list[int]
    """-1: any number."""


@closed
class Model(TypedDict):
    """What can be asked of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


@closed
class ModelState(TypedDict):
    """A version of a model."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str
    """Why it can't be asked."""


@closed
class IsLive(TypedDict):
    """The daemon runs."""

    live: bool


@closed
class IsReady(TypedDict):
    """It can be asked."""

    ready: bool


@closed
class ModelIsReady(IsReady):
    """The model can be asked."""

    name: str


@closed
class AnsweredTensor(TypedDict):
    """An output. Its values stand in `data`, or behind the JSON as many bytes as `binary_data_size` says."""

    name: str
    datatype: str
    shape: list[int]
    data: NotRequired[list[bool] | list[float] | list[str]]
    """Row-major."""
    parameters: NotRequired[dict[str, int]]


@closed
class Inferred(TypedDict):
    """The answer to a query."""

    model_name: str
    model_version: str
    id: NotRequired[str]
    """As the request had it."""
    outputs: list[AnsweredTensor]
    """In the order in which they were asked for."""


@closed
class ConfiguredTensor(TypedDict):
    """An input or an output, in the words of Triton's ModelConfig."""

    name: str
    data_type: str
    dims: list[int]
    reshape: NotRequired[dict[str, list[int]]]


@closed
class DynamicBatching(TypedDict):
    """How queries are answered together."""

    preferred_batch_size: list[int]
    max_queue_delay_microseconds: int


@closed
class ModelConfig(TypedDict):
    """Triton's ModelConfig."""

    name: str
    platform: str
    backend: str
    version_policy: dict[str, Any]
    max_batch_size: int
    """Rows that are answered in one pass; not a limit."""
    input: list[ConfiguredTensor]
    output: list[ConfiguredTensor]
    dynamic_batching: DynamicBatching


@closed
class Spent(TypedDict):
    """How often, and how long together."""

    count: int
    ns: int


@closed
class InferenceStatistics(TypedDict):
    """Of requests, by stage."""

    success: Spent
    fail: Spent
    queue: Spent
    compute_input: Spent
    compute_infer: Spent
    compute_output: Spent
    cache_hit: Spent
    cache_miss: Spent


@closed
class BatchStatistics(TypedDict):
    """Of passes over so many rows."""

    batch_size: int
    compute_input: Spent
    compute_infer: Spent
    compute_output: Spent


@closed
class ModelStatistics(TypedDict):
    """What a model has answered since the daemon's start."""

    name: str
    version: str
    last_inference: int
    """Milliseconds since 1970."""
    inference_count: int
    """Rows."""
    execution_count: int
    """Passes."""
    inference_stats: InferenceStatistics
    response_stats: dict[str, Any]
    batch_stats: list[BatchStatistics]
    memory_usage: list[dict[str, Any]]


@closed
class Statistics(TypedDict):
    """What models have answered."""

    model_stats: list[ModelStatistics]


@closed
class LogSettings(TypedDict):
    """What is logged."""

    log_file: str
    log_info: bool
    log_warning: bool
    log_error: bool
    log_verbose_level: int
    """1: debug."""
    log_format: str


@closed
class Done(TypedDict):
    """It is done; there is nothing to say about it."""
