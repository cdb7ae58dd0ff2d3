"""Which GPUs the rules of `loses` were measured on."""

import functools

import torch
from torch import Tensor

from fastlm.dispatch import assume_constant

MEASURED = ((9, 0),)  # compute capabilities of the cards that the rows in benchmarks/results are from: an H200


def unmeasured(x: Tensor) -> str | None:
    """Return that no kernel was run on a GPU like that of `x`, None where one was."""
    found = capability(x.device)
    return None if found in MEASURED else "not yet run on a GPU of compute capability {}.{}".format(*found)


def capability(device: torch.device) -> tuple[int, int]:
    """Return a GPU's compute capability."""
    return _capability(str(device))


@assume_constant
def _capability(device: str) -> tuple[int, int]:
    return _asked(device)


@functools.cache
def _asked(device: str) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
