"""Decisions in plain words: the `reason` of every row of the ledger."""

from __future__ import annotations

from typing import Any

from supsupd.learning.records import Change, LabelledBatch


def why(change: Change, state: str) -> str:
    """One line: why a batch that `change` speaks of went to `state`."""
    if state == "quarantined":
        return "undecided: no task formed around it before it was given up"
    evidence = change.evidence
    if state == "unsure":
        if change.recalled:
            return why_set_back(change)
        return f"{_doubt(evidence)}; {_progress(evidence)}{_obstacle(evidence)}"
    if "given" in evidence:
        return _given(change)
    if "paper" in evidence:
        return _paper(change)
    if change.kind == "new":
        apart = evidence.get("separated_from")
        rows = "" if apart is None else f"; the rows that task {apart} has right were left out"
        return f"proved to be a task of its own: {_progress(evidence)}{rows}{_left_behind(evidence)}"
    return _known(evidence)


def seen_of(batch: LabelledBatch) -> str:
    """What is added to the reason of a batch of which only some rows are learned."""
    return "" if batch.came is None else f"; {len(batch.samples)} of its {batch.came} rows were drawn to be learned"


def why_set_back(change: Change) -> str:
    """One line: why a task returned to an earlier mask and what that took back."""
    alarm = change.evidence["alarm"]
    count = "its newest batch does" if alarm["batches"] == 1 else f"its newest {alarm['batches']} batches together do"
    return (
        f"late alarm: task {alarm['task']} was set back to the mask it had before, {count} not fit its record "
        f"({alarm['log_wealth']:.1f} of {alarm['log_wealth_needed']:.1f} nats)"
    )


def _obstacle(evidence: dict[str, Any]) -> str:
    """What keeps a provisional task that has proved enough from being one."""
    if evidence["provisional_log_wealth"] < evidence["promotion_log_wealth_needed"]:
        return ""
    if "found_last_hour" in evidence:
        found, most = evidence["found_last_hour"], evidence["max_new_per_hour"]
        return f"; it has to wait: {found} tasks were found in the last hour, at most {most} may be"
    if "outliers" in evidence:
        return f", but not without known tasks' outliers, batches {', '.join(map(str, evidence['outliers']))}"
    return ", but a known task predicts its newer batches better"


def _left_behind(evidence: dict[str, Any]) -> str:
    """The batches that known tasks predict better than the new one does."""
    outliers = evidence.get("outliers")
    return f"; left behind as known tasks' outliers: batches {', '.join(map(str, outliers))}" if outliers else ""


def _paper(change: Change) -> str:
    paper, task = change.evidence["paper"], change.task.task_id if change.task is not None else 0
    if "current" in paper:
        return f"trained the current task {task}, the next check comes after {paper['next_check_after']} batches"
    if "k_max_nu" not in paper:
        return "the first batch begins a task"
    height = f"k max nu is {paper['k_max_nu']:.3f} of {paper['threshold']:.3f}"
    if change.kind == "known":
        return f"{height}: the inputs are those of task {task}"
    reached = paper["k_max_nu"] >= paper["threshold"]
    return f"{height}: " + ("a mask that nothing has trained yet fits best" if reached else "the inputs are of no task")


def _given(change: Change) -> str:
    text = f"the task was given: {change.evidence['given']}"
    if change.kind == "new":
        return f"{text}, its first batch"
    candidate, rows = change.evidence["candidates"][0], change.evidence["batch_rows"]
    text += f"; {candidate['errors']} of {rows} wrong before training"
    if not candidate["consistent"]:
        text += f" and the labels denied {candidate['denied']:.2f}, at most {candidate['denied_limit']:.2f} expected"
    return text + _kept(change.evidence)


def _known(evidence: dict[str, Any]) -> str:
    best = evidence["candidates"][0]
    start, stop = evidence["rows"]
    taken = stop - start - len(evidence.get("left_out", ()))
    text = f"{best['errors']} of {taken} wrong before training, as expected of task {best['task']}"
    if evidence.get("batch_rows", stop) != stop - start:
        text += f"; only rows {start} to {stop - 1} are its own"
    foreign = best.get("foreign", 0)
    if foreign:
        text += f"; {foreign} rows among them lie far outside what it has seen"
    if (others := len(evidence.get("left_out", ())) - foreign) > 0:
        text += f"; {others} rows among them are another task's"
    return text + _kept(evidence)


def _kept(evidence: dict[str, Any]) -> str:
    if "finished" in evidence:
        return "; its mask is finished and was not trained"
    check = evidence["held_out"]
    if check["taken"]:
        return ""
    return f"; mask kept, held-out loss would rise from {check['loss_before']} to {check['loss_after']}"


def _doubt(evidence: dict[str, Any]) -> str:
    if not evidence["candidates"]:
        return "there is no task to compare with"
    best = evidence["candidates"][0]
    rows = evidence["rows"][1] - evidence["rows"][0]
    if 2 * best.get("foreign", 0) > rows:
        return f"{best['foreign']} of {rows} rows lie far outside what task {best['task']} has seen"
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
