"""Keeps the tables of docs/paper.md and docs/performance.md true to docs/results/: run it to write them anew.

A result's table lies between the lines `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import ROOT
from paper_report import shown, target_text

RESULTS = ROOT / "docs" / "results"
DOCUMENTS = {ROOT / "docs" / "paper.md": "paper_", ROOT / "docs" / "performance.md": ""}
"""Each with what its results' names begin with."""
BLOCK = re.compile(r"(<!-- table: ([a-z_-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def make_markdown(result: Mapping[str, Any], published: bool) -> str:
    """The table of a result, with what others published or without, and how it was made."""
    rows = result.get("measures", ())
    names = ["", "ours", "target"] + ["published"] * published
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines[0] = lines[0].replace("|  |", "| |")
    lines += ["| " + " | ".join(_cells(row)[: len(names)]) + " |" for row in rows]
    machine = result["machine"]
    made = f"`{result['command']}`: {result['seconds']:,.0f} s on {machine['cpus']} CPUs ({machine['processor']})."
    return "\n".join([*lines, "", made]) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    target = ""
    if "target" in row:
        target = target_text(row) + ("" if row["reached"] else " **not reached**")
    published = f"{shown(row['paper'])} ({row['source']})" if "paper" in row else ""
    return [row["what"], shown(row["ours"]), target, published]


def renew(text: str, results: Path, prefix: str) -> str:
    """The document with every table that has a result written anew."""

    def table(match: re.Match[str]) -> str:
        path = results / f"{prefix}{match[2].replace('-', '_')}.json"
        if not path.exists():
            return match[0]
        result = json.loads(path.read_text(encoding="utf-8"))
        return f"{match[1]}{make_markdown(result, bool(prefix))}{match[3]}" if "measures" in result else match[0]

    return BLOCK.sub(table, text)


def main() -> None:
    for document, prefix in DOCUMENTS.items():
        document.write_text(renew(document.read_text(encoding="utf-8"), RESULTS, prefix), encoding="utf-8")


if __name__ == "__main__":
    main()
