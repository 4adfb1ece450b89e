"""Rows of the store as the socket shows them."""

from __future__ import annotations

from typing import Any

from storage.masks import Origin, Version
from storage.models import BatchRow, DecisionRow, GapRow, TaskRow


def show_task(row: TaskRow, problem: str | None = None) -> dict[str, Any]:
    """`problem`: why a task in use is out of service."""
    return {
        "task": row.id,
        "name": row.name,
        "key": row.key,
        "version": row.version,
        "batches": row.batches,
        "samples": row.samples,
        "accuracy": row.accuracy,
        "entropy": row.entropy,
        "density": row.density,
        "bytes": row.bytes,
        "created": row.created_at.isoformat(timespec="seconds"),
        "last_seen": row.last_seen_at.isoformat(timespec="seconds"),
        "retired": None if row.retired_at is None else row.retired_at.isoformat(timespec="seconds"),
        "merged_into": row.merged_into,
        "problem": problem,
    }


def show_decision(row: DecisionRow, batch: BatchRow) -> dict[str, Any]:
    return {
        "batch": row.batch_id,
        "name": batch.name,
        "decision": row.kind,
        "task": row.task_id,
        "at": row.created_at.isoformat(timespec="seconds"),
        "reason": row.reason or batch.reason,  # version 0.1 kept only that of the newest
        "evidence": row.evidence,
    }


def show_batch(row: BatchRow) -> dict[str, Any]:
    return {
        "batch": row.id,
        "name": row.name,
        "sha256": row.sha256,
        "state": row.state,
        "task": row.task_id,
        "decision": row.decision,
        "reason": row.reason,
        "samples": row.samples,
        "labelled": row.labelled,
        "given_task": row.given_task,
        "source": row.source,
        "sender": row.sender,
        "retry_of": row.retry_of,
    }


def show_rejected(row: BatchRow) -> dict[str, Any]:
    return {
        "batch": row.id,
        "source": row.source,
        "sender": row.sender,
        "name": row.name,
        "code": row.code,
        "reason": row.reason,
        "state": row.state,
        "bytes": row.size if row.sha256 is not None else None,
        "sha256": row.sha256,
        "at": row.updated_at.isoformat(timespec="seconds"),
    }


def show_gap(row: GapRow) -> dict[str, Any]:
    return {
        "source": row.source,
        "key": row.key,
        "position": row.position,
        "reason": row.reason,
        "at": row.created_at.isoformat(timespec="seconds"),
    }


def show_version(version: Version) -> dict[str, Any]:
    return {
        "task": version.task_id,
        "version": version.version,
        "batch": version.batch_id,
        "density": version.density,
        "reason": version.reason,
    }


def show_suspended(count: int) -> dict[str, Any]:
    text = f"{count} batches are suspended: the daemon kept ending with them in training; see `batches rejected`"
    return {"who": "learning", "kind": "suspended", "text": text, "since": None}


def show_stalled_log(text: str) -> dict[str, Any]:
    return {"who": "log", "kind": "log_stalled", "text": text, "since": None}


def show_damage(task_id: int, text: str) -> dict[str, Any]:
    """A task that is out of service, among the problems of the daemon."""
    return {"who": f"task {task_id}", "kind": "mask_corrupt", "text": text, "since": None}


def show_origin(origin: Origin, served: bool) -> dict[str, Any]:
    return {
        "version": origin.version,
        "created": origin.created_at.isoformat(timespec="seconds"),
        "made_by": origin.made_by or "daemon",
        "reason": origin.reason,
        "batch": origin.batch_id,
        "density": origin.density,
        "bytes": origin.nbytes,
        "sha256": origin.sha256,
        "served": served,
    }
