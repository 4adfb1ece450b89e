"""What the calls of tritonclient over HTTP and over gRPC have in common: tensors, and what is right to come back.

For scripts that run in a process of their own, over `tiny_engine` with the labels a, b and c.
"""

import contextlib

import ml_dtypes
import numpy as np
from tritonclient.utils import InferenceServerException

LABELS = np.array([b"a", b"b", b"c"], dtype=object)
ROWS = np.array([[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0]])  # values that every datatype has
DATATYPES = {
    "BOOL": np.bool_,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "FP16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "FP32": np.float32,
    "FP64": np.float64,
}
OUTPUTS = ["label", "probabilities", "task", "entropy", "known"]


class Recorded:
    """A client, and the names of its methods that were looked up."""

    def __init__(self, client):
        self.client = client
        self.called = set()

    def __getattr__(self, name):
        self.called.add(name)
        return getattr(self.client, name)

    def assert_complete(self):
        offered = {name for name in dir(self.client) if not name.startswith("_")}
        assert self.called >= offered, offered - self.called


def texts(elements):
    """Of a BYTES tensor: what comes in JSON is text already."""
    return [element.decode() if isinstance(element, bytes) else element for element in elements]


def check_outputs(result):
    """All outputs for ROWS, in themselves right; the probabilities."""
    p = result.as_numpy("probabilities")
    assert p.shape == (3, 3)
    assert np.allclose(p.sum(1), 1, atol=1e-5)
    assert texts(result.as_numpy("label")) == texts(LABELS[p.argmax(1)])
    assert np.allclose(result.as_numpy("entropy"), -(p * np.log(p)).sum(1), atol=1e-4)
    assert (result.as_numpy("task").dtype, result.as_numpy("known").dtype) == (np.int64, np.bool_)
    return p


@contextlib.contextmanager
def refused(status, words):
    """The block is answered with this error."""
    try:
        yield
    except InferenceServerException as error:
        assert status in (error.status(), None), error
        assert words in error.message(), error
    else:
        raise AssertionError(f"expected {status}: {words}")
