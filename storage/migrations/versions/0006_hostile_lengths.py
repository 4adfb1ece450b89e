"""Keys by hash, since texts of any length name things; who posted a batch; predictions that are not written yet."""

import hashlib
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
AUTOINCREMENT = {"sqlite_autoincrement": True}  # reflection does not see it
COPIED = 1000
"""Rows that are copied by one statement."""


def upgrade() -> None:
    with op.batch_alter_table("batch", table_kwargs=AUTOINCREMENT) as batch:
        batch.alter_column("form", existing_type=sa.String(16), type_=sa.String(32), existing_nullable=True)
        batch.add_column(sa.Column("sender", sa.String(64), nullable=True))
    op.drop_index("ix_gap_source", "gap")
    _keyed_by_hash("cursor", "key", sa.Column("position", sa.Text(), nullable=False))
    expiry = sa.Column("expires_at", TIME, nullable=True)
    _keyed_by_hash("sighting", "identity", _batch_id(), expiry, _reference("sighting"))
    op.create_index("ix_sighting_expires_at", "sighting", ["expires_at"])
    op.create_table(
        "prediction",
        sa.Column("batch_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("batch_id", name="pk_prediction"),
        _reference("prediction"),
    )


def downgrade() -> None:
    refuse_unwritten()
    op.drop_table("prediction")
    op.drop_index("ix_sighting_expires_at", "sighting")
    _keyed_by_text("sighting", "identity", _batch_id(), _reference("sighting"))
    _keyed_by_text("cursor", "key", sa.Column("position", sa.Text(), nullable=False))
    op.create_index("ix_gap_source", "gap", ["source"])
    op.execute("UPDATE batch SET form = substr(form, 1, 16)")  # no format that is known has as many characters
    with op.batch_alter_table("batch", table_kwargs=AUTOINCREMENT) as batch:
        batch.drop_column("sender")
        batch.alter_column("form", existing_type=sa.String(32), type_=sa.String(16), existing_nullable=True)


def _batch_id() -> sa.Column[int]:
    return sa.Column("batch_id", sa.Integer(), nullable=False)


def _reference(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["batch_id"], ["batch.id"], name=f"fk_{table}_batch_id_batch")


def _keyed_by_hash(name: str, key: str, value: sa.Column[Any], *more: sa.Column[Any] | sa.ForeignKeyConstraint) -> None:
    """Makes the table anew, with the hash of source and key as its primary key."""
    digest = sa.Column("digest", sa.String(64), nullable=False)
    primary = sa.PrimaryKeyConstraint("digest", name=f"pk_{name}")
    _make_anew(name, key, (digest, *_texts(key), value, *more, primary))


def _keyed_by_text(name: str, key: str, value: sa.Column[Any], *more: sa.ForeignKeyConstraint) -> None:
    primary = sa.PrimaryKeyConstraint("source", key, name=f"pk_{name}")
    _make_anew(name, key, (*_texts(key), value, *more, primary))


def _texts(key: str) -> tuple[sa.Column[str], sa.Column[str]]:
    return sa.Column("source", sa.Text(), nullable=False), sa.Column(key, sa.Text(), nullable=False)


def _make_anew(name: str, key: str, parts: Sequence[Any]) -> None:
    """Copies all rows into a table of these parts, whose constraints get the names that the old one's had."""
    connection = op.get_bind()
    op.rename_table(name, f"{name}_before")
    old = sa.Table(f"{name}_before", sa.MetaData(), autoload_with=connection)
    if connection.dialect.name == "postgresql":  # where names of constraints are the schema's
        for constraint in (old.primary_key, *old.foreign_key_constraints):
            op.drop_constraint(str(constraint.name), old.name)
    new = op.create_table(name, *parts)
    found = connection.execute(sa.select(old)).mappings()
    while rows := found.fetchmany(COPIED):
        digests = (hashlib.sha256(f"{row['source']}\0{row[key]}".encode()).hexdigest() for row in rows)
        copies = ({**row, "digest": digest} for row, digest in zip(rows, digests, strict=True))
        kept = [{column: value for column, value in copy.items() if column in new.columns} for copy in copies]
        op.bulk_insert(new, kept)
    op.drop_table(old.name)


def refuse_unwritten() -> None:
    """Schema 0005 has no place for them. Raises RuntimeError."""
    count = op.get_bind().scalar(sa.text("SELECT count(*) FROM prediction"))
    if count:
        raise RuntimeError(f"the predictions of {count} batches are not written yet, which schema 0005 cannot hold")
