"""What each method of the gRPC service answers: from message to message, over what REST and gRPC share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError

from supsupd.choices import Role
from supsupd.serving.access import Caller
from supsupd.serving.engine import EngineError
from supsupd.serving.grpc.arriving import MOST_BYTES
from supsupd.serving.grpc.codec import decode_parameters, decode_request, encode_answer, needed_bytes
from supsupd.serving.grpc.messages import MESSAGE
from supsupd.serving.memory import TINY_BYTES, Holding
from supsupd.serving.oip.loading import ExtensionNotSupported
from supsupd.serving.oip.models import Models
from supsupd.serving.oip.strict_json import ProtocolError

SERVICE = "inference.GRPCInferenceService"
LIGHT_BYTES = 1 << 18
"""A request that is decoded in well under a millisecond, unless its values are not raw."""
UNSUPPORTED = (
    "TraceSetting",
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister",
)


@dataclass(frozen=True, slots=True)
class Call:
    """Who calls, None where that is everybody's business; the seconds that are left, None for any number; and what it
    holds of the memory."""

    caller: Caller | None
    seconds: float | None
    holding: Holding

    @property
    def by(self) -> str | None:
        """The caller's name."""
        return None if self.caller is None else self.caller.name


@dataclass(frozen=True, slots=True)
class Method:
    """One method of the service.

    Args:
        answer: the response to a request's bytes; raises EngineError and ProtocolError.
        role: who may call it; None: everybody.
    """

    answer: Callable[[bytes, Call], Awaitable[Any]]
    role: Role | None = "predict"


class Methods:
    """The methods of the service, by their names.

    Args:
        models: answers.
    """

    def __init__(self, models: Models) -> None:
        self._models = models

    def all(self) -> dict[str, Method]:
        return {
            "ServerLive": Method(self._server_live, role=None),
            "ServerReady": Method(self._server_ready, role=None),
            "ServerMetadata": Method(self._server_metadata),
            "ModelReady": Method(self._model_ready),
            "ModelMetadata": Method(self._model_metadata),
            "ModelConfig": Method(self._model_config),
            "ModelInfer": Method(self.infer),
            "ModelStatistics": Method(self._model_statistics),
            "RepositoryIndex": Method(self._index),
            "RepositoryModelLoad": Method(self._load, role="admin"),
            "RepositoryModelUnload": Method(self._unload, role="admin"),
            "LogSettings": Method(self._log_settings),
            **dict.fromkeys(UNSUPPORTED, Method(_refuse_extension)),
        }

    async def infer(self, payload: bytes, call: Call) -> Any:
        """The ModelInferResponse to a ModelInferRequest, alone or in a stream."""
        holding = call.holding
        if len(payload) <= LIGHT_BYTES:
            request, decoded = _decode_infer(payload, call)
        else:  # it would hold up the loop
            await holding.take("decoded", needed_bytes(payload), "what this request becomes", call.seconds)
            request, decoded = await self._models.front.heavily(_decode_infer, payload, call)
        answer = await self._models.infer(request.model_name, request.model_version, decoded, holding)
        if sum(tensor.nbytes for tensor in answer.outputs) <= LIGHT_BYTES:
            return encode_answer(answer)
        return await self._models.front.heavily(encode_answer, answer)

    async def _server_live(self, payload: bytes, call: Call) -> Any:
        return MESSAGE["ServerLiveResponse"](live=True)

    async def _server_ready(self, payload: bytes, call: Call) -> Any:
        return MESSAGE["ServerReadyResponse"](ready=self._models.is_server_ready())

    async def _server_metadata(self, payload: bytes, call: Call) -> Any:
        return _encode("ServerMetadataResponse", self._models.server_metadata())

    async def _model_ready(self, payload: bytes, call: Call) -> Any:
        request = _decode("ModelReadyRequest", payload)
        return MESSAGE["ModelReadyResponse"](ready=await self._models.is_ready(request.name, request.version))

    async def _model_metadata(self, payload: bytes, call: Call) -> Any:
        request = _decode("ModelMetadataRequest", payload)
        return _encode("ModelMetadataResponse", await self._models.metadata(request.name, request.version))

    async def _model_config(self, payload: bytes, call: Call) -> Any:
        request = _decode("ModelConfigRequest", payload)
        return _encode("ModelConfigResponse", {"config": await self._models.config(request.name, request.version)})

    async def _model_statistics(self, payload: bytes, call: Call) -> Any:
        request = _decode("ModelStatisticsRequest", payload)
        return _encode("ModelStatisticsResponse", await self._models.statistics(request.name, request.version))

    async def _index(self, payload: bytes, call: Call) -> Any:
        request = _decode("RepositoryIndexRequest", payload)
        return _encode("RepositoryIndexResponse", {"models": await self._models.index(request.ready)})

    async def _load(self, payload: bytes, call: Call) -> Any:
        request = _decode("RepositoryModelLoadRequest", payload)
        await self._models.load(request.model_name, decode_parameters(request.parameters), call.by)
        return MESSAGE["RepositoryModelLoadResponse"]()

    async def _unload(self, payload: bytes, call: Call) -> Any:
        request = _decode("RepositoryModelUnloadRequest", payload)
        await self._models.unload(request.model_name, call.by)
        return MESSAGE["RepositoryModelUnloadResponse"]()

    async def _log_settings(self, payload: bytes, call: Call) -> Any:
        changes = decode_parameters(_decode("LogSettingsRequest", payload).settings)
        if changes and call.caller is not None:
            call.caller.require("admin")
        response = MESSAGE["LogSettingsResponse"]()
        for key, value in self._models.log_settings(changes, call.by).items():
            kinds = {bool: "bool_param", int: "uint32_param", str: "string_param"}
            setattr(response.settings[key], kinds[type(value)], value)
        return response


async def _refuse_extension(payload: bytes, call: Call) -> Any:
    raise ExtensionNotSupported("shared memory and trace settings are not served")


async def refuse_method(payload: bytes, call: Call) -> Any:
    raise EngineError("unimplemented: there is no such method", 501)


def _decode(name: str, payload: bytes, most: int = TINY_BYTES) -> Any:
    if len(payload) > most:
        raise EngineError(f"too_large: {name} may have {most} bytes", 413)
    try:
        return MESSAGE[name].FromString(payload)
    except DecodeError:
        raise ProtocolError(f"bad_request: expected a message {name}") from None


def _decode_infer(payload: bytes, call: Call) -> Any:
    message = _decode("ModelInferRequest", payload, MOST_BYTES)
    return message, decode_request(message, call.seconds)


def _encode(name: str, value: dict[str, Any]) -> Any:
    """What is told in JSON by REST; keys that gRPC has no field for are left out."""
    return ParseDict(value, MESSAGE[name](), ignore_unknown_fields=True)
