"""Fixed weights from a file instead of random signs (Piggyback; Mallya et al. 2018): read once, never trained."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from supsupd.learning.bodies import TensorSpec


class PretrainedMismatch(ValueError):
    """The file cannot be read or does not fit the network; the text says which tensor and what was expected."""


@dataclass(frozen=True)
class Pretrained:
    """Named float32 tensors of a safetensors file, as torch modules name them."""

    path: Path
    tensors: Mapping[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> Pretrained:
        """Raises PretrainedMismatch."""
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise PretrainedMismatch(f"{path}: {error}; expected a safetensors file") from None
        return cls(path, {name: tensor.float() for name, tensor in tensors.items()})

    @cached_property
    def sha256(self) -> str:
        """Hash of all names, shapes and values."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def check(self, specs: Iterable[TensorSpec]) -> None:
        """Raises PretrainedMismatch when a tensor has another shape than the network wants, or none fits at all.

        The last layer belongs to the file's own classes: leave it out of the file to get random signs there.
        """
        wanted = {spec.name: spec.shape for spec in specs}
        for name in sorted(wanted.keys() & self.tensors.keys()):
            if tuple(self.tensors[name].shape) != wanted[name]:
                raise PretrainedMismatch(
                    f"{self.path}: {name} has shape {tuple(self.tensors[name].shape)}, the network takes {wanted[name]}"
                )
        if not wanted.keys() & self.tensors.keys():
            names = ", ".join(sorted(wanted)[:3])
            raise PretrainedMismatch(f"{self.path}: holds none of the network's tensors; expected {names}, …")
