"""gRPC is an extra: what is asked for without its packages is said in one line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from streams.broker import client_library
from supsupd.sections import ServerTlsSettings
from supsupd.serving.access import Access
from supsupd.serving.front import Front
from supsupd.serving.oip.models import Models

if TYPE_CHECKING:
    from supsupd.serving.grpc.server import GrpcService


def grpc_service(
    front: Front, models: Models, access: Access, addresses: Sequence[str | Path], tls: ServerTlsSettings
) -> GrpcService:
    """The service, not started. Raises MissingExtra."""
    # Read when the library is imported. Its own lines on stderr, in no form of ours, say what an error says as well;
    # and it need not care for forks: our processes are started by exec.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    client_library("grpc_health.v1.health", "grpc")
    from supsupd.serving.grpc.server import GrpcService

    return GrpcService(front, models, access, addresses, tls)
