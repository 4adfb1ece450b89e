"""What is promised of every batch, tried: kills, full disks, lost acknowledgements, damaged files; one table.

`durability.py` measures all rows, `durability.py kills --runs 20` one of them so often; a row that was measured takes
its place among the others in docs/results/durability.json, and docs/reliability.md shows them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import ROOT
from durability_crash import kills, matrix, order, planted, power
from durability_intake import bad_files, cuts, frozen, kafka_bench, nats_bench, soak
from durability_rows import Row, Run, Skipped, tell
from durability_store import commit_cut, disk_full, mutants
from paper_report import report, write_json
from rich.console import Console
from rich.table import Table

from supsupd.logs import configure

RESULT = ROOT / "docs" / "results" / "durability.json"
DOCUMENT = ROOT / "docs" / "reliability.md"
BLOCK = re.compile(r"(<!-- durability -->\n).*?(<!-- end -->)", re.DOTALL)


def rows() -> dict[str, Row]:
    """All rows, in the order of the table."""
    from brokers import RedisBench

    return {
        "kills": Row("kill -9 at random moments", "0 lost, 0 doubled, masks bit-identical", 200, kills),
        "failpoints": Row("each failpoint: kill, EIO, ENOSPC", "each one hit, the same", 3, matrix),
        "power": Row("loss of power in the file protocol", "all states, 0 bad", 1, power),
        "order": Row("sync, rename, commit, acknowledge (strace)", "0 out of order", 20, order),
        "nats": Row("NATS connections cut", "one effect each", 100, cuts("nats", nats_bench)),
        "redis": Row("Redis connections cut", "one effect each", 100, cuts("redis", RedisBench)),
        "kafka": Row("Kafka connections cut", "one effect each", 100, cuts("kafka", kafka_bench)),
        "disk": Row("disk full on a small tmpfs", "stays up, answers, goes on, 0 lost", 20, disk_full),
        "postgresql": Row("PostgreSQL cut in a COMMIT", "stays up, answers, goes on, 0 lost", 20, commit_cut),
        "frozen": Row("learner stands still", "memory ≤ +64 MiB, all learned after", 10_000, frozen),
        "bad-files": Row("bad files", "each refused, the next one learned", 1, bad_files),
        "mutants": Row("mutated databases", "refused in a line or verified, 0 tracebacks", 500, mutants),
        "soak": Row("a long stream with queries", "memory and descriptors flat", 5_000, soak),
        "planted": Row("five planted bugs", "each caught", 5, planted),
    }


def measure(name: str, row: Row, runs: int, seed: int) -> dict[str, Any]:
    """A row's result, as it is kept."""
    folder = Path(tempfile.mkdtemp(prefix=f"durability-{name}-"))
    started = time.monotonic()
    found: dict[str, Any] = {"what": row.what, "reach": row.reach, "seed": seed}
    try:
        outcome = row.measure(Run(runs, seed, folder))
        found |= {"runs": outcome.runs, "result": outcome.result, "problems": outcome.problems}
    except Skipped as reason:
        found |= {"runs": 0, "result": f"SKIPPED: {reason}", "problems": [f"skipped: {reason}"]}
    except Exception as error:  # noqa: BLE001 - the other rows are still measured
        found |= {"runs": 0, "result": "failed", "problems": [f"{type(error).__name__}: {error}"]}
    found["seconds"] = round(time.monotonic() - started, 1)
    if found["problems"]:
        tell(f"{name}: {folder} is kept")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def cells(row: Mapping[str, Any]) -> list[str]:
    wrong = f"**{len(row['problems'])} problems**, the first: {row['problems'][0]}; " if row["problems"] else ""
    return [row["what"], row["reach"], f"{row['runs']:,}", wrong + row["result"], f"{row['seconds']:,.0f}"]


def renew(text: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The document with the table written anew."""
    names = ["what", "to reach", "runs", "result", "seconds"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in results.values()]
    return BLOCK.sub(lambda match: match[1] + "\n".join(lines) + "\n" + match[2], text)


def main() -> None:
    known = rows()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"some of {', '.join(known)}; default: all")
    parser.add_argument("--runs", type=int, help="how often, and print only; default: as in the table, written there")
    parser.add_argument("--seed", type=int, default=20_260_101)
    parser.add_argument("--dry", action="store_true", help="print only, write nothing")
    options = parser.parse_args()
    if unknown := [name for name in options.rows if name not in known]:
        parser.error(f"there is no row {unknown[0]}; expected some of {', '.join(known)}")
    configure(level="error")
    measured = {}
    for name in options.rows or known:
        row = known[name]
        measured[name] = measure(name, row, options.runs or row.runs, options.seed)
        if not options.dry and options.runs is None:
            # Read only now: another row may have been measured meanwhile.
            kept = (json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else {}) | measured
            _write({name: kept[name] for name in known if name in kept}, options.seed)
    table = Table("", "to reach", "runs", "result", "seconds", title="Durability")
    for result in measured.values():
        table.add_row(*cells(result))
    Console().print(table)
    for name, result in measured.items():
        for problem in result["problems"]:
            print(f"{name}: {problem}")
    sys.exit(any(result["problems"] for result in measured.values()))


def _write(results: Mapping[str, Mapping[str, Any]], seed: int) -> None:
    seconds = sum(row["seconds"] for row in results.values())
    write_json(RESULT, report({"rows": results}, "durability", "python benchmarks/durability.py", seed, seconds))
    DOCUMENT.write_text(renew(DOCUMENT.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
