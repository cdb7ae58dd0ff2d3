"""What the kernels of the rotary embedding share: their autograd, and the gradients of the angles."""

from collections.abc import Callable

import torch

from fastlm.autograd import Differentiable, blank
from fastlm.ops.rotary import pairs, reference

ACCEPTS = frozenset({"heads of 2", "heads of 16", "heads of 66", "heads of 128", "whole", "angles by column",
                     "part of a head", "positions by sequence", "interleaved whole", "interleaved angles by column",
                     "interleaved part of a head", "interleaved positions by sequence", "float32 angles",
                     "one position", "long", "no positions", "nothing rotated"})


def differentiable(name: str, turn: Callable) -> Callable:
    """Return `run(x, cos, sin, interleaved)`.

    Args:
        name: of the operators.
        turn: `turn(x, cos, sin, y, interleaved, inverse)` fills y, which is not empty, the columns of a head side by
            side; the others may have any strides.
    """
    def forward(tensors, needs, interleaved):
        x, cos, sin = tensors
        y = like(x)
        if y.numel():
            turn(x, cos, sin, y, interleaved, False)
        return [y]

    def backward(grads, saved, tensors, needs, interleaved):
        (dy,), (x, cos, sin) = grads, tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
        if needs[0] and dx.numel():
            turn(dy, cos, sin, dx, interleaved, True)
        wide = torch.promote_types(x.dtype, cos.dtype) if any(needs[1:]) else x.dtype
        (a, b), (da, db) = (pairs(t.to(wide), cos.size(-1), interleaved) for t in (x, dy))
        return [dx, over_heads(da * a, db * b, cos) if needs[1] else None,
                over_heads(-da * b, db * a, sin) if needs[2] else None]

    def keep(tensors, outputs, needs, interleaved):
        """The rotation is linear: x has a part in the gradients of the angles alone."""
        x, cos, sin = tensors
        return [x if any(needs[1:]) else blank(x), cos, sin]

    function = Differentiable(name, statics="bool interleaved", outputs=1, forward=forward, backward=backward,
                              keep=keep, fake=lambda tensors, *_: [like(tensors[0])],
                              reference=lambda tensors, interleaved: (reference(*tensors, interleaved),))
    return lambda x, cos, sin, interleaved: function((x, cos, sin), interleaved)[0]


def like(x):
    """Return memory for a result, in the order of `x` where that has the columns of a head side by side."""
    y = torch.empty_like(x)
    return y if y.stride(3) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def over_heads(first, second, table):
    """Add up `[B, H, S, R/2]` of both columns of each pair to the gradient of a table `[B or 1, S, 2, R/2]`."""
    found = torch.stack([t.sum(1, dtype=torch.float32) for t in (first, second)], 2)
    return (found if table.size(0) == found.size(0) else found.sum(0, keepdim=True)).to(table.dtype)
