"""Where masks are trained and run."""

from __future__ import annotations

import torch

Device = torch.device


def pick_device(name: str) -> Device:
    """ "auto" takes a GPU if torch finds one. Raises RuntimeError when cuda is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device: cuda was asked for, but torch finds no usable GPU; use --device auto or cpu")
    use_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def lacks_memory(error: BaseException) -> bool:
    """Whether it says that there is not enough memory; torch has no class of its own for that on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def use_threads(count: int) -> None:
    """CPU threads of torch in this process."""
    torch.set_num_threads(count)
