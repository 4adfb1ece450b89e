"""Questions: to an engine without a socket between, and over a Unix socket by a client that is not ours."""

import httpx
import numpy as np

from supsupd.serving.engine import EngineError, Question

INFER = "/v2/models/supsup/infer"


def predicted(engine, x, task=None, per_sample=False, method=None, objective=None):
    """The prediction for x (n, ...). Raises what the engine refuses with."""
    (answer,) = engine.predict([Question(x, task, per_sample, method, objective)])
    if isinstance(answer, EngineError):
        raise answer
    return answer


def ask(path, method="GET", url="/v2", **request):
    """The answer to one request over the Unix socket at `path`."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://d") as client:
        return client.request(method, url, **request)


def infer(x, **more):
    """A request to predict, in JSON."""
    data = np.asarray(x).ravel().tolist()
    return {"inputs": [{"name": "x", "shape": list(np.shape(x)), "datatype": "FP32", "data": data}], **more}
