"""Masks may be stored in fewer bytes than their bits take. Those that are stored already stay as they are."""

import sqlalchemy as sa
from alembic import op

from storage import codec

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

CODINGS = "'zstd', 'gaps'"


def upgrade() -> None:
    known = sa.CheckConstraint(f"coding IN ({CODINGS})", name=op.f("ck_mask_version_coding_is_known"))
    # In place: with the constraint in the column, SQLite need not copy all masks.
    op.add_column("mask_version", sa.Column("coding", sa.String(8), known, nullable=True))


def downgrade() -> None:
    decode_masks()
    op.drop_column("mask_version", "coding")


def decode_masks() -> None:
    """Schema 0002 has raw bits only. Raises RuntimeError when a mask cannot be decoded."""
    run = op.get_bind().execute
    coded = run(sa.text("SELECT task_id, version FROM mask_version WHERE coding IS NOT NULL")).all()
    where = "WHERE task_id = :task_id AND version = :version"
    for task_id, version in coded:
        place = {"task_id": task_id, "version": version}
        row = run(sa.text(f"SELECT bits, coding, nbits FROM mask_version {where}"), place).one()  # noqa: S608 - constants
        try:
            bits = codec.decode(row.bits, row.coding, most=row.nbits)
        except codec.Undecodable as error:
            raise RuntimeError(f"mask of task {task_id}, version {version}: {error}") from error
        run(sa.text(f"UPDATE mask_version SET bits = :bits {where}"), place | {"bits": bits})  # noqa: S608
