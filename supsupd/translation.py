"""What the store and the learning thread refuse, in the words of the socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from storage import ledger, tasks
from storage.db import StoreError
from storage.gaps import GapUnknown
from storage.ledger import LedgerConflict
from storage.masks import MaskCorrupt, MaskUnknown
from storage.models import TaskRow
from storage.spool import SpoolCorrupt
from supsupd.commands import CommandRefused
from supsupd.serving.engine import BadInput, EngineError

if TYPE_CHECKING:
    from storage.db import Session


def resolve(session: Session, reference: int | str, follow: bool = True) -> TaskRow:
    """Raises EngineError."""
    with translated():
        return tasks.resolve(session, reference, follow)


@contextmanager
def translated() -> Iterator[None]:
    """Raises EngineError for what is refused inside."""
    try:
        yield
    except (tasks.TaskUnknown, MaskUnknown) as error:
        raise EngineError(str(error), 404) from None
    except tasks.NameInvalid as error:
        raise BadInput(str(error)) from None
    except (tasks.NameTaken, tasks.TaskAmbiguous, tasks.TaskConflict, LedgerConflict, SpoolCorrupt) as error:
        raise EngineError(str(error), 409) from None
    except (ledger.BatchUnknown, GapUnknown) as error:
        raise EngineError(str(error), 404) from None
    except (CommandRefused, StoreError, OSError) as error:
        raise EngineError(str(error), 503) from None
    except MaskCorrupt as error:
        raise EngineError(f"mask_corrupt: {error}", 503) from None
