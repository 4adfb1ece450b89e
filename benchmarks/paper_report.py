"""What every experiment of `paper.py` hands back, and how it is printed and kept.

`run` gives a dict with "settings" and "measures" (rows of `measure`), and whatever its plot draws; `report` adds what
is needed to repeat it.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.table import Table

from supsupd import __version__

SUPSUP = "Wortsman et al. 2020, Supermasks in Superposition"
TAME = "Zhu et al. 2024, TAME"
PLOT_INCHES = (7.0, 4.2)
PLOT_DPI = 110


def measure(
    what: str,
    ours: float | str | None,
    target: float | None = None,
    paper: tuple[float, str] | None = None,
    sense: Literal["≥", "≤", "="] = "≥",
) -> dict[str, Any]:
    """A row of a table.

    `target` is what is wanted in the given sense; `paper` what others published, and who.
    """
    row: dict[str, Any] = {"what": what, "ours": ours}
    if target is not None:
        row |= {"target": target, "sense": sense, "reached": _reached(ours, target, sense)}
    if paper is not None:
        row |= {"paper": paper[0], "source": paper[1]}
    return row


def _reached(ours: float | str | None, target: float, sense: str) -> bool:
    if not isinstance(ours, int | float):
        return False
    return {"≥": ours >= target, "≤": ours <= target, "=": ours == target}[sense]


def report(result: Mapping[str, Any], experiment: str, command: str, seed: int, seconds: float) -> dict[str, Any]:
    """The result with what is needed to read and to repeat it."""
    about = {
        "experiment": experiment,
        "command": command,
        "seed": seed,
        "seconds": round(seconds, 1),
        "version": __version__,
        "machine": {"cpus": os.cpu_count(), "processor": _processor(), "python": platform.python_version()},
    }
    return about | dict(result)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def make_table(result: Mapping[str, Any]) -> Table:
    """Ours beside the target and the published figure."""
    table = Table("", "ours", "target", "published", "by", title=str(result["experiment"]))
    for row in result.get("measures", ()):
        table.add_row(*_cells(row))
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    ours = shown(row["ours"])
    if "target" in row:
        ours = f"[{'green' if row['reached'] else 'red'}]{ours}[/]"
    return [row["what"], ours, target_text(row), shown(row.get("paper")), row.get("source") or ""]


def target_text(row: Mapping[str, Any]) -> str:
    return f"{row['sense']} {shown(row['target'])}" if "target" in row else ""


def shown(value: float | str | None) -> str:
    """A figure as tables show it."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def new_figure() -> Figure:
    """An empty figure that no window is opened for."""
    mpl.use("Agg")
    return Figure(figsize=PLOT_INCHES, dpi=PLOT_DPI, layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """A PNG that the same data give byte for byte with the same matplotlib."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
