"""What the kernels of the norms share: rows of two dimensions, what is saved for backward, and which gradients are one.

`norm_native.py` and `norm_triton.py` give the two directions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.autograd import Differentiable, blank
from fastlm.ops.norm import reference, rows

ACCEPTS = frozenset({"rows of 1", "rows of 2", "rows of 127", "rows of 128", "rows of 129", "rows of 1000", "wide rows",
                     "rows in pieces", "many rows", "two dimensions", "all dimensions", "without weight",
                     "strided rows", "odd strides", "outliers", "far from zero", "tiny", "no rows"})


def mixed(input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> str | None:
    """Return why the dtypes do not go together in a kernel, None where they do."""
    if residual is not None and residual.dtype is not input.dtype:
        return f"input is {input.dtype}, residual is {residual.dtype}"
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype not in (input.dtype, torch.float32):
            return f"input is {input.dtype}, {name} is {t.dtype}"
    return None


class Norms:
    """The four norms as differentiable functions.

    Args:
        name: of the operators.
        forward: `forward(x, residual, weight, bias, eps, centred)` with x and residual `[T, H]` returns y, the sum
            (None without a residual), mean (None for RMS norm) and the reciprocal root, float32 `[T]` both.
        backward: `backward(dy, dsum, x, weight, mean, rstd, needs)` returns the gradients of x, weight and bias, None
            where `needs` has False or None: it says whether x needs one, and for weight and bias of which dtype, which
            a kernel need not heed. x is the sum where there was a residual.
    """

    def __init__(self, name: str, forward: Callable, backward: Callable):
        self.forward, self.backward = forward, backward
        shared = dict(statics="float eps, bool centred", forward=self._forward, fake=self._fake,
                      backward=self._backward, reference=self._reference)
        self.alone = Differentiable(name, outputs=1, **shared)
        # The gradients of input and residual are one tensor; all that backward needs of the two is their sum.
        self.added = Differentiable(f"add_{name}", outputs=2, **shared, borrowed={1: lambda grads, found: found[0]},
                                    keep=lambda tensors, outputs, *_: [outputs[1], blank(tensors[1]), *tensors[2:]])

    def run(self, input, residual, weight, bias, shape, eps, centred):
        weight, bias = (t if t is None or t.dim() == 1 else t.reshape(-1) for t in (weight, bias))
        if residual is None:
            return self.alone((_rows(input, shape), None, weight, bias), eps, centred)[0].view(input.shape)
        if residual.requires_grad and not input.requires_grad:
            input, residual = residual, input
        tensors = (_rows(input, shape), _rows(residual, shape), weight, bias)
        return tuple(t.view(input.shape) for t in self.added(tensors, eps, centred))

    def _forward(self, tensors, needs, eps, centred):
        y, total, mean, rstd = self.forward(*tensors, eps, centred)
        return [t for t in (y, total, *((mean, rstd) if any(needs) else ())) if t is not None]

    def _fake(self, tensors, needs, eps, centred):
        x, residual, *_ = tensors
        saved = (1 + centred) * any(needs)
        return [*(x.new_empty(x.shape) for _ in range(1 if residual is None else 2)),
                *(x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(saved))]

    def _backward(self, grads, saved, tensors, needs, eps, centred):
        x, _, weight, bias = tensors
        mean, rstd = saved if centred else (None, *saved)
        dx, dweight, dbias = self.backward(*grads, *(None,) * (2 - len(grads)), x, weight, mean, rstd,
                                           (needs[0], needs[2] and weight.dtype, needs[3] and bias.dtype))
        return [dx, None, dweight if weight is None or dweight is None else dweight.to(weight.dtype),
                dbias if bias is None or dbias is None else dbias.to(bias.dtype)]

    def _reference(self, tensors, eps, centred):
        found = reference(*tensors, tensors[0].shape[1:], eps, centred)
        return (found,) if tensors[1] is None else found


def _rows(t, shape):
    return t if t.dim() == 2 and len(shape) == 1 else rows(t, shape)
