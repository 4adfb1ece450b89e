"""What is known of the inputs of all tasks together: one matrix of opaque bytes, verified."""

from sqlalchemy.orm import Session

from storage import packing
from storage.models import FeatureProductsRow, TaskRow, utc_now


class FeaturesCorrupt(RuntimeError):
    """The stored matrix is not what was stored."""


def save(session: Session, products: bytes, task_id: int, sums: bytes) -> None:
    """Store the matrix in place of the last one, and the sums of the task that changed."""
    digest = packing.sha256(products)
    session.merge(FeatureProductsRow(id=1, products=products, sha256=digest, updated_at=utc_now()))
    row = session.get(TaskRow, task_id)
    if row is not None:
        row.statistics = sums
    session.flush()


def get_products(session: Session) -> bytes | None:
    """The matrix; None before the first. Raises FeaturesCorrupt."""
    row = session.get(FeatureProductsRow, 1)
    if row is None:
        return None
    if packing.sha256(row.products) != row.sha256:
        raise FeaturesCorrupt("features: the matrix has another SHA-256 than when it was stored")
    return row.products


def list_corrupt(session: Session) -> list[str]:
    """What is not as it was stored, in words."""
    try:
        get_products(session)
    except FeaturesCorrupt as error:
        return [str(error)]
    return []
