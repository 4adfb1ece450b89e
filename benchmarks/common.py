"""What the benchmarks share with the examples, which lie in a folder of their own and in no package."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

from local_daemon import DaemonProcess, daemon_running  # noqa: E402 - only found from here on
from task_stream import (  # noqa: E402
    StreamBatch,
    StreamTask,
    batch_name,
    count_overlap,
    iter_batches,
    name_owners,
    order_visits,
)

__all__ = [
    "ROOT",
    "DaemonProcess",
    "StreamBatch",
    "StreamTask",
    "batch_name",
    "count_overlap",
    "daemon_running",
    "iter_batches",
    "name_owners",
    "order_visits",
]
