"""Deliveries, gaps, rejected batches that can be sent in again, and who made a mask version."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
AUTOINCREMENT = {"sqlite_autoincrement": True}  # reflection does not see it
BEFORE = "'staged', 'training', 'unsure', 'scored', 'committed', 'duplicate', 'quarantined'"
STATES = f"{BEFORE}, 'suspended', 'retried', 'dropped'"
CHECK = "ck_batch_state_is_known"


def upgrade() -> None:
    with op.batch_alter_table("batch", table_kwargs=AUTOINCREMENT) as batch:
        batch.add_column(sa.Column("form", sa.String(16), nullable=True))
        batch.add_column(sa.Column("code", sa.String(32), nullable=True))
        batch.add_column(sa.Column("crashes", sa.Integer(), server_default="0", nullable=False))
        batch.add_column(sa.Column("retry_of", sa.Integer(), nullable=True))
        batch.create_foreign_key("fk_batch_retry_of_batch", "batch", ["retry_of"], ["id"])
        batch.drop_constraint(op.f(CHECK), type_="check")
        batch.create_check_constraint(op.f(CHECK), f"state IN ({STATES})")
    op.execute(
        "UPDATE batch SET code = substr(reason, 1, instr(reason, ':') - 1)"
        " WHERE state = 'quarantined' AND instr(reason, ':') BETWEEN 2 AND 33"
        if op.get_bind().dialect.name == "sqlite"
        else "UPDATE batch SET code = split_part(reason, ':', 1)"
        " WHERE state = 'quarantined' AND strpos(reason, ':') BETWEEN 2 AND 33"
    )
    op.create_index("ix_batch_sha256", "batch", ["sha256"])
    op.add_column("mask_version", sa.Column("made_by", sa.Text(), nullable=True))
    op.create_table(
        "sighting",
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("identity", sa.Text(), nullable=False),
        sa.Column("batch_id", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("source", "identity", name="pk_sighting"),
        sa.ForeignKeyConstraint(["batch_id"], ["batch.id"], name="fk_sighting_batch_id_batch"),
    )
    op.create_table(
        "gap",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("position", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("accepted_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_gap"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_gap_source", "gap", ["source"])


def downgrade() -> None:
    refuse_open_gaps()
    op.drop_table("gap")
    op.drop_table("sighting")
    op.drop_column("mask_version", "made_by")
    op.drop_index("ix_batch_sha256", "batch")
    # Schema 0004 knows neither state: what an operator gave up, or sent in again, was rejected once.
    op.execute("UPDATE batch SET state = 'staged' WHERE state = 'suspended'")
    op.execute(
        "UPDATE batch SET state = 'quarantined', reason = coalesce(reason, state) WHERE state IN ('retried', 'dropped')"
    )
    with op.batch_alter_table("batch", table_kwargs=AUTOINCREMENT) as batch:
        batch.drop_constraint(op.f(CHECK), type_="check")
        batch.create_check_constraint(op.f(CHECK), f"state IN ({BEFORE})")
        batch.drop_constraint("fk_batch_retry_of_batch", type_="foreignkey")
        for column in ("retry_of", "crashes", "code", "form"):
            batch.drop_column(column)


def refuse_open_gaps() -> None:
    """Schema 0004 would go on as if nothing were missing. Raises RuntimeError."""
    count = op.get_bind().scalar(sa.text("SELECT count(*) FROM gap WHERE accepted_at IS NULL"))
    if count:
        raise RuntimeError(f"{count} gaps are not accepted, which schema 0004 cannot hold")
