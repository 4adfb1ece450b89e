"""The class list: the user's labels, integers or strings, in the order of the network's outputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Label = int | str


class LabelMismatch(ValueError):
    """Labels that cannot join the class list; the text says which and why."""


@dataclass(frozen=True)
class ClassList:
    """The known classes; it only ever grows at its end.

    Args:
        labels: all of one kind, int or str; the place is the output.
        outputs: how many classes the network has room for.
    """

    labels: tuple[Label, ...]
    outputs: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def kind(self) -> str:
        return "str" if self.labels and isinstance(self.labels[0], str) else "int"

    def extended(self, y: np.ndarray) -> ClassList:
        """With the new labels of y (n,) at the end, in sorted order. Raises LabelMismatch."""
        found: list[Label] = np.unique(y).tolist()
        kind = "str" if y.dtype.kind == "U" else "int"
        if self.labels and kind != self.kind:
            raise LabelMismatch(f"labels of kind {kind} came, the classes so far are of kind {self.kind}")
        known = set(self.labels)
        new = [label for label in found if label not in known]
        self._check_range(new)
        if len(self) + len(new) > self.outputs:
            raise LabelMismatch(
                f"{len(new)} new classes (first {new[0]!r}) do not fit: {len(self)} are known and the network has "
                f"{self.outputs} outputs"
            )
        return ClassList((*self.labels, *new), self.outputs)

    def _check_range(self, new: list[Label]) -> None:
        """Class numbers stay class numbers: where all labels so far are below `outputs`, a later one is too.

        A stream whose first labels lie outside uses codes of its own, and any code may follow.
        """
        numbers = [label for label in self.labels if isinstance(label, int)]
        if not numbers or not all(0 <= label < self.outputs for label in numbers):
            return
        wrong = [label for label in new if isinstance(label, int) and not 0 <= label < self.outputs]
        if wrong:
            raise LabelMismatch(
                f"label {wrong[0]} is out of range: the classes so far are numbers, expected 0 to {self.outputs - 1}"
            )

    def encode(self, y: np.ndarray) -> np.ndarray:
        """Labels (n,) to class indices int64 (n,); all must be in the list."""
        place = {label: index for index, label in enumerate(self.labels)}
        values, inverse = np.unique(y, return_inverse=True)
        return np.array([place[label] for label in values.tolist()], dtype=np.int64)[inverse]

    def decode(self, indices: np.ndarray) -> list[Label]:
        return [self.labels[index] for index in indices.tolist()]
