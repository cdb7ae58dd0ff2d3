"""linear by the products of csrc/product.h, for CPUs and sizes at which torch's are slower."""

import torch

import fastlm._native as _native
from fastlm._native import tiles  # noqa: F401 - an extension built before these kernels fails here, with a reason
from fastlm.autograd import Differentiable, autocasts, unwatched
from fastlm.dispatch import traced
from fastlm.ops import products
from fastlm.ops.cpu import cannot_here, on_amx, unmeasured
from fastlm.ops.linear import LEAST, LEAST_WEIGHT, reference, small
from fastlm.ops.tensors import needs_gradient

ACCEPTS = {"3x4x5", "1x1x1", "127x33x65", "128x129x128", "13x300x49", "no bias", "outliers", "no rows", "no features",
           "not contiguous", "one vector"}
DTYPES = (torch.float32, torch.bfloat16)

ROW = "benchmarks/LOG.md 2026-11-25 to 27"
LEAST_SIDE = 512  # of products of bfloat16 by AMX: rows, inputs and outputs


def cannot(x, weight, bias):
    if reason := cannot_here(x, DTYPES):
        return reason
    for t in (weight, bias):
        if t is not None and t.dtype is not x.dtype:
            return f"no kernel for {t.dtype} beside {x.dtype}"
    if weight.dim() != 2:
        return "weight is a vector"
    return "autocast lowers it" if autocasts("cpu") else None


def loses(x, weight, bias):
    if reason := None if on_amx(_native) else unmeasured(_native, products.CPUS):
        return reason
    if x.dtype is torch.float32 and not products.exact_float32():
        return "float32 may be lowered: torch's products do that"
    fast = _few(x, weight, bias, traced()) or _many(x, weight)
    return None if fast else f"slower than torch for these rows and this weight: {ROW}"


def _few(x, weight, bias, compiled=False):
    """Tell whether to read the weight where it lies is faster than torch: few rows, no gradients.

    In a compiled graph an operator of ours costs 10 microseconds more.
    """
    if needs_gradient(x, weight, bias):
        return False
    float32, numbers, rows = x.dtype is torch.float32, weight.numel(), x.numel() // (weight.shape[-1] or 1)
    if on_amx(_native):
        return 4 <= rows <= 16 and numbers >= 1 << 20 if float32 else rows <= 4 and numbers >= (
            1 << 20 if compiled else LEAST_WEIGHT)
    least = 1 << 20 if compiled else LEAST_WEIGHT if not float32 else 3 << 16 if rows == 1 else 1 << 16
    most = 16 if float32 else 4 if numbers >= 1 << 24 else 8 if rows * numbers <= 1 << 20 else 2
    return numbers >= least and rows <= most


def _many(x, weight):
    """Tell whether products of many rows are faster than torch's."""
    if on_amx(_native):
        rows = x.numel() // (weight.shape[-1] or 1)
        return _native.tiles and x.dtype is torch.bfloat16 and min(rows, *weight.shape) >= LEAST_SIDE
    return x.dtype is torch.float32 and x.numel() * weight.shape[0] >= LEAST


def at_once(x, weight, bias):
    """Return what `run` makes of few rows as they came, unchecked, or what torch does of others.

    None where a kernel makes many rows, or the arguments are not plain.

    Generation calls for every token: here Python takes as long as the kernel.
    """
    lowered = x.dtype is torch.float32 and not products.exact_float32()
    if lowered or not x.is_cpu or x.dtype not in DTYPES or not (on_amx(_native) or _native.cpu in products.CPUS):
        return small(x, weight, bias)
    if _many(x, weight):
        return None
    if not _few(x, weight, bias):
        return small(x, weight, bias)
    if not unwatched():
        return None
    return _native.linear_at_once(x, weight, bias, torch.get_num_threads())


def run(x, weight, bias):
    return _linear((x, weight, bias))[0]


def _rows(x):
    return x.reshape(-1, x.size(-1)) if x.size(-1) else x.new_empty(x.shape[:-1].numel(), 0)


def forward(tensors, needs):
    x, weight, bias = tensors
    rows = _rows(x)
    if rows.size(0) <= 16 or (x.dtype is torch.bfloat16 and not _native.tiles):
        y = products.few_rows(_native, rows, weight, bias)
    else:
        y = _product(rows, weight.t(), None if bias is None else bias.contiguous())
    return [y.view(*x.shape[:-1], weight.size(0))]


def backward(grads, saved, tensors, needs):
    x, weight, _ = tensors
    dy = _rows(grads[0])
    dx, dw, db = needs
    return [_product(dy, weight).view(x.shape) if dx else None, _product(dy.t(), _rows(x)) if dw else None,
            dy.sum(0) if db else None]


def _product(a, b, bias=None):
    """In bfloat16 by whoever is faster; in float32 there is no other question here than that of `loses`."""
    if a.dtype is torch.bfloat16:
        return products.mm(_native, a, b, bias=bias)
    return products.multiply(_native, a, b, bias=bias)


def _fake(tensors, needs):
    x, weight, _ = tensors
    return [x.new_empty(*x.shape[:-1], weight.size(0))]


_linear = Differentiable("linear_native", outputs=1, forward=forward, fake=_fake, backward=backward,
                         reference=lambda tensors: (reference(*tensors),))
