"""gelu, and the gated units swiglu and geglu: silu(a) ⊙ b and gelu(a) ⊙ b.

silu(a) = a σ(a), gelu(a) = a Φ(a), and its approximation a/2 (1 + tanh(√(2/π) (a + 0.044715 a³)))
(Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016).
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.dispatch import Op, Sample, at_once
from fastlm.ops.tensors import check_tensors

LEAST = 1 << 17  # numbers, below which stock is never the slower one: benchmarks/LOG.md 2026-11-25


def _shortcut(input, approximate="none"):
    # The only kernels are a GPU's.
    return F.gelu(input, approximate=approximate) if input.is_cpu or input.numel() < LEAST else None


def _gated_shortcut(kind, gate, up, approximate="none"):
    if gate.numel() < LEAST and gate.shape == up.shape and up.is_floating_point():
        return kind(gate) * up if approximate == "none" else None
    return None


@at_once(_shortcut)
def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Return input ⊙ Φ(input), element by element.

    Args:
        input: any shape, floating point.
        approximate: "none" is exact, "tanh" the approximation by that function.

    Raises:
        TypeError: `input` is no tensor, or not floating point.
        RuntimeError: `approximate` is unknown.
    """
    check_tensors("gelu", dict(input=input), floating=TypeError)
    return gelu_op(input, None, _gelu("gelu", approximate))


@at_once(lambda gate, up: _gated_shortcut(F.silu, gate, up))
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) ⊙ up.

    Args:
        gate, up: `[*]`, of one shape, floating point; halves of one projection may be passed as views.

    Raises:
        TypeError: an argument is no tensor, or not floating point.
        ValueError: the shapes differ.
        RuntimeError: the tensors are on different devices.
    """
    _check("swiglu", gate, up)
    return swiglu_op(gate, up, "silu")


@at_once(partial(_gated_shortcut, F.gelu))
def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """Return gelu(gate) ⊙ up.

    Args:
        gate, up: `[*]`, of one shape, floating point; halves of one projection may be passed as views.
        approximate: "none" or "tanh", as in `gelu`.

    Raises:
        TypeError: an argument is no tensor, or not floating point.
        ValueError: the shapes differ.
        RuntimeError: the tensors are on different devices, or `approximate` is unknown.
    """
    _check("geglu", gate, up)
    return geglu_op(gate, up, _gelu("geglu", approximate))


def _gelu(name, approximate):
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"{name}: approximate is {approximate!r}, expected 'none' or 'tanh'")
    return "gelu" if approximate == "none" else "gelu_tanh"


def _check(name, gate, up):
    check_tensors(name, dict(gate=gate, up=up), floating=TypeError)
    if up.shape != gate.shape:
        raise ValueError(f"{name}: up has shape {list(up.shape)}, gate has {list(gate.shape)}")


def reference(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    if kind == "silu":
        y = gate * gate.sigmoid()
    elif kind == "gelu":
        y = gate * (0.5 * torch.special.erfc(gate * -math.sqrt(0.5)))
    else:
        y = 0.5 * gate * (1 + (math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)).tanh())
    return y if up is None else y * up


def stock(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    y = F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="none" if kind == "gelu" else "tanh")
    return y if up is None else y * up


def samples(scale: str, dtype: torch.dtype, device: str, kinds: tuple[str, ...], gated: bool):
    def call(name, kind, *shape, factor=1.0, halves=False, transposed=False):
        x = (torch.randn(*shape[:-1], shape[-1] * (1 + halves), device=device) * factor).to(dtype)
        x = x.mT if transposed else x
        if halves:
            return Sample(name, (*x.chunk(2, -1), kind))
        return Sample(name, (x, torch.randn(x.shape, device=device).to(dtype) if gated else None, kind))

    if scale == "bench":
        for kind in kinds:
            for shape in ((2048, 1024), (2048, 4096), (64, 4096)):
                yield call("x".join(map(str, shape)) + (" tanh" if kind == "gelu_tanh" else ""), kind, *shape)
        return
    for kind in kinds:
        suffix = " tanh" if kind == "gelu_tanh" else ""
        for size in (127, 1, 128, 129):
            yield call(f"{size} numbers{suffix}", kind, size)
        yield call(f"rows{suffix}", kind, 3, 5, 64)
        yield call(f"outliers{suffix}", kind, 4, 65, factor=50.0)
        yield call(f"transposed{suffix}", kind, 4, 65, transposed=True)
        if gated:
            yield call(f"halves of one tensor{suffix}", kind, 2, 5, 33, halves=True)
    yield call("many numbers", kinds[0], 3, 9001)
    yield call("no numbers", kinds[0], 0, 16)


def cost(gate: Tensor, up: Tensor | None, kind: str) -> tuple[int, int]:
    return 10 * gate.numel(), (2 if up is None else 3) * gate.numel() * gate.element_size()


def _family(name, kinds, gated):
    return Op(name, reference=reference, torch=stock, cost=cost, files="activation",
              samples=partial(samples, kinds=kinds, gated=gated),
              fast=("triton", "native") if gated else ("triton",))  # a plain gelu of torch's reads and writes once


gelu_op = _family("gelu", ("gelu", "gelu_tanh"), False)
swiglu_op = _family("swiglu", ("silu",), True)
geglu_op = _family("geglu", ("gelu", "gelu_tanh"), True)
