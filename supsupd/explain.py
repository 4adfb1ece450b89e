"""Decisions in plain words: the `reason` of every row of the ledger."""

from __future__ import annotations

from typing import Any

from supsupd.learning.continual import Change


def why(change: Change, state: str) -> str:
    """One line: why a batch that `change` speaks of went to `state`."""
    if state == "quarantined":
        return "undecided: no task formed around it before it was given up"
    evidence = change.evidence
    if state == "unsure":
        proved = evidence["provisional_log_wealth"] >= evidence["promotion_log_wealth_needed"]
        rival = ", but a known task predicts its newer batches better" if proved else ""
        return f"{_doubt(evidence)}; {_progress(evidence)}{rival}"
    if change.kind == "new":
        return f"proved to be a task of its own: {_progress(evidence)}"
    return _known(evidence)


def _known(evidence: dict[str, Any]) -> str:
    best = evidence["candidates"][0]
    start, stop = evidence["rows"]
    text = f"{best['errors']} of {stop - start} wrong before training, as expected of task {best['task']}"
    if evidence.get("batch_rows", stop) != stop - start:
        text += f"; only rows {start} to {stop - 1} are its own"
    check = evidence["held_out"]
    if not check["taken"]:
        text += f"; mask kept, held-out loss would rise from {check['loss_before']} to {check['loss_after']}"
    return text


def _doubt(evidence: dict[str, Any]) -> str:
    if not evidence["candidates"]:
        return "there is no task to compare with"
    best = evidence["candidates"][0]
    rows = evidence["rows"][1] - evidence["rows"][0]
    if not best["consistent"]:
        return (
            f"task {best['task']} has {best['errors']} of {rows} wrong and denies the labels {best['denied']:.2f}, "
            f"at most {best['denied_limit']:.2f} expected of its own"
        )
    return f"task {best['task']} does no better than chance on it"


def _progress(evidence: dict[str, Any]) -> str:
    return (
        f"provisional task {evidence['provisional']} has {evidence['provisional_batches']} batches and evidence "
        f"{evidence['provisional_log_wealth']:.1f} of {evidence['promotion_log_wealth_needed']:.1f} nats"
    )
