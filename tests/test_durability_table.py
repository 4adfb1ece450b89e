"""The table of docs/reliability.md is that of the results, and holds every row that can be measured."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import durability

ROW = {"what": "a kill", "reach": "0 lost", "runs": 1000, "result": "fine | so far", "problems": [], "seconds": 7.4}


def test_a_row_says_what_was_tried_and_what_was_wrong():
    assert durability.cells(ROW) == ["a kill", "0 lost", "1,000", "fine | so far", "7"]
    assert durability.cells(ROW | {"problems": ["lost: x"]})[3] == "**1 problems**, the first: lost: x; fine | so far"


def test_the_document_takes_the_rows():
    text = durability.renew("before\n<!-- durability -->\nold\n<!-- end -->\nafter\n", {"kills": ROW})
    assert text.startswith("before\n<!-- durability -->\n| what | to reach | runs | result | seconds |\n|---|---|")
    assert text.endswith("| a kill | 0 lost | 1,000 | fine \\| so far | 7 |\n<!-- end -->\nafter\n")


def test_the_document_is_that_of_the_results():
    document = durability.DOCUMENT.read_text(encoding="utf-8")
    assert durability.BLOCK.search(document)
    if not durability.RESULT.exists():
        pytest.skip("nothing was measured yet")
    rows = json.loads(durability.RESULT.read_text(encoding="utf-8"))["rows"]
    assert list(rows) == list(durability.rows())
    assert durability.renew(document, rows) == document
