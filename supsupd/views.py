"""Rows of the store as the socket shows them."""

from __future__ import annotations

from typing import Any

from storage.masks import Version
from storage.models import BatchRow, DecisionRow, TaskRow


def show_task(row: TaskRow) -> dict[str, Any]:
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
    }


def show_version(version: Version) -> dict[str, Any]:
    return {
        "task": version.task_id,
        "version": version.version,
        "batch": version.batch_id,
        "density": version.density,
        "reason": version.reason,
    }
