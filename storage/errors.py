"""How the store can refuse: one class for each thing that a caller does next. The text is a line without secrets."""


class StoreError(RuntimeError):
    """The database refused: damaged, against a constraint, or as a subclass says. Nothing was stored."""


class ValueRefused(StoreError):
    """A value that no store holds, or that a constraint forbids: it would be refused again. Nothing was stored."""


class TransactionLost(StoreError):
    """The transaction was over before its end, as SQLite ends one by itself: all of it has to be done again."""


class StoreUnavailable(StoreError):
    """Locked by someone else, or away: worth trying again. Nothing was stored."""


class StoreTaken(StoreError):
    """Another process is the writer of this store. Nothing was stored."""


class DiskFull(StoreError):
    """There is no room: worth trying again once there is. Nothing was stored."""


class CommitUnknown(StoreError):
    """The COMMIT itself failed: all of the transaction is stored, or nothing. Read the store to know which."""


class StoreFailed(StoreError):
    """Reading, writing or fsync failed: what the disk holds is not known, and asking again proves nothing. End here."""


class SchemaMismatch(RuntimeError):
    """The database does not have the schema that this version of the program works with."""
