"""The tables, as SQLAlchemy models. Every constraint has a name, so that every migration can speak of it."""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    TypeDecorator,
    event,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, ORMExecuteState, Session, mapped_column, object_session

from storage.codec import Coding
from storage.errors import StoreError

State = Literal[
    "staged",
    "training",
    "unsure",
    "scored",
    "committed",
    "duplicate",
    "quarantined",
    "suspended",
    "retried",
    "dropped",
]
Kind = Literal["known", "new", "unsure"]
LabelKind = Literal["int", "str"]
STATES: tuple[State, ...] = get_args(State)
KINDS: tuple[Kind, ...] = get_args(Kind)

Json: TypeAlias = dict[str, Any]
Blob: TypeAlias = bytes  # so that a column may be called `bytes`


PRUNING = "supsupd_pruning"
"""The execution option of the one statement that may delete mask versions: `storage.pruning`'s."""


class AppendOnlyViolation(RuntimeError):
    """Something tried to change or delete a row that is written once and kept."""


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime, stored in UTC; SQLite gives back naive ones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError(f"a time without a zone cannot be stored: {value}")
        return None if value is None else value.astimezone(UTC)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], datetime | None] | None:
        process = super().result_processor(dialect, coltype)
        return None if process is None else partial(_undamaged, process)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=value.tzinfo or UTC).astimezone(UTC)


def _undamaged(process: Callable[[Any], datetime | None], value: Any) -> datetime | None:
    try:
        return process(value)
    except (TypeError, ValueError) as error:
        raise StoreError(f"a stored value is damaged: it is not a time: {error}") from error


def utc_now() -> datetime:
    """The wall clock, in UTC. A label only: nothing is ordered by it."""
    return datetime.now(UTC)


def _one_of(column: str, values: tuple[str, ...]) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=f"{column}_is_known")


def _fraction(column: str) -> CheckConstraint:
    return CheckConstraint(f"{column} >= 0 AND {column} <= 1", name=f"{column}_is_a_fraction")


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    # `none_as_null`: an absent value is SQL's NULL, never JSON's.
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        float: Double(),
        datetime: UtcDateTime,
        Json: JSON(none_as_null=True),
        list[Any]: JSON(none_as_null=True),
    }


class AppendOnly:
    """A table whose rows are written once: `StoreSession` and the listeners below refuse anything else."""


class NetworkRow(Base):
    """The one fixed random network of a state directory: what rebuilds it, never its weights."""

    __tablename__ = "network"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    architecture: Mapped[Json]
    seed: Mapped[int] = mapped_column(BigInteger)
    signs_sha256: Mapped[str] = mapped_column(String(64))
    normalisation: Mapped[Json]
    normalisation_data: Mapped[bytes | None]
    classes: Mapped[list[Any]]
    label_kind: Mapped[str] = mapped_column(String(8))
    config: Mapped[Json]
    created_at: Mapped[datetime]

    __table_args__ = (
        CheckConstraint("id = 1", name="only_one"),
        _one_of("label_kind", get_args(LabelKind)),
    )


class TaskRow(Base):
    """A distribution that the daemon found. Its id is never given to another task.

    `retired_at`: no longer served, recognised or trained since then. `merged_into`: the task that answers for it.
    `key`: what the user calls it, where the user says which task a batch belongs to. `inputs`: what its inputs look
    like, opaque.
    """

    __tablename__ = "task"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    version: Mapped[int]
    batches: Mapped[int] = mapped_column(BigInteger)
    samples: Mapped[int] = mapped_column(BigInteger)
    accuracy: Mapped[float | None]
    entropy: Mapped[float | None]
    density: Mapped[float]
    bytes: Mapped[int] = mapped_column(BigInteger)
    reference: Mapped[Json]
    statistics: Mapped[Blob | None]
    inputs: Mapped[Blob | None]
    created_at: Mapped[datetime]
    last_seen_at: Mapped[datetime]
    retired_at: Mapped[datetime | None]
    merged_into: Mapped[int | None] = mapped_column(ForeignKey("task.id"))
    key: Mapped[str | None] = mapped_column(Text, unique=True)

    __table_args__ = (
        _fraction("density"),
        CheckConstraint("merged_into <> id", name="merged_into_another"),
        CheckConstraint("merged_into IS NULL OR retired_at IS NOT NULL", name="merged_is_retired"),
        {"sqlite_autoincrement": True},
    )


