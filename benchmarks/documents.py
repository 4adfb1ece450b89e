"""Keeps the tables of docs/paper.md true to docs/results/: `python benchmarks/paper_doc.py` writes them anew.

An experiment's table lies between the lines `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import ROOT
from paper_report import shown, target_text

DOCUMENT = ROOT / "docs" / "paper.md"
RESULTS = ROOT / "docs" / "results"
BLOCK = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def make_markdown(result: Mapping[str, Any]) -> str:
    """The table of a result, and how it was made."""
    lines = ["| | ours | target | published |", "|---|---|---|---|"]
    lines += [_row(row) for row in result.get("measures", ())]
    machine = result["machine"]
    made = f"`{result['command']}`: {result['seconds']:,.0f} s on {machine['cpus']} CPUs ({machine['processor']})."
    return "\n".join([*lines, "", made]) + "\n"


def _row(row: Mapping[str, Any]) -> str:
    target = ""
    if "target" in row:
        target = target_text(row) + ("" if row["reached"] else " **not reached**")
    published = f"{shown(row['paper'])} ({row['source']})" if "paper" in row else ""
    return f"| {row['what']} | {shown(row['ours'])} | {target} | {published} |"


def renew(text: str, results: Path) -> str:
    """The document with every table that has a result written anew."""

    def table(match: re.Match[str]) -> str:
        path = results / f"paper_{match[2].replace('-', '_')}.json"
        if not path.exists():
            return match[0]
        result = json.loads(path.read_text(encoding="utf-8"))
        return f"{match[1]}{make_markdown(result)}{match[3]}" if "measures" in result else match[0]

    return BLOCK.sub(table, text)


def main() -> None:
    DOCUMENT.write_text(renew(DOCUMENT.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main()
