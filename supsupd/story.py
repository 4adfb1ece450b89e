"""The whole story of a batch in plain words: evidence, limits and margins of all that was decided about it."""

from __future__ import annotations

from typing import Any

TOLD = frozenset(
    [
        "rows",
        "batch_rows",
        "false_alarm",
        "candidates",
        "decided_with",
        "given",
        "held_out",
        "finished",
        "recovered",
        "provisional",
        "provisional_batches",
        "provisional_log_wealth",
        "promotion_log_wealth_needed",
        "provisional_accuracy",
        "newer_batches",
        "newer_log_wealth",
        "rivals",
        "outliers",
        "separated_from",
        "left_out",
        "ahead_of_next",
        "alarm",
        "recalled_from",
        "found_last_hour",
        "max_new_per_hour",
        "paper",
        "evidence",
        "entropy",
        "surprise",
        "surprise_limit",
        "operation",
        "from_task",
        "to_task",
        "batch",
    ]
)
TOLD_OF_CANDIDATE = frozenset(
    ["task", "errors", "denied", "denied_limit", "log_wealth", "log_wealth_needed", "consistent", "better_than_chance"]
)
"""The keys of evidence, and of a candidate's, that `tell` has words for; others are told as they are."""


def tell(story: dict[str, Any]) -> list[str]:
    """All that was decided about a batch, oldest first, line by line: evidence, limits, margins, and what followed.

    story: {"batch", "decisions", "versions"}, as the socket shows them. Evidence that is not there is not told.
    """
    batch, decisions = story["batch"], story["decisions"]
    lines = [_headline(batch)]
    for number, decision in enumerate(decisions, start=1):
        evidence = decision["evidence"]
        task = "" if decision["task"] is None else f", task {decision['task']}"
        lines.append(f"{number}. {decision['at']}: {decision['decision']}{task}: {decision['reason']}")
        lines += [f"   {line}" for line in _told(evidence, batch["batch"])]
    if decisions:
        lines += [f"afterwards: {line}" for line in _afterwards(batch["batch"], story["versions"])]
    return lines


def _headline(batch: dict[str, Any]) -> str:
    labels = "labelled" if batch["labelled"] else "without labels"
    rows = "" if batch["samples"] is None else f" ({batch['samples']} rows, {labels})"
    task = "" if batch["task"] is None else f", task {batch['task']}"
    why_so = "" if batch["reason"] is None else f": {batch['reason']}"
    return f"batch {batch['batch']}, {batch['name']}{rows}: {batch['state']}{task}{why_so}"


def _told(evidence: dict[str, Any], batch_id: int) -> list[str]:
    lines = [*_operation(evidence), *_rows(evidence, batch_id), *_candidates(evidence), *_unlabelled(evidence)]
    if "held_out" in evidence:
        lines.append(_held_out(evidence["held_out"]))
    if "finished" in evidence:
        lines.append("the task's mask is finished: the reservoir holds it, and nothing trains it any more")
    if "provisional" in evidence:
        lines += [_proof(evidence), *_contest(evidence)]
    lines += [*_alarm(evidence), *_paper_check(evidence)]
    return lines + [f"{key.replace('_', ' ')}: {evidence[key]}" for key in evidence if key not in TOLD]


def _operation(evidence: dict[str, Any]) -> list[str]:
    source, target = evidence.get("from_task"), evidence.get("to_task")
    match evidence.get("operation"):
        case None:
            return []
        case "merge":
            return [f"an operator merged task {source} into task {target}, which has this batch from then on"]
        case "split":
            place = f" at batch {evidence['batch']}" if "batch" in evidence else ""
            return [f"an operator split task {source}{place}; task {target} has this batch from then on"]
        case other:
            return [f"{other}: from task {source} to task {target}"]


def _rows(evidence: dict[str, Any], batch_id: int) -> list[str]:
    lines = [f"the task was given: {evidence['given']}"] if "given" in evidence else []
    if "rows" in evidence:
        start, stop = evidence["rows"]
        count = evidence.get("batch_rows", stop)
        whole = (start, stop) == (0, count)
        lines.append(f"all {count} rows were taken" if whole else f"rows {start} to {stop - 1} of {count} were taken")
        if "left_out" in evidence:
            lines[-1] += f", but {len(evidence['left_out'])} that another task explains"
    if evidence.get("decided_with", batch_id) != batch_id:
        lines.append(f"it was decided when batch {evidence['decided_with']} came; the numbers are those of that batch")
    return lines


def _candidates(evidence: dict[str, Any]) -> list[str]:
    if "candidates" not in evidence:
        return []
    if not evidence["candidates"]:
        return ["there was no task to compare with"]
    lines = [_candidate(candidate) for candidate in evidence["candidates"]]
    if "ahead_of_next" in evidence:
        lines.append(f"the first is {evidence['ahead_of_next']:.1f} nats ahead of the second")
    if "false_alarm" in evidence:
        lines.append(f"a batch of the task itself is beyond its limit with chance {evidence['false_alarm']}")
    return lines


