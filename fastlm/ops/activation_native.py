"""Gated units by the kernels of csrc/rows.h."""

import torch

import fastlm._native as _native
from fastlm.ops.activation_kernels import ACCEPTS, differentiable
from fastlm.ops.cpu import cannot_here, loses_below, on_amx
from fastlm.ops.tensors import addresses, adjacent

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
DTYPES = (torch.float32, torch.bfloat16)

# Numbers from which a kernel has been faster, without gradients and with them.
LEAST = {
    ("silu", torch.float32): (1 << 18, 1 << 18), ("silu", torch.bfloat16): (1 << 20, 1 << 20),
    ("gelu", torch.float32): (1 << 20, 1 << 18), ("gelu", torch.bfloat16): (1 << 22, 1 << 19),
    ("gelu_tanh", torch.float32): (1 << 17, 1 << 17), ("gelu_tanh", torch.bfloat16): (1 << 18, 1 << 18),
}
if _native.cpu == "zen5":  # where stock's exponential is faster in bfloat16
    LEAST |= {("silu", torch.float32): (1 << 20, 1 << 20), ("silu", torch.bfloat16): (1 << 23, 1 << 23),
              ("gelu", torch.float32): (1 << 21, 1 << 18), ("gelu", torch.bfloat16): (0, 1 << 23)}
elif _native.cpu == "avx2":
    LEAST |= {("silu", torch.float32): (1 << 20, 1 << 20), ("silu", torch.bfloat16): (0, 0),
              ("gelu", torch.float32): (1 << 22, 1 << 21), ("gelu", torch.bfloat16): (0, 0)}
elif on_amx(_native):
    LEAST["gelu", torch.bfloat16] = (0, 1 << 22)


def cannot(gate, up, kind):
    if up.dtype is not gate.dtype:
        return f"gate is {gate.dtype}, up is {up.dtype}"
    return cannot_here(gate, DTYPES)


def loses(gate, up, kind):
    return loses_below(_native, LEAST[kind, gate.dtype], gate, up)


def forward(gate, up, y, kind):
    gate, up = adjacent(gate), adjacent(up)
    _call(False, kind, gate, up, None, y, None)


def backward(dy, gate, up, dgate, dup, kind):
    dy, gate, up = dy.contiguous(), adjacent(gate), adjacent(up)
    _call(True, kind, gate, up, dy, dgate, dup)


def _call(backward, kind, gate, up, dy, y, db):
    _native.gated(backward, KINDS[kind], (*gate.shape, gate.stride(0), up.stride(0)), addresses(gate, up, dy, y, db),
                  gate.dtype is torch.bfloat16, torch.get_num_threads())


run = differentiable("gated_native", forward, backward)
