"""Retired and merged tasks, tasks that the user names, reasons of versions and decisions, statistics, the reservoir."""

import sqlalchemy as sa
from alembic import op

from storage import packing

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
AUTOINCREMENT = {"sqlite_autoincrement": True}  # reflection does not see it


def upgrade() -> None:
    # Tasks are few and are copied; the other tables may be large and get their columns in place.
    with op.batch_alter_table("task", table_kwargs=AUTOINCREMENT) as task:
        task.add_column(sa.Column("retired_at", TIME, nullable=True))
        task.add_column(sa.Column("merged_into", sa.Integer(), nullable=True))
        task.add_column(sa.Column("key", sa.Text(), nullable=True))
        task.create_unique_constraint("uq_task_key", ["key"])
        task.create_foreign_key("fk_task_merged_into_task", "task", ["merged_into"], ["id"])
        task.create_check_constraint(op.f("ck_task_merged_into_another"), "merged_into <> id")
        task.create_check_constraint(op.f("ck_task_merged_is_retired"), "merged_into IS NULL OR retired_at IS NOT NULL")
    op.add_column("batch", sa.Column("given_task", sa.Text(), nullable=True))
    op.add_column("mask_version", sa.Column("statistics", sa.LargeBinary(), nullable=True))
    op.add_column("mask_version", sa.Column("reason", sa.Text(), nullable=True))
    op.add_column("mask_version", sa.Column("reference", sa.JSON(), nullable=True))
    op.add_column("decision", sa.Column("reason", sa.Text(), nullable=True))
    create_reservoir()
    op.create_table(
        "feature_products",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("products", sa.LargeBinary(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_feature_products_only_one")),
        sa.PrimaryKeyConstraint("id", name="pk_feature_products"),
    )


def create_reservoir() -> None:
    op.create_table(
        "reservoir",
        sa.Column("layer", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("patterns", sa.Integer(), nullable=False),
        sa.Column("matrix", sa.LargeBinary(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("layer", name="pk_reservoir"),
    )
    op.create_table(
        "reservoir_pattern",
        sa.Column("task_id", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("turn", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("task_id", name="pk_reservoir_pattern"),
        sa.UniqueConstraint("turn", name="uq_reservoir_pattern_turn"),
        sa.ForeignKeyConstraint(["task_id"], ["task.id"], name="fk_reservoir_pattern_task_id_task"),
    )


def downgrade() -> None:
    refuse_statistics()
    count_padding()
    op.drop_table("feature_products")
    op.drop_table("reservoir_pattern")
    op.drop_table("reservoir")
    for column in ("reference", "reason", "statistics"):
        op.drop_column("mask_version", column)
    op.drop_column("batch", "given_task")
    op.drop_column("decision", "reason")
    with op.batch_alter_table("task", table_kwargs=AUTOINCREMENT) as task:
        task.drop_constraint("uq_task_key", type_="unique")
        task.drop_constraint("fk_task_merged_into_task", type_="foreignkey")
        task.drop_constraint(op.f("ck_task_merged_into_another"), type_="check")
        task.drop_constraint(op.f("ck_task_merged_is_retired"), type_="check")
        for column in ("key", "merged_into", "retired_at"):
            task.drop_column(column)


def refuse_statistics() -> None:
    """Masks that need statistics are nothing without them."""
    count = op.get_bind().scalar(sa.text("SELECT count(*) FROM mask_version WHERE statistics IS NOT NULL"))
    if count:
        raise RuntimeError(f"{count} masks have statistics, which schema 0001 cannot hold")


def count_padding() -> None:
    """Schema 0001 takes all stored bits for weights, those that fill up the rows' last bytes too."""
    run = op.get_bind().execute
    for task_id, version in run(sa.text("SELECT task_id, version FROM mask_version")).all():
        place = {"task_id": task_id, "version": version}
        where = "WHERE task_id = :task_id AND version = :version"
        bits = run(sa.text(f"SELECT bits FROM mask_version {where}"), place).scalar_one()  # noqa: S608 - constants
        counted = place | {"nbits": 8 * len(bits), "density": packing.popcount(bits) / (8 * len(bits) or 1)}
        run(sa.text(f"UPDATE mask_version SET nbits = :nbits, density = :density {where}"), counted)  # noqa: S608
