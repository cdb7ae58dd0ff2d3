"""What the implementations of `attention` and `varlen_attn` for the CPU share: how kernels become a function.

Between forward and backward a query that sees nothing has a log-sum-exp of +∞: exp(s - lse) is 0.
"""

from collections.abc import Callable

import torch

from fastlm.autograd import Differentiable
from fastlm.ops.attention_common import Options
from fastlm.ops.tensors import accumulator


def differentiable(name: str, forward: Callable, backward: Callable, reference: Callable) -> Callable:
    """Return `call(tensors, options)`, which returns the output, with the log-sum-exp if the options ask for it.

    Args:
        name: of the operators, see `Differentiable`.
        forward: `forward(tensors, options, out, lse)` fills the results.
        backward: `backward(tensors, options, saved, grads, needs) -> list`: the gradients of the first tensors, None
            where `needs` is False; the others are constants. `saved` and `grads` are each a pair for (out, lse).
        reference: `reference(tensors, options)` returns output and log-sum-exp, -∞ where nothing is seen.
    """

    def fake(tensors, needs, *options):
        query, _, value, *_ = tensors
        out = query.new_empty(*query.shape[:-1], value.size(-1))
        return [out, query.new_empty(query.shape[:-1], dtype=accumulator(query.dtype))]

    def run_forward(tensors, needs, *options):
        found = fake(tensors, needs, *options)
        forward(tensors, Options(*options), *found)
        return found

    def run_backward(grads, saved, tensors, needs, *options):
        found = backward(tensors, Options(*options), saved, grads, needs)
        # Only functorch and exporting ask for gradients of constants, such as slopes.
        rest = tensors[len(found):], needs[len(found):]
        found = [*found, *(torch.zeros_like(t) if need else None for t, need in zip(*rest, strict=True))]
        return [None if g is None else g.to(t.dtype) for g, t in zip(found, tensors, strict=True)]

    def run_reference(tensors, *options):
        out, lse = reference(tensors, Options(*options)._replace(return_lse=True))
        return out, lse.masked_fill(lse == -torch.inf, torch.inf)

    function = Differentiable(
        name, statics="float dropout_p, bool is_causal, float scale, int left, int right, float softcap, "
        "bool return_lse", outputs=2, forward=run_forward, fake=fake, backward=run_backward, reference=run_reference,
        reads_results=True)

    def call(tensors, options):
        out, lse = function(tensors, *options)
        return (out, lse.masked_fill(lse == torch.inf, -torch.inf)) if options.return_lse else out

    return call