class BatchRow(Base):
    """One line of the ledger: a batch that came in, and what became of it.

    `dedupe_key` is the content's hash in the one row that may take effect for it, NULL in every other.
    `given_task` is the task that came with the batch, as the user named it. `form`: how its bytes are read, NULL for
    .npz. `sender`: who posted it, NULL where a source delivered it. `code`: the first word of the reason of a rejected
    batch. `crashes`: how often the process died with it in training. `retry_of`: the rejected batch that an operator
    sent in again as this one.
    """

    __tablename__ = "batch"

    id: Mapped[int] = mapped_column(primary_key=True)
    source: Mapped[str] = mapped_column(Text)
    name: Mapped[str] = mapped_column(Text)
    sha256: Mapped[str | None] = mapped_column(String(64))
    dedupe_key: Mapped[str | None] = mapped_column(String(64), unique=True)
    size: Mapped[int] = mapped_column(BigInteger)
    samples: Mapped[int | None] = mapped_column(BigInteger)
    labelled: Mapped[bool | None]
    state: Mapped[str] = mapped_column(String(16))
    task_id: Mapped[int | None] = mapped_column(ForeignKey("task.id"), index=True)
    provisional: Mapped[int | None]
    decision: Mapped[str | None] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(Text)
    attempts: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    given_task: Mapped[str | None] = mapped_column(Text)
    form: Mapped[str | None] = mapped_column(String(32))
    code: Mapped[str | None] = mapped_column(String(32))
    crashes: Mapped[int] = mapped_column(default=0, server_default="0")
    retry_of: Mapped[int | None] = mapped_column(ForeignKey("batch.id"))
    sender: Mapped[str | None] = mapped_column(String(64))

    __table_args__ = (
        _one_of("state", STATES),
        _one_of("decision", KINDS),
        CheckConstraint("state <> 'committed' OR task_id IS NOT NULL", name="committed_has_a_task"),
        CheckConstraint("state <> 'quarantined' OR reason IS NOT NULL", name="quarantined_has_a_reason"),
        Index(None, "state", "id"),
        Index(None, "sha256"),
        {"sqlite_autoincrement": True},
    )

    @property
    def origin(self) -> str:
        """Where it came from: the source, and who posted it."""
        return self.source if self.sender is None else f"{self.source} {self.sender}"