def _candidate(candidate: dict[str, Any]) -> str:
    parts = [f"{candidate['errors']} wrong before training"] if "errors" in candidate else []
    if {"denied", "denied_limit"} <= candidate.keys():
        margin = candidate["denied_limit"] - candidate["denied"]
        side = "inside" if margin >= 0 else "beyond"
        parts.append(
            f"labels denied {candidate['denied']:.4f}, limit {candidate['denied_limit']:.4f}: {abs(margin):.4f} {side}"
        )
    if {"log_wealth", "log_wealth_needed"} <= candidate.keys():
        won, needed = candidate["log_wealth"], candidate["log_wealth_needed"]
        parts.append(f"{won:.1f} nats for knowing the labels, {needed:.1f} needed: {_distance(won, needed)}")
    parts += [f"{key.replace('_', ' ')} {candidate[key]}" for key in candidate if key not in TOLD_OF_CANDIDATE]
    tests = [candidate[test] for test in ("consistent", "better_than_chance") if test in candidate]
    verdict = [] if not tests else [" -> its own" if all(tests) else " -> not its own"]
    return f"task {candidate.get('task', '?')}: " + "; ".join(parts) + "".join(verdict)


def _distance(value: float, needed: float) -> str:
    return f"{value - needed:.1f} more" if value >= needed else f"{needed - value:.1f} short"


def _unlabelled(evidence: dict[str, Any]) -> list[str]:
    if not {"surprise", "surprise_limit"} <= evidence.keys():
        return []
    margin = evidence["surprise_limit"] - evidence["surprise"]
    text = (
        f"{evidence.get('evidence', 'evidence')} {evidence['surprise']:.2f} sd above the task's own mean, limit "
        f"{evidence['surprise_limit']:.2f}: {abs(margin):.2f} {'inside' if margin >= 0 else 'beyond'}"
    )
    lines = [text + (f"; mean entropy {evidence['entropy']:.2f} nats" if "entropy" in evidence else "")]
    if "recovered" in evidence:
        found = "found the mask" if evidence["recovered"] else "found no mask that fits; all were compared"
        lines.append(f"the descent in the reservoir {found}")
    return lines


def _held_out(check: dict[str, Any]) -> str:
    change = check["loss_after"] - check["loss_before"]
    text = f"on {check['rows']} rows held out from training the loss went from {check['loss_before']} to "
    text += f"{check['loss_after']} ({change:+.4f}): "
    return text + ("the new mask was taken" if check["taken"] else "the old mask stayed")


def _proof(evidence: dict[str, Any]) -> str:
    parts = [f"provisional task {evidence['provisional']}"]
    if "provisional_batches" in evidence:
        count = evidence["provisional_batches"]
        parts[0] += f" had {count} {'batch' if count == 1 else 'batches'}"
    if {"provisional_log_wealth", "promotion_log_wealth_needed"} <= evidence.keys():
        won, needed = evidence["provisional_log_wealth"], evidence["promotion_log_wealth_needed"]
        parts.append(f"{won:.1f} nats for knowing their labels, {needed:.1f} needed: {_distance(won, needed)}")
    if evidence.get("provisional_accuracy") is not None:
        parts.append(f"{evidence['provisional_accuracy']:.2f} of its rows right before training")
    return "; ".join(parts)


def _contest(evidence: dict[str, Any]) -> list[str]:
    """How what has proved enough compares with the known tasks."""
    lines = []
    if evidence.get("rivals"):
        rivals = ", ".join(f"task {rival['task']} {rival['log_wealth']:.1f}" for rival in evidence["rivals"])
        lines.append(
            f"on its newer {evidence['newer_batches']} tested batches it won {evidence['newer_log_wealth']:.1f} nats; "
            f"the known tasks won there: {rivals}"
        )
    if "separated_from" in evidence:
        lines.append(f"two sources explain its rows better than one: those of task {evidence['separated_from']} went")
    if "outliers" in evidence:
        batches = ", ".join(map(str, evidence["outliers"]))
        lines.append(f"known tasks predict batches {batches} better than it predicted any: they are not its own")
    if "found_last_hour" in evidence:
        found, most = evidence["found_last_hour"], evidence["max_new_per_hour"]
        lines.append(f"{found} tasks were found in the last hour, at most {most} may be: it has to wait")
    return lines


def _alarm(evidence: dict[str, Any]) -> list[str]:
    if "alarm" not in evidence:
        return []
    alarm = evidence["alarm"]
    return [
        f"late alarm: {alarm['batches']} batches of task {alarm['task']} together won {alarm['log_wealth']:.1f} nats "
        f"for being foreign, {alarm['log_wealth_needed']:.1f} needed: the task was set back, they were taken from it"
    ]


def _paper_check(evidence: dict[str, Any]) -> list[str]:
    paper = evidence.get("paper")
    if not paper:
        return []
    if "current" in paper:
        return [f"no check was due: the current task {paper['current']} was trained"]
    each = ", ".join(f"task {one['task']} {one['nu']:.4f}" for one in paper["nu"])
    side = "above" if paper["margin"] >= 0 else "below"
    return [
        f"k max nu {paper['k_max_nu']:.4f} over {paper['masks']} masks, {paper['threshold']:.4f} needed: "
        f"{abs(paper['margin']):.4f} {side}; nu of {each}"
    ]


def _afterwards(batch_id: int, versions: list[dict[str, Any]]) -> list[str]:
    made = [
        f"version {version['version']} of task {version['task']}'s mask, {version['density']:.4f} of the weights kept"
        + ("" if version["batch"] == batch_id else f", when batch {version['batch']} came")
        + (f" ({version['reason']})" if version["reason"] else "")
        for version in versions
    ]
    return made or ["no mask was changed"]
