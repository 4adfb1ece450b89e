"""What the daemon answers under /v2, in the words of the Open Inference Protocol and of Triton's extensions of it."""

from __future__ import annotations

from typing import Literal

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
