"""Modules of fastlm.nn beside those of torch.nn."""

import functools
from collections.abc import Iterator, Sequence

import torch

from fastlm.tools.suites import Case, Subject, apply, attend, first, module_subject, pair
from fastlm.tools.suites.ops import default_dtypes

# name, case, shape of x, arguments of the constructor, its keywords, how to call it
MODULES = (
    *((cell, "2 layers, both ways, T64 B16 H256", (64, 16, 256), (256, 256, 2), dict(bidirectional=True), first)
      for cell in ("LSTM", "GRU", "RNN")),
    *((f"{cell}Cell", "B16 H512", (16, 512), (512, 512), {}, first if cell == "LSTM" else apply)
      for cell in ("LSTM", "GRU", "RNN")),
    ("Linear", "4x256x256 to 1024", (4, 256, 256), (256, 1024), {}, apply),
    ("MultiheadAttention", "B4 T256 E256", (4, 256, 256), (256, 4), dict(batch_first=True), attend),
    ("TransformerEncoderLayer", "B4 T256 E256", (4, 256, 256), (256, 4, 1024),
     dict(dropout=0.0, batch_first=True, norm_first=True), apply),
)


def cases(device: str, dtypes: Sequence[torch.dtype] | None = None) -> Iterator[Case]:
    for dtype in dtypes or default_dtypes(device):
        for name, case, *rest in MODULES:
            yield Case("modules", name, case, dtype, functools.partial(_subject, name, device, dtype, *rest))


def _subject(name, device, dtype, shape, args, options, call) -> Subject:
    stock, ours = pair(name, *args, **options, device=device, dtype=dtype)
    return module_subject(stock, ours, call, torch.randn(shape, device=device).to(dtype))
