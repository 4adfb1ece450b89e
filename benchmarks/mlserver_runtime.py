"""The network and the masks of a state directory behind MLServer (PyPI `mlserver`), for `serve_peers.py`.

It runs in MLServer's own environment and answers by the very code that answers in the daemon, with the same outputs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Supermasks(MLModel):
    """Settings, below `parameters.extra`: "state", the directory, and "packages", folders to import our code from.

    With adaptive batching MLServer joins requests without telling which row is whose. Each row is answered by itself
    then, which is right for requests of one row whose task is not given.
    """

    async def load(self) -> bool:
        extra = self.settings.parameters.extra
        sys.path += extra["packages"]  # at the end: MLServer's own packages come first
        self._predictor = load_predictor(Path(extra["state"]))
        self._row_alone = self.settings.max_batch_size > 1
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        x = NumpyCodec.decode_input(payload.inputs[0])
        task = getattr(payload.parameters, "task", None)
        place = None if task is None else self._predictor.place_of(task)
        answer = self._predictor.predict(x, place, self._row_alone)
        outputs = {
            "label": np.array(self._predictor.classes.decode(answer.predicted)),
            "probabilities": answer.probabilities,
            "task": answer.task,
            "entropy": answer.entropy,
            "known": answer.known,
        }
        encoded = [NumpyCodec.encode_output(name, values) for name, values in outputs.items()]
        return InferenceResponse(model_name=self.name, outputs=encoded)


def load_predictor(state: Path) -> Any:
    """What a daemon with this state directory would answer with."""
    from storage.db import Database
    from storage.spool import Spool
    from supsupd.config import Settings
    from supsupd.learning.device import use_threads
    from supsupd.paths import DATABASE_NAME
    from supsupd.worker import Worker

    settings = Settings(state=state, watch=[state.with_name("watch")])  # nothing comes there
    use_threads(settings.learning.threads)
    worker = Worker(settings, Database.open(state / DATABASE_NAME), Spool(state / "spool"), "cpu")
    worker.load()
    return worker.predictor
