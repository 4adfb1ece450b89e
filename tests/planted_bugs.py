"""Five bugs that must not live: each function plants one, in the process that calls it before its daemon starts."""

import contextlib
import os
import re
import sqlite3
import sys
import time
from contextlib import contextmanager

from storage.db import Database
from storage.durable import Files


def fsync_removed():
    """The spool's bytes and names are left to the system's cache."""
    Files.sync = lambda self, descriptor: os.close(descriptor)
    Files.sync_folder = lambda self, folder: None


def ack_early():
    """A source is told before its items are durable."""
    from supsupd.intake import Intake

    look_into = Intake._look_into

    def hasty(self, group, source):
        looked = look_into(self, group, source)
        source.acknowledge([taken.item for taken in looked])
        return looked

    Intake._look_into = hasty


def mask_outside_the_transaction():
    """A mask is stored in a transaction of its own, after that of its batch."""
    from storage import masks

    append, write = masks.append_mask, Database.write
    later = []
    masks.append_mask = lambda session, mask: later.append(mask)

    @contextmanager
    def two_transactions(self):
        with write(self) as session:
            yield session
        if later:
            from storage.failpoints import hit

            hit("learn.committed")  # between the two
            with write(self) as session:
                while later:
                    append(session, later.pop())

    Database.write = two_transactions


def rolled_back_transaction_ignored():
    """The database ends a transaction by itself, as a full disk makes it, and nobody looks whether it did."""
    from sqlalchemy import event

    from storage import masks, sqlite

    append = masks.append_mask

    def trusting(engine, begin, in_transaction):
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
        return engine

    def on_a_full_disk(session, mask):
        append(session, mask)
        if mask.version == 2:
            session.flush()
            session.connection().connection.driver_connection.rollback()

    sqlite.guard = trusting
    masks.append_mask = on_a_full_disk


def learner_that_can_be_frozen():
    """No bug: learning stands still while there is a file `frozen` in the state directory."""
    from supsupd.worker import Worker

    step = Worker.step

    def when_allowed(self):
        while (self.settings.state / "frozen").exists():
            time.sleep(0.05)
        return step(self)

    Worker.step = when_allowed


def drop_unique_content(database):
    """Makes the ledger of a database file anew without the rule that a content has one row that may take effect."""
    rule = "CONSTRAINT uq_batch_dedupe_key UNIQUE (dedupe_key)"
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        run = connection.execute
        (made,) = run("SELECT sql FROM sqlite_master WHERE name = 'batch'").fetchone()
        indexes = run("SELECT sql FROM sqlite_master WHERE tbl_name = 'batch' AND type = 'index' AND sql IS NOT NULL")
        indexes = [sql for (sql,) in indexes.fetchall()]
        assert rule in made
        run("PRAGMA legacy_alter_table=ON")  # what refers to the table keeps referring to its name
        run("ALTER TABLE batch RENAME TO old")
        run(re.sub(rf",\s*{re.escape(rule)}", "", made))
        run("INSERT INTO batch SELECT * FROM old")
        run("DROP TABLE old")
        for sql in indexes:
            run(sql)


BUGS = ("fsync_removed", "ack_early", "mask_outside_the_transaction", "rolled_back_transaction_ignored")


def main():
    """`supsupd`, with the bug that is the first argument."""
    bug = sys.argv.pop(1)
    assert bug in BUGS
    globals()[bug]()
    from cli.supsupd import app

    sys.argv[0] = "supsupd"
    app()


if __name__ == "__main__":
    main()
