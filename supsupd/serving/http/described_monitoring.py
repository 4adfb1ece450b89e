"""What is said of the routes for those who look after the daemon."""

from __future__ import annotations

from collections.abc import Mapping

from supsupd.model_answers import IsLive, IsReady
from supsupd.serving.http.operation import Operation

MONITORING: Mapping[str, Operation] = {
    "GET /metrics": Operation(
        "Figures for Prometheus, as text.", media_types=("text/plain", "application/openmetrics-text")
    ),
    "GET /healthz": Operation("Whether it runs.", IsLive),
    "GET /livez": Operation("The same.", IsLive),
    "GET /readyz": Operation("Whether it can be asked: 200, else 503.", IsReady),
}
