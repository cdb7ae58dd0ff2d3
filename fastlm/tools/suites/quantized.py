"""quantized_linear against the layer that it stands in for: `F.linear` on the weight before it was quantized.

On the CPU weights of 8 bits alone are to win at one row, rounded rows too above; on a GPU few rows are to read the
weight at a share of the copy bandwidth.
"""

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from fastlm import measure
from fastlm.ops.quantized_linear import MODES, op, quantize_weight
from fastlm.tools.suites import Case, Goal, Subject

SIZE = (4096, 4096)  # inputs, outputs
LARGE = (8192, 28672)  # which a GPU takes much longer to read than to launch a kernel
CPU_GOALS = {torch.float32: {("int8", 1): 3, ("int8_dynamic", 16): 8, ("int8_dynamic", 256): 8},
             torch.bfloat16: {("int8", 1): 2.5, ("int8_dynamic", 16): 2, ("int8_dynamic", 256): 1.5}}
GPU_SHARES = {("int8", 1): 0.60, ("int4", 1): 0.60}


def cases(device: str, dtypes: Sequence[torch.dtype] | None = None) -> Iterator[Case]:
    gpu = torch.device(device).type == "cuda"
    for dtype in dtypes or ((torch.bfloat16, torch.float16) if gpu else tuple(CPU_GOALS)):
        for mode in MODES:
            for rows, size in (*((rows, SIZE) for rows in (1, 16, 256)), *([(1, LARGE), (16, LARGE)] if gpu else [])):
                ratio, share = CPU_GOALS.get(dtype, {}).get((mode, rows)), GPU_SHARES.get((mode, rows))
                goal = Goal(share=share) if gpu and share else Goal(ratio=ratio) if ratio and not gpu else None
                yield Case("head", op.name, f"{mode} {rows}x{size[0]}x{size[1]} against F.linear", dtype,
                           functools.partial(_subject, mode, rows, *size, dtype, device), modes=("forward",),
                           goals={"forward": goal} if goal else {}, fast=op.fast)


def _subject(mode, rows, inputs, outputs, dtype, device) -> Subject:
    torch.manual_seed(0)
    full = torch.randn(outputs, inputs, device=device)
    packed, scale = quantize_weight(full, mode=mode)
    args = torch.randn(rows, inputs, device=device).to(dtype), packed, scale, None, mode, 64
    full = full.to(dtype)
    return Subject(args, op, {"torch": lambda x, *_: F.linear(x, full)}, lambda ran: measure.errors(op, ran, args),
                   op.constants, floor=functools.partial(measure.floor, op, args),
                   reads=packed.nbytes if rows == 1 else None)
