"""The table of settings in the guide: all of them, with the defaults that they have."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from supsupd.config import Settings

GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"


def documented():
    """{setting: its default as it is written}; a row may name several."""
    table = GUIDE.read_text().partition("## Settings")[2]
    rows = re.findall(r"^\| (`[^|]*`) \| ([^|]*) \|", table, re.MULTILINE)
    found = {}
    for names, default in rows:
        section = ""
        for name in re.findall(r"`([^`]+)`", names):
            section = name.rpartition(".")[0] or section if not name.startswith(".") else section
            found[section + name if name.startswith(".") else name] = default.strip()
    return found


def settings_of(model, prefix=""):
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings_of(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.default


DOCUMENTED = documented()


@pytest.mark.parametrize(("name", "default"), [pytest.param(*pair, id=pair[0]) for pair in settings_of(Settings)])
def test_every_setting_is_in_the_guide_with_its_default(name, default):
    assert name in DOCUMENTED
    written = DOCUMENTED[name].strip("`")
    if isinstance(default, bool | int | float) and re.fullmatch(r"true|false|[0-9.]+", written):
        assert tomllib.loads(f"x = {written}")["x"] == default
    if isinstance(default, str):
        assert default == written.split("`")[0]
    if default is None or default == []:
        assert not re.fullmatch(r"[0-9.]+|true|false", written)
