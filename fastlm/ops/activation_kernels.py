"""What the kernels of the gated units share: their autograd."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.autograd import Differentiable
from fastlm.ops.activation import reference

ACCEPTS = frozenset({f"{name}{suffix}" for suffix in ("", " tanh") for name in (
    "1 numbers", "127 numbers", "128 numbers", "129 numbers", "rows", "outliers", "transposed",
    "halves of one tensor")} | {"many numbers", "no numbers"})


def differentiable(name: str, forward: Callable, backward: Callable) -> Callable:
    """Return `run(gate, up, kind)` from the two directions.

    Args:
        name: of the operators.
        forward: `forward(gate, up, y, kind)` fills y; tensors `[T, H]`, of which those of the caller may have strided
            rows.
        backward: `backward(dy, gate, up, dgate, dup, kind)` fills dgate and dup; up and dup are None for plain gelu.
    """
    def run_forward(tensors, needs, kind):
        gate, up = tensors
        y = torch.empty_like(gate, memory_format=torch.contiguous_format)
        if gate.numel():
            forward(*map(as_rows, (gate, up, y)), kind)
        return [y]

    def run_backward(grads, saved, tensors, needs, kind):
        found = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
        if tensors[0].numel():
            backward(*map(as_rows, (grads[0], *tensors, *found)), kind)
        return [g if need else None for g, need in zip(found, needs, strict=True)]

    function = Differentiable(name, statics="str kind", outputs=1, forward=run_forward, backward=run_backward,
                              fake=lambda tensors, needs, kind: [tensors[0].new_empty(tensors[0].shape)],
                              reference=lambda tensors, kind: (reference(*tensors, kind),))
    return lambda gate, up, kind: function((gate, up), kind)[0]


def as_rows(t: Tensor | None) -> Tensor | None:
    """View `t` as `[T, H]`; only strides that no such view can express cost a copy."""
    return None if t is None else t.reshape(1, 1) if t.dim() == 0 else t.reshape(-1, t.shape[-1])
