"""One question to an engine, without a socket between."""

from supsupd.serving.engine import EngineError, Question


def predicted(engine, x, task=None, per_sample=False, method=None, objective=None):
    """The prediction for x (n, ...). Raises what the engine refuses with."""
    (answer,) = engine.predict([Question(x, task, per_sample, method, objective)])
    if isinstance(answer, EngineError):
        raise answer
    return answer
