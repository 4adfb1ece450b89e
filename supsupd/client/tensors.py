"""Rows as the Open Inference Protocol sends them, raw, and its answers as rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

import httpx
import numpy as np

from supsupd.answers import Row
from supsupd.client.calls import DaemonError, read_json, to_json
from supsupd.serving.oip.tensors import DATATYPE_OF, Tensor, from_raw, to_raw

FIELDS = ("label", "task", "entropy", "known")
JSON_LENGTH = "Inference-Header-Content-Length"


def infer_request(x: np.ndarray, parameters: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    """The body and the headers that ask for x (n, ...). Raises ValueError for what is not numbers or not finite."""
    datatype = DATATYPE_OF.get(x.dtype.newbyteorder("<"))
    if datatype is None:
        raise ValueError(f"x must hold numbers, not {x.dtype}")
    if not np.isfinite(x).all():
        raise ValueError("x holds NaN or infinity")
    raw = to_raw(Tensor("x", datatype, x.shape, x))
    tensor = {"name": "x", "shape": x.shape, "datatype": datatype, "parameters": {"binary_data_size": len(raw)}}
    head = to_json(
        {
            "inputs": [tensor],
            "outputs": [{"name": field} for field in FIELDS],
            "parameters": {**parameters, "binary_data_output": True},
        }
    )
    return head + raw, {JSON_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}


def read_rows(response: httpx.Response) -> list[Row]:
    """One for each row that was asked for. Raises DaemonError."""
    if not response.is_success:
        read_json(response)
    try:
        columns = dict(_columns(response))
        rows = list(zip(*(columns[field] for field in FIELDS), strict=True))
    except (KeyError, ValueError) as error:
        raise DaemonError(response.status_code, f"an answer that can't be read: {error}") from None
    return [cast(Row, dict(zip(FIELDS, row, strict=True))) for row in rows]


def _columns(response: httpx.Response) -> Iterator[tuple[str, list[Any]]]:
    """(name, values) of every output."""
    at = int(response.headers[JSON_LENGTH])
    for output in json.loads(response.content[:at])["outputs"]:
        end = at + output["parameters"]["binary_data_size"]
        tensor = from_raw(output["name"], output["datatype"], output["shape"], response.content[at:end])
        at = end
        if isinstance(tensor.data, list):
            yield tensor.name, [element.decode() for element in tensor.data]
        else:
            yield tensor.name, tensor.data.tolist()
