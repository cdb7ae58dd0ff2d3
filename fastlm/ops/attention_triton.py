"""Attention in Triton: every feature, forward and backward; attention_kernels_triton.py is how.

On Hopper attention forward has a kernel of its own, for 16-bit types, head sizes 64 and 128, and no features but
causality, windows, ALiBi and dropout: attention_hopper_kernels_triton.py.
"""

import torch

from fastlm.autograd import Differentiable, transformed
from fastlm.ops import attention_hopper_launch_triton as hopper
from fastlm.ops import attention_launch_triton as launch
from fastlm.ops.attention import reference
from fastlm.ops.attention_common import ACCEPTS, Options
from fastlm.ops.triton_kernels import DTYPES
from fastlm.ops.triton_kernels import loses as loses_here

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]


def cannot(query, key, value, *rest):
    return launch.cannot(query, value)


def loses(query, key, value, attn_mask, sinks, slopes, key_lengths, query_ids, key_ids, options):
    features = (attn_mask, sinks, slopes, key_lengths, query_ids, options.softcap or None, options.dropout_p or None)
    plain = all(x is None for x in features) and not options.return_lse and options.left < 0 and options.right < 0
    dense = query.is_cuda and plain and query.element_size() == 2 and query.size(2) > 16
    # The backward kernels lose to SDPA's.
    if dense and query.size(3) == value.size(3) and (
            _differentiated(query, key, value) or not hopper.wins(query, key, value, options)):
        return "dense attention is SDPA's"
    by_formula = options.softcap or options.return_lse or sinks is not None  # by stock, which has no kernel for them
    if query.is_cuda and query.dtype is torch.float32 and not by_formula:
        return "IEEE float32 takes three times as long as SDPA: benchmarks/LOG.md 2026-11-26"
    return loses_here(query)


def _differentiated(*tensors):
    """Tell whether autograd or a transform of functorch, which maps kernels one by one, will see the call."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    return not torch.compiler.is_compiling() and transformed()


def run(query, key, value, attn_mask, sinks, slopes, key_lengths, query_ids, key_ids, options):
    draws = launch.draws(query) if options.dropout_p else None
    tensors = (query, key, value, attn_mask, sinks, slopes, key_lengths, query_ids, key_ids, draws)
    out, lse = _attention(tensors, *options)
    return (out, lse) if options.return_lse else out


def _forward(tensors, needs, *options):
    out, lse = _fake(tensors, needs, *options)
    launch.forward(launch.Call(*tensors, Options(*options)), out, lse)
    return [out, lse]


def _fake(tensors, needs, *options):
    query, _, value, *_ = tensors
    batch, heads, rows, _ = query.shape
    return [query.new_empty((batch, heads, rows, value.size(3))),
            query.new_empty((batch, heads, rows), dtype=torch.float32)]


def _backward(grads, saved, tensors, needs, *options):
    (out, lse), (dout, dlse) = saved, grads
    call = launch.Call(*tensors, Options(*options))
    found = launch.backward(call, out, lse, dout, dlse.contiguous(), needs[:5], tensors[:5])
    # Only functorch and exporting ask for gradients of the slopes, which count as constants.
    return [*found, *(torch.zeros_like(t) if n else None for t, n in zip(tensors[5:], needs[5:], strict=True))]


def _reference(tensors, *options):
    options = Options(*options)
    dropped = launch.dropped(launch.Call(*tensors, options)) if options.dropout_p else None
    return reference(*tensors[:9], options._replace(return_lse=True), dropped)


_attention = Differentiable(
    "attention_triton", statics="float dropout_p, bool is_causal, float scale, int left, int right, float softcap, "
    "bool return_lse", outputs=2, forward=_forward, fake=_fake, backward=_backward, reference=_reference,
    reads=2)
