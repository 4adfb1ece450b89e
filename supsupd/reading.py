"""How the bytes of batches are read, as set: in a process of its own in the daemon, in this one elsewhere."""

from streams.decoder import InlineDecoder, ProcessDecoder, ProcessLimits
from streams.reading import Columns, Limits, Reading
from supsupd.config import Settings


def reading_of(settings: Settings) -> Reading:
    """What a batch may hold, and which columns of a table are what."""
    columns = settings.columns
    return Reading(
        limits=Limits(bytes=settings.intake.max_unpacked_bytes),
        columns=Columns(x=tuple(columns.x), y=columns.y, task=columns.task),
        with_task=settings.recognition.task_rule != "ignored",
    )


def inline_decoder(settings: Settings) -> InlineDecoder:
    """For tests, and for tools that trust what they read."""
    return InlineDecoder(reading_of(settings))


def process_decoder(settings: Settings, processes: int = 1) -> ProcessDecoder:
    """Up to `processes` workers with limits, started when they are asked."""
    intake = settings.intake
    limits = ProcessLimits(memory_bytes=intake.decode_memory_bytes, seconds=intake.decode_seconds, processes=processes)
    return ProcessDecoder(reading_of(settings), limits)
