"""On which line of a TOML text each key stands, which the standard parser does not tell."""

import re
import tomllib
from collections.abc import Iterator

Path = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|' + r"'''.*?'{3,5}|" + r'"(?:\\.|[^"\\\n])*"|' + r"'[^'\n]*'", re.DOTALL
)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}#\n]*")  # numbers, dates, booleans


def key_lines(text: str) -> dict[Path, int]:
    """The line, from 1, of each key and each element of a list in `text`, which must be TOML.

    A path has a key for each table and an index for each list: `[[a]]` and `b = [1]` give ("a",), ("a", 0),
    ("a", 0, "b") and ("a", 0, "b", 0). Where a table is named several times, it stands where it is named first.
    """
    return _Reader(text).read()


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Path, int] = {}
        self.last: dict[Path, int] = {}  # the index of the last `[[table]]`

    def read(self) -> dict[Path, int]:
        table: Path = ()
        while self._skip() < len(self.text):
            if self.text.startswith("[[", self.at):
                table = self._header(2)
                self.last[table] = self.last.get(table, -1) + 1
                table = (*table, self.last[table])
                self._note(table)
            elif self.text[self.at] == "[":
                table = self._header(1)
            else:
                self._pair(table)
        return self.lines

    def _header(self, brackets: int) -> Path:
        """The table that a header names; of tables in lists, the last."""
        self.at += brackets
        path: Path = ()
        for key in self._keys():
            if path in self.last:
                path = (*path, self.last[path])
            path = (*path, key)
            self._note(path)
        self.at += brackets
        return path if brackets == 2 or path not in self.last else (*path, self.last[path])

    def _pair(self, table: Path) -> None:
        path = table
        for key in self._keys():
            path = (*path, key)
            self._note(path)
        self.at += 1  # the =
        self._value(path)

    def _keys(self) -> Iterator[str]:
        """A dotted key; ends before what comes behind it."""
        while True:
            self._skip()
            quoted = _STRING.match(self.text, self.at)
            bare = quoted or _BARE_KEY.match(self.text, self.at)
            assert bare is not None
            yield _unquoted(quoted[0]) if quoted else bare[0]
            self.at = bare.end()
            self._skip()
            if self.text[self.at] != ".":
                return
            self.at += 1

    def _value(self, path: Path) -> None:
        self._skip()
        opening = self.text[self.at]
        if opening == "[":
            for index in self._items("]"):
                self._note((*path, index))
                self._value((*path, index))
        elif opening == "{":
            for _ in self._items("}"):
                self._pair(path)
        else:
            found = _STRING.match(self.text, self.at) or _SCALAR.match(self.text, self.at)
            assert found is not None
            self.at = found.end()

    def _items(self, closing: str) -> Iterator[int]:
        """Stands before each item of a list or table in one line, and at last behind it."""
        self.at += 1
        index = 0
        while self.text[self._skip()] != closing:
            yield index
            index += 1
            if self.text[self._skip()] == ",":
                self.at += 1
        self.at += 1

    def _skip(self) -> int:
        """Over white space and comments."""
        blank = _BLANK.match(self.text, self.at)
        assert blank is not None
        self.at = blank.end()
        return self.at

    def _note(self, path: Path) -> None:
        self.lines.setdefault(path, self.text.count("\n", 0, self.at) + 1)


def _unquoted(key: str) -> str:
    (name,) = tomllib.loads(f"{key} = 0")
    return name
