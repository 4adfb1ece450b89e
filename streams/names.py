"""File names: made printable, shortened, put in natural order, known to be temporary."""

import hashlib
import re

TEMPORARY_SUFFIXES = (".tmp", ".part", ".partial", ".filepart", "~")
_SYSTEM = "lost+found"  # at the top of a file system, closed to all but root
_DIGITS = re.compile(r"([0-9]+)")


def printable(text: str) -> str:
    """Escape controls, direction marks, surrogates and backslashes; different texts stay different."""
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode("ascii") for c in text)


def shortened(text: str, most: int) -> str:
    """A text of at most `most` bytes of UTF-8, at least 34: one that is longer ends in a hash of the whole, so that
    different texts stay different."""
    data = text.encode("utf-8", "surrogatepass")
    if len(data) <= most:
        return text
    mark = f"~{hashlib.sha256(data).hexdigest()[:32]}"
    return data[: most - len(mark)].decode("utf-8", "ignore") + mark


def natural_key(name: str) -> tuple[str | int, ...]:
    """A sort key under which `b2` comes before `b10`."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(_DIGITS.split(name)))


def is_temporary(name: str) -> bool:
    """Whether writers use such a name for a file they have not finished yet, or the system for its own."""
    return name.startswith(".") or name.endswith(TEMPORARY_SUFFIXES) or name == _SYSTEM