class MaskVersionRow(AppendOnly, Base):
    """One version of a task's supermask: its packed bits and the float32 statistics of its normalisation.

    `batch_id`: the batch that made it; `reason`: why it exists, when no batch made it, and `made_by`: who asked for it,
    NULL for the daemon itself. `reference`: the task's own
    record when the version was made, so that a return to the version is a return to its record too.
    `coding`: how `bits` are coded (`storage.codec`), NULL where they are raw. `sha256` is that of the raw bits followed
    by the statistics.
    """

    __tablename__ = "mask_version"

    task_id: Mapped[int] = mapped_column(ForeignKey("task.id"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    batch_id: Mapped[int | None] = mapped_column(ForeignKey("batch.id"), index=True)
    bits: Mapped[bytes]
    nbits: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    density: Mapped[float]
    created_at: Mapped[datetime]
    statistics: Mapped[Blob | None]
    reason: Mapped[str | None] = mapped_column(Text)
    made_by: Mapped[str | None] = mapped_column(Text)
    reference: Mapped[Json | None]
    # The constraint belongs to the column: SQLite can add and drop both without copying all masks.
    coding: Mapped[str | None] = mapped_column(String(8), _one_of("coding", get_args(Coding)))

    __table_args__ = (_fraction("density"),)


class DecisionRow(AppendOnly, Base):
    """Why a batch went where it went: the evidence, and in `reason` one line for people."""

    __tablename__ = "decision"

    id: Mapped[int] = mapped_column(primary_key=True)
    batch_id: Mapped[int] = mapped_column(ForeignKey("batch.id"), index=True)
    kind: Mapped[str] = mapped_column(String(16))
    task_id: Mapped[int | None] = mapped_column(ForeignKey("task.id"), index=True)
    evidence: Mapped[Json]
    created_at: Mapped[datetime]
    reason: Mapped[str | None] = mapped_column(Text)

    __table_args__ = (_one_of("kind", KINDS), {"sqlite_autoincrement": True})


def digest_key(*parts: str) -> str:
    """The primary key of what texts of any length name: SHA-256, 64 hex digits. An index takes only short rows."""
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()


class CursorRow(Base):
    """How far a source has been read: per key (a file, a partition) the last position that is durable.

    `digest`: that of source and key.
    """

    __tablename__ = "cursor"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    source: Mapped[str] = mapped_column(Text)
    key: Mapped[str] = mapped_column(Text)
    position: Mapped[str] = mapped_column(Text)


class SightingRow(Base):
    """A delivery that was made durable: what its source called it, and the batch that it became.

    `digest`: that of source and identity. `expires_at`: from when on it counts no more, NULL for never.
    """

    __tablename__ = "sighting"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    source: Mapped[str] = mapped_column(Text)
    identity: Mapped[str] = mapped_column(Text)
    batch_id: Mapped[int] = mapped_column(ForeignKey("batch.id"))
    expires_at: Mapped[datetime | None] = mapped_column(index=True)


class PredictionRow(Base):
    """What was predicted for a batch and could not be written to its file yet: the file's bytes, deflated."""

    __tablename__ = "prediction"

    batch_id: Mapped[int] = mapped_column(ForeignKey("batch.id"), primary_key=True, autoincrement=False)
    payload: Mapped[bytes]
    created_at: Mapped[datetime]


class GapRow(Base):
    """Something that a source lost before it was read: the source stands still until the loss is accepted."""

    __tablename__ = "gap"

    id: Mapped[int] = mapped_column(primary_key=True)
    source: Mapped[str] = mapped_column(Text)
    key: Mapped[str] = mapped_column(Text)
    position: Mapped[str] = mapped_column(Text)
    reason: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime]
    accepted_at: Mapped[datetime | None]

    __table_args__ = ({"sqlite_autoincrement": True},)


class TrainingStateRow(Base):
    """Scores and optimiser state of a recently active task. `turn` grows with every save and orders them."""

    __tablename__ = "training_state"

    task_id: Mapped[int] = mapped_column(ForeignKey("task.id"), primary_key=True)
    version: Mapped[int]
    turn: Mapped[int] = mapped_column(BigInteger, unique=True)
    payload: Mapped[bytes]
    updated_at: Mapped[datetime]


class ReservoirRow(Base):
    """One layer's matrix of the Hopfield reservoir: float weights between `size` neurons, and how many patterns."""

    __tablename__ = "reservoir"

    layer: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    size: Mapped[int]
    patterns: Mapped[int]
    matrix: Mapped[bytes]
    sha256: Mapped[str] = mapped_column(String(64))
    updated_at: Mapped[datetime]


class FeatureProductsRow(Base):
    """The sum of f fᵀ over the features f of all rows of all tasks; each task's own sums are in its `statistics`."""

    __tablename__ = "feature_products"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    products: Mapped[bytes]
    sha256: Mapped[str] = mapped_column(String(64))
    updated_at: Mapped[datetime]

    __table_args__ = (CheckConstraint("id = 1", name="only_one"),)


class ReservoirPatternRow(Base):
    """A mask version that the reservoir holds as an attractor. `turn` grows with every pattern and orders them."""

    __tablename__ = "reservoir_pattern"

    task_id: Mapped[int] = mapped_column(ForeignKey("task.id"), primary_key=True)
    version: Mapped[int]
    turn: Mapped[int] = mapped_column(BigInteger, unique=True)


class StoreSession(Session):
    """The session of this store: it refuses bulk changes of append-only tables."""


@event.listens_for(StoreSession, "do_orm_execute")
def _refuse_bulk_changes(state: ORMExecuteState) -> None:
    if state.is_delete and state.execution_options.get(PRUNING):
        return
    if (state.is_update or state.is_delete) and any(issubclass(m.class_, AppendOnly) for m in state.all_mappers):
        raise AppendOnlyViolation(f"rows are written once and kept: {state.statement}")


@event.listens_for(AppendOnly, "before_update", propagate=True)
def _refuse_update(_mapper: Any, _connection: Any, row: Base) -> None:
    session = object_session(row)
    if session is not None and session.is_modified(row):
        raise AppendOnlyViolation(f"a row of {row.__tablename__} is written once and kept")


@event.listens_for(AppendOnly, "before_delete", propagate=True)
def _refuse_delete(_mapper: Any, _connection: Any, row: Base) -> None:
    raise AppendOnlyViolation(f"a row of {row.__tablename__} is written once and kept")
