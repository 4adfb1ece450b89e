"""The first tables: network, task, batch, mask version, decision, cursor, training state."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
STATES = "'staged', 'training', 'unsure', 'scored', 'committed', 'duplicate', 'quarantined'"
KINDS = "'known', 'new', 'unsure'"
TABLES = ("training_state", "cursor", "decision", "mask_version", "batch", "task", "network")


def upgrade() -> None:
    create_network()
    create_task()
    create_batch()
    create_mask_version()
    create_decision()
    create_cursor()
    create_training_state()


def downgrade() -> None:
    refuse_rows()
    for table in TABLES:
        op.drop_table(table)


def refuse_rows() -> None:
    """Before the first schema there is nothing that could hold them. Raises RuntimeError."""
    for table in TABLES:
        count = op.get_bind().scalar(sa.text(f"SELECT count(*) FROM {table}"))  # noqa: S608 - constants
        if count:
            raise RuntimeError(f"{count} rows of {table} are stored, and schema {revision} is the first")


def create_network() -> None:
    op.create_table(
        "network",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("architecture", sa.JSON(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("signs_sha256", sa.String(64), nullable=False),
        sa.Column("normalisation", sa.JSON(), nullable=False),
        sa.Column("normalisation_data", sa.LargeBinary(), nullable=True),
        sa.Column("classes", sa.JSON(), nullable=False),
        sa.Column("label_kind", sa.String(8), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_network"),
        sa.CheckConstraint("id = 1", name=op.f("ck_network_only_one")),
        sa.CheckConstraint("label_kind IN ('int', 'str')", name=op.f("ck_network_label_kind_is_known")),
    )


def create_task() -> None:
    op.create_table(
        "task",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("batches", sa.BigInteger(), nullable=False),
        sa.Column("samples", sa.BigInteger(), nullable=False),
        sa.Column("accuracy", sa.Double(), nullable=True),
        sa.Column("entropy", sa.Double(), nullable=True),
        sa.Column("density", sa.Double(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("reference", sa.JSON(), nullable=False),
        sa.Column("statistics", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("last_seen_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_task"),
        sa.UniqueConstraint("name", name="uq_task_name"),
        sa.CheckConstraint("density >= 0 AND density <= 1", name=op.f("ck_task_density_is_a_fraction")),
        sqlite_autoincrement=True,
    )


def create_batch() -> None:
    op.create_table(
        "batch",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=True),
        sa.Column("dedupe_key", sa.String(64), nullable=True),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("samples", sa.BigInteger(), nullable=True),
        sa.Column("labelled", sa.Boolean(), nullable=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("task_id", sa.Integer(), nullable=True),
        sa.Column("provisional", sa.Integer(), nullable=True),
        sa.Column("decision", sa.String(16), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_batch"),
        sa.UniqueConstraint("dedupe_key", name="uq_batch_dedupe_key"),
        sa.ForeignKeyConstraint(["task_id"], ["task.id"], name="fk_batch_task_id_task"),
        sa.CheckConstraint(f"state IN ({STATES})", name=op.f("ck_batch_state_is_known")),
        sa.CheckConstraint(f"decision IN ({KINDS})", name=op.f("ck_batch_decision_is_known")),
        sa.CheckConstraint("state <> 'committed' OR task_id IS NOT NULL", name=op.f("ck_batch_committed_has_a_task")),
        sa.CheckConstraint(
            "state <> 'quarantined' OR reason IS NOT NULL", name=op.f("ck_batch_quarantined_has_a_reason")
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_batch_task_id", "batch", ["task_id"])
    op.create_index("ix_batch_state_id", "batch", ["state", "id"])


def create_mask_version() -> None:
    op.create_table(
        "mask_version",
        sa.Column("task_id", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("batch_id", sa.Integer(), nullable=True),
        sa.Column("bits", sa.LargeBinary(), nullable=False),
        sa.Column("nbits", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("density", sa.Double(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("task_id", "version", name="pk_mask_version"),
        sa.ForeignKeyConstraint(["task_id"], ["task.id"], name="fk_mask_version_task_id_task"),
        sa.ForeignKeyConstraint(["batch_id"], ["batch.id"], name="fk_mask_version_batch_id_batch"),
        sa.CheckConstraint("density >= 0 AND density <= 1", name=op.f("ck_mask_version_density_is_a_fraction")),
    )
    op.create_index("ix_mask_version_batch_id", "mask_version", ["batch_id"])


def create_decision() -> None:
    op.create_table(
        "decision",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("batch_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("task_id", sa.Integer(), nullable=True),
        sa.Column("evidence", sa.JSON(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_decision"),
        sa.ForeignKeyConstraint(["batch_id"], ["batch.id"], name="fk_decision_batch_id_batch"),
        sa.ForeignKeyConstraint(["task_id"], ["task.id"], name="fk_decision_task_id_task"),
        sa.CheckConstraint(f"kind IN ({KINDS})", name=op.f("ck_decision_kind_is_known")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_decision_batch_id", "decision", ["batch_id"])
    op.create_index("ix_decision_task_id", "decision", ["task_id"])


def create_cursor() -> None:
    op.create_table(
        "cursor",
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("position", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("source", "key", name="pk_cursor"),
    )


def create_training_state() -> None:
    op.create_table(
        "training_state",
        sa.Column("task_id", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("turn", sa.BigInteger(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("task_id", name="pk_training_state"),
        sa.UniqueConstraint("turn", name="uq_training_state_turn"),
        sa.ForeignKeyConstraint(["task_id"], ["task.id"], name="fk_training_state_task_id_task"),
    )
