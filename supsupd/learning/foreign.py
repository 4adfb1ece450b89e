"""What is foreign to a task: copies of its own rows that are none of its classes, for the superfluous outputs to claim.

A mask trained so knows its inputs from others' (Kim et al. 2022, "A Theoretical Study on Solving Continual Learning").
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Foreign = Literal["rotated", "shuffled"]


def foreign_copies(
    kind: Foreign, x: Tensor, y: Tensor, network: tuple[tuple[int, ...], int], order: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """One foreign copy of each row x (n, inputs) and its output, y (n,) to int64 (n,).

    rotated   images turned by one, two or three quarters (oblong ones by two); each class has an output of its own for
              each turn, counted from the last output down;
    shuffled  the row's inputs in random order; all go to the last output.

    `network` is the shape of one row and the number of outputs, of which at least one must lie above the classes in y.
    """
    shape, outputs = network
    if kind == "shuffled":
        places = torch.from_numpy(order.permuted(np.tile(np.arange(x.shape[1]), (len(x), 1)), axis=1)).to(x.device)
        return x.gather(1, places), torch.full_like(y, outputs - 1)
    turns = np.full(len(x), 2) if shape[0] != shape[1] else order.integers(1, 4, len(x))
    quarter = torch.from_numpy(turns).to(x.device)
    images = x.view(len(x), shape[0], shape[1], -1)
    turned = images.clone()
    for turn in np.unique(turns).tolist():
        mine = quarter == turn
        turned[mine] = torch.rot90(images[mine], turn, dims=(1, 2))
    superfluous = outputs - 1 - int(y.max())
    return turned.reshape(len(x), -1), outputs - 1 - (3 * y + quarter - 1) % max(superfluous, 1)
