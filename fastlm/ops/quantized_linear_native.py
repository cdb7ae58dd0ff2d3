"""quantized_linear by the kernels of csrc/quant.h: they read the weight as it is kept, so nothing is ever packed."""

import torch

import fastlm._native as _native
from fastlm._native import tiles, vnni  # an extension built before these kernels fails here, with a reason
from fastlm.autograd import unwatched
from fastlm.ops.cpu import cannot_here
from fastlm.ops.quantized_linear import MODES, differentiable, reference
from fastlm.ops.tensors import addresses

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACCEPTS = {f"{mode} {name}" for mode in MODES for name in ("one row", "rows", "odd sizes", "one output", "no rows",
                                                           "outliers", "transposed")}
ACCEPTS |= {"groups of 32", "groups of 128"}

NUMBERS = {dtype: i for i, dtype in enumerate(DTYPES)}
MOST_INPUTS = 1 << 17  # 127·127·K must fit in 32 bits
ROW = "benchmarks/LOG.md 2026-11-24, 25 and 27"
MOST_ROWS = {"int8": 512, "int8_dynamic": 256, "int4": 1024}
if _native.cpu == "zen5":
    MOST_ROWS |= {"int8": 1024, "int8_dynamic": 1024}
if tiles:
    MOST_ROWS |= {"int8": 4096, "int8_dynamic": 4096}
MOST_ROWS_INT4_PAIRS = 4096 if tiles else MOST_ROWS["int4"]  # in bfloat16


def cannot(x, weight, scale, bias, mode, group_size):
    if reason := cannot_here(x, DTYPES):
        return reason
    if not vnni:
        return "this CPU has no AVX-512 VNNI, or FASTLM_MAX_ISA forbids it"
    if mode == "int8_dynamic" and x.shape[1] > MOST_INPUTS:
        return f"more than {MOST_INPUTS} inputs would overflow 32 bits"
    return None


def loses(x, weight, scale, bias, mode, group_size):
    most = MOST_ROWS_INT4_PAIRS if mode == "int4" and x.dtype is torch.bfloat16 else MOST_ROWS[mode]
    return f"not measured to be faster than stock above {most} rows: {ROW}" if x.shape[0] > most else None


def at_once(input, weight, scale, bias, mode, group_size):
    """Return what `run` makes of a call as it came, unchecked; None where gradients are wanted or it is not ours."""
    if not (vnni and unwatched()):
        return None
    return _native.quantized_linear_at_once(
        MODES.index(mode), group_size, torch.get_num_threads(), MOST_ROWS[mode], not torch.is_grad_enabled(), input,
        weight, scale, bias)


def run(*args):
    return _kernels(args[:4], *args[4:])[0]


def forward(tensors, needs, mode, group_size):
    x, weight, scale, bias = (t if t is None else t.contiguous() for t in tensors)
    (rows, inputs), outputs = x.shape, weight.shape[0]
    if not (rows and inputs and outputs):
        return [reference(x, weight, scale, bias, mode, group_size)]
    bias = None if bias is None else bias.float()
    sizes = MODES.index(mode), NUMBERS[x.dtype], rows, inputs, outputs, group_size, torch.get_num_threads()
    workspace = x.new_empty(_native.quantized_linear_workspace(*sizes), dtype=torch.uint8)
    y = x.new_empty(rows, outputs)
    _native.quantized_linear(*sizes, addresses(x, weight, scale, bias, y, workspace))
    return [y]


_kernels = differentiable("quantized_linear_native", forward)
