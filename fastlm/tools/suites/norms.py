"""Softmax, norms, gated units, rotary embedding and dropout: the layers that only read and write.

On a GPU each is to reach a share of the copy bandwidth, forward and backward; on the CPU not to be slower than stock,
within the noise of a measurement.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from fastlm import measure
from fastlm.tools.suites import OPS, Case, Goal, Subject, op_subject

NO_SLOWER = Goal(ratio=0.95)


def cases(device: str, dtypes: Sequence[torch.dtype] | None = None) -> Iterator[Case]:
    gpu = torch.device(device).type == "cuda"
    for dtype in dtypes or ((torch.bfloat16, torch.float32) if gpu else (torch.float32, torch.bfloat16)):
        for name, shapes, make, backward_passes, goals in FAMILY:
            for shape in shapes[gpu]:
                wanted = _goals(*goals, backward_passes) if gpu else dict.fromkeys(("forward", "training"), NO_SLOWER)
                op, _, form = name.partition(" ")
                yield Case("norms", op, " ".join(["x".join(map(str, shape)), form]).strip(), dtype,
                           functools.partial(_subject, op, make, shape, dtype, device, backward_passes),
                           goals=wanted, fast=OPS[op].fast)


def _goals(forward: float, backward: float, ratio: float | None, passes: float) -> dict[str, Goal]:
    """Return goals from the shares of the floor that forward and backward are to reach, and stock's time over ours."""
    return {"forward": Goal(share=forward),
            "training": Goal(share=(1 + passes) / (1 / forward + passes / backward), ratio=ratio)}


def _subject(name, make, shape, dtype, device, passes) -> Subject:
    torch.manual_seed(0)
    op, args = OPS[name], make(device, dtype, *shape)
    subject = op_subject(op, args, training_floor=lambda: (1 + passes) * measure.floor(op, args))
    if name == "rotary_embedding":  # of given positions: nobody asks for the gradients of the angles
        subject.constants = (1, 2)
    if name == "dropout_add":  # a kernel's mask is not stock's: numbers are compared where neither drops any
        subject.errors = lambda ran: measure.errors(op, ran, (*args[:2], 0.0))
    return subject


# --- arguments of the ops ---------------------------------------------------------------------------------------------


def _randn(device, dtype, *shape):
    return torch.randn(shape, device=device).to(dtype)


def _rows(log: bool) -> Callable:
    return lambda device, dtype, rows, cols: (_randn(device, dtype, rows, cols), -1, None, 1.0, log)


def _masked(device, dtype, batch, heads, queries, keys):
    """Return scores with the keys that are padding masked, as many as there are others."""
    scores = _randn(device, dtype, batch, heads, queries, keys)
    mask = torch.rand(batch, 1, 1, keys, device=device) < 0.5
    return scores, -1, mask.expand(scores.shape), 0.125, False


def _norm(centred: bool, added: bool) -> Callable:
    def make(device, dtype, rows, cols):
        weight = _randn(device, dtype, cols)
        return (_randn(device, dtype, rows, cols), _randn(device, dtype, rows, cols) if added else None, weight,
                weight.clone() if centred else None, (cols,), 1e-5, centred)
    return make


def _gated(kind: str, gated: bool = True) -> Callable:
    return lambda device, dtype, rows, cols: (
        _randn(device, dtype, rows, cols), _randn(device, dtype, rows, cols) if gated else None, kind)


def _rotary(device, dtype, batch, heads, steps, dim):
    """Return heads as a projection leaves them, `[B, S, H, D]` in memory."""
    angles = torch.randn(1, steps, 1, dim // 2, device=device).expand(-1, -1, 2, -1)
    return (_randn(device, dtype, batch, steps, heads, dim).transpose(1, 2), angles.cos().to(dtype),
            angles.sin().to(dtype), False)


def _dropout(device, dtype, rows, cols):
    return _randn(device, dtype, rows, cols), _randn(device, dtype, rows, cols), 0.1


# name, shapes on the CPU and on a GPU, arguments, what backward moves in units of forward, and on a GPU the shares of
# the floor that forward and backward are to reach, and stock's time over that of both.
SOFTMAX = ((2048, 1024), (128, 50257)), ((16384, 4096), (4096, 32768), (1024, 131072), (16, 1 << 20))
NORM = ((512, 512), (2048, 1024), (2048, 4096)), ((16384, 1024), (8192, 4096), (4096, 16384))
GATED = ((512, 512), (2048, 1024), (2048, 4096)), ((8192, 4096), (8192, 14336))
ROTARY = ((4, 8, 512, 64), (1, 32, 2048, 128)), ((4, 32, 4096, 128),)
FAMILY = (
    ("softmax", SOFTMAX, _rows(False), 3 / 2, (0.90, 0.85, None)),
    ("log_softmax", SOFTMAX, _rows(True), 3 / 2, (0.90, 0.85, None)),
    ("masked_softmax", (((2, 8, 512, 512),), ((8, 16, 2048, 2048),)), _masked, 3 / 2, (0.90, 0.85, None)),
    ("rms_norm", NORM, _norm(False, False), 3 / 2, (0.90, 0.70, 2.0)),
    ("layer_norm", NORM, _norm(True, False), 3 / 2, (0.90, 0.70, 2.0)),
    ("add_rms_norm", NORM, _norm(False, True), 4 / 4, (0.90, 0.70, 2.0)),
    ("add_layer_norm", NORM, _norm(True, True), 4 / 4, (0.90, 0.70, 2.0)),
    ("gelu", GATED, _gated("gelu", gated=False), 3 / 2, (0.85, 0.85, None)),
    ("swiglu", GATED, _gated("silu"), 5 / 3, (0.85, 0.85, None)),
    ("geglu", GATED, _gated("gelu"), 5 / 3, (0.85, 0.85, None)),
    ("geglu tanh", GATED, _gated("gelu_tanh"), 5 / 3, (0.85, 0.85, None)),
    ("rotary_embedding", ROTARY, _rotary, 1, (0.85, 0.85, None)),
    ("dropout_add", (((2048, 1024),), ((8192, 4096),)), _dropout, 2 / 3, (0.85, 0.85, None)),
)
