"""How bytes are to be read: what one batch may claim, and which columns of a table mean what."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Limits:
    """What one batch may claim. `bytes` counts what it unpacks to, `ratio` is unpacked to packed."""

    bytes: int = 512 << 20
    members: int = 64
    ratio: int = 200
    samples: int = 1_000_000
    pixels: int = 1 << 24  # of one image


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a table (CSV, Parquet, Arrow) hold what.

    x: the names in order, or the name of one column of lists; empty: a column of lists called `x`, or else all columns
    but those of y and task.
    y: None: a column `y` or else `label`, if there is one.
    task: None: a column `task`, if there is one.
    """

    x: tuple[str, ...] = ()
    y: str | None = None
    task: str | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """All that decoding depends on besides the bytes; `with_task`: whether a task that they name is looked for."""

    limits: Limits = field(default_factory=Limits)
    columns: Columns = field(default_factory=Columns)
    with_task: bool = False
