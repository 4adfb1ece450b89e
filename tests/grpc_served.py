"""gRPC over `tiny_engine` on real sockets, and calls to it with our own messages."""

import contextlib
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from supsupd.sections import ServerTlsSettings, ServingSettings
from supsupd.serving.access import Access
from supsupd.serving.front import Front
from supsupd.serving.grpc.codec import TYPED
from supsupd.serving.grpc.messages import MESSAGE
from supsupd.serving.grpc.methods import SERVICE
from supsupd.serving.grpc.server import GrpcService
from supsupd.serving.http.app import create_app
from supsupd.serving.oip.models import Models
from supsupd.serving.oip.tensors import DATATYPES
from supsupd.serving.server import Server
from supsupd.tokens import Tokens

TCP = "127.0.0.1:0"
PLAIN = ServerTlsSettings()
X = np.array([[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0]])


class Served:
    """gRPC over a small engine, in the event loop of a real server."""

    def __init__(self, engine, *addresses, state=Path("/nonexistent"), tls=PLAIN, **limits):
        self.front = Front(engine, ServingSettings(**limits))
        self.tokens = Tokens(state)
        access, models = Access(lambda: self.front.limits, self.tokens), Models(self.front)
        self.service = GrpcService(self.front, models, access, addresses, tls)
        self.server = Server(self.front, create_app(self.front, access, models), [], [self.service])

    def __enter__(self):
        self.server.start()
        return self

    def __exit__(self, *_):
        assert self.server.stop(1.0)

    def targets(self):
        return [f"unix:{name}" if name.startswith("/") else name for name in self.service.bound]


class Caller:
    """Calls with our own messages; an authorization is sent as it is."""

    def __init__(self, target, *authorizations, channel=None):
        self.channel = channel or grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)])
        self.metadata = [("authorization", given) for given in authorizations]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()

    def raw(self, method, payload=b"", **how):
        """The bytes of the response; grpc.RpcError."""
        call = self.channel.unary_unary(f"/{SERVICE}/{method}")
        return call(payload, **{"timeout": 20, "metadata": self.metadata, "wait_for_ready": True, **how})

    def __call__(self, method, _request=None, **fields):
        request = _request or MESSAGE[f"{method}Request"](**fields)
        return MESSAGE[f"{method}Response"].FromString(self.raw(method, request.SerializeToString()))

    def stream(self, requests):
        call = self.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
        for payload in call((request.SerializeToString() for request in requests), metadata=self.metadata, timeout=20):
            yield MESSAGE["ModelStreamInferResponse"].FromString(payload)

    def health(self):
        stub = health_pb2_grpc.HealthStub(self.channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=20, wait_for_ready=True).status


def infer_request(x=X, datatype="FP32", typed=False, model="supsup", **parameters):
    request = MESSAGE["ModelInferRequest"](model_name=model)
    tensor = request.inputs.add(name="x", datatype=datatype, shape=x.shape)
    if typed:
        getattr(tensor.contents, TYPED[datatype]).extend(x.ravel().astype(DATATYPES[datatype]).tolist())
    else:
        request.raw_input_contents.append(x.astype(DATATYPES[datatype]).tobytes())
    for name, value in parameters.items():
        request.parameters[name].int64_param = value
    return request


@contextlib.contextmanager
def refused(code, *words):
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert caught.value.code() == code, caught.value
    assert all(word in caught.value.details() for word in words), caught.value


def bearer(tokens, role):
    return f"Bearer {tokens.create(role)[1]}"
