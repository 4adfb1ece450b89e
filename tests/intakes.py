"""An intake over a worker's store, as the daemon makes it, but with decoding in this process."""

import threading

from supsupd.intake import Intake
from supsupd.reading import inline_decoder
from supsupd.staging import Staging


def intake_of(settings, worker):
    rule = settings.recognition.task_rule
    staging = Staging(worker.database, worker.spool, settings.intake, inline_decoder(settings), rule)
    return Intake(staging, settings.intake, worker.notify)


def take_all(intake, source):
    """One pass over a source."""
    intake.add(source)
    assert intake._pass(intake.progress.pop(), threading.Event())
