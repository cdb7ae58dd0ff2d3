"""Every op on its own benchmark samples."""

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch

from fastlm.ops import ALL
from fastlm.tools.suites import Case, op_subject


def cases(device: str, dtypes: Sequence[torch.dtype] | None = None) -> Iterator[Case]:
    for op, dtype in itertools.product(ALL, dtypes or default_dtypes(device)):
        for i, sample in enumerate(op.samples("bench", dtype, "meta")):
            yield Case("ops", op.name, sample.name, dtype, functools.partial(_subject, op, i, dtype, device),
                       fast=op.fast)


def _subject(op, index, dtype, device):
    return op_subject(op, next(itertools.islice(op.samples("bench", dtype, device), index, None)).args)


def default_dtypes(device: str) -> tuple[torch.dtype, ...]:
    """Return what people train in on a device."""
    gpu = torch.device(device).type == "cuda"
    return (torch.bfloat16, torch.float16, torch.float32) if gpu else (torch.float32,)
