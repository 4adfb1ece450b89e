"""A small real stream: scikit-learn's 8x8 digits; each task sees their pixels in an order of its own."""

import os
from functools import cache
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

PIXELS, TRAINING = 64, 1400
FIRST_MTIME = 1_700_000_000


@cache
def _digits():
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return (data.data[order] / 16).astype(np.float32), data.target[order]


def view(x, task):
    """The rows x (n, 64) as `task` sees them."""
    return x[:, np.random.default_rng([1, task]).permutation(PIXELS)]


def draw(task, seed, rows=64):
    """A training batch of `task`: {"x": (rows, 64), "y": (rows,)}; another seed, another batch."""
    x, y = _digits()
    chosen = np.random.default_rng([2, task, seed]).choice(TRAINING, rows)
    return {"x": view(x[chosen], task), "y": y[chosen]}


def held_out(task):
    """The 397 rows that `draw` never gives, as `task` sees them: x (397, 64), y (397,)."""
    x, y = _digits()
    return view(x[TRAINING:], task), y[TRAINING:]


def drop(path: Path, turn: int, **arrays) -> Path:
    """Puts a whole .npz in place by a rename; files with a lower `turn` come first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    os.utime(temporary, (FIRST_MTIME + turn, FIRST_MTIME + turn))
    return temporary.rename(path)
