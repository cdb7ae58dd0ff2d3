"""linear by the products of csrc/product.h, for CPUs on which torch's are slower."""

import torch

import fastlm._native as _native
from fastlm.autograd import Differentiable, autocasts, unwatched
from fastlm.dispatch import PLAIN, traced
from fastlm.ops import products
from fastlm.ops.cpu import cannot_here, unmeasured
from fastlm.ops.linear import LEAST, few, reference, small

ACCEPTS = {"3x4x5", "1x1x1", "127x33x65", "128x129x128", "13x300x49", "no bias", "outliers", "no rows", "no features",
           "not contiguous", "one vector"}
DTYPES = (torch.float32, torch.bfloat16)

ROW = "benchmarks/LOG.md 2026-11-25"


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
    if reason := unmeasured(_native, products.CPUS):
        return reason
    if x.dtype is torch.float32 and not products.exact_float32():
        return "float32 may be lowered: torch's products do that"
    if few(x, weight, bias, traced()):
        return None
    if x.dtype is torch.bfloat16:
        return f"slower than torch in training, of more than a few rows, or with a small weight: {ROW[:-2]}26"
    return f"slower than torch below {LEAST} multiplications: {ROW}" if x.numel() * weight.size(0) < LEAST else None


def at_once(x, weight, bias):
    """Return what `run` makes of few rows (`few`) as they came, unchecked; None where a kernel cannot.

    Generation calls for every token: here Python takes as long as the kernel.
    """
    if _native.cpu not in products.CPUS:
        return small(x, weight, bias)
    if not unwatched() or (x.dtype is torch.float32 and not products.exact_float32()):
        return None
    return _native.linear_at_once(x, weight, bias, torch.get_num_threads(), PLAIN, x.dtype, x.element_size())


def run(x, weight, bias):
    return _linear((x, weight, bias))[0]


def _rows(x):
    return x.reshape(-1, x.size(-1)) if x.size(-1) else x.new_empty(x.shape[:-1].numel(), 0)


def forward(tensors, needs):
    x, weight, bias = tensors
    rows = _rows(x)
    if rows.size(0) <= 16 or x.dtype is torch.bfloat16:
        y = products.few_rows(_native, rows, weight, bias)
    else:
        y = products.multiply(_native, rows, weight.t(), bias=None if bias is None else bias.contiguous())
    return [y.view(*x.shape[:-1], weight.size(0))]


def backward(grads, saved, tensors, needs):
    x, weight, _ = tensors
    dy = _rows(grads[0])
    dx, dw, db = needs
    return [_product(dy, weight).view(x.shape) if dx else None, _product(dy.t(), _rows(x)) if dw else None,
            dy.sum(0) if db else None]


def _product(a, b):
    return torch.mm(a, b) if a.dtype is torch.bfloat16 else products.multiply(_native, a, b)


def _fake(tensors, needs):
    x, weight, _ = tensors
    return [x.new_empty(*x.shape[:-1], weight.size(0))]


_linear = Differentiable("linear_native", outputs=1, forward=forward, fake=_fake, backward=backward,
                         reference=lambda tensors: (reference(*tensors),))
