"""Attention on the CPU by the kernel of csrc/attention.h, in memory linear in the lengths."""

import torch
from torch import Tensor

import fastlm._native as _native
from fastlm.ops import attention_common
from fastlm.ops.attention import LEAST, reference
from fastlm.ops.attention_common import differentiable
from fastlm.ops.attention_kernels import MOST, Kernels
from fastlm.ops.cpu import cannot_here, on_amx, unmeasured
from fastlm.ops.tensors import FLOATS, needs_gradient

__all__ = ["ACCEPTS", "DTYPES", "at_once", "cannot", "loses", "run"]

DTYPES = FLOATS
ACCEPTS = attention_common.ACCEPTS - {"everything dropped"}
FEW_QUERIES = 4  # in bfloat16 on AMX: LOG 2026-11-27
LEAST_ELSEWHERE = {torch.float32: 1 << 26}  # where SDPA's products are as fast, other numbers 1 << 24: LOG 2026-11-26


def cannot(query, key, value, attn_mask, sinks, slopes, key_lengths, query_ids, key_ids, options):
    if reason := cannot_here(query, DTYPES):
        return reason
    if options.dropout_p:
        return "draws no dropout"
    if not query.size(1):
        return "there are no heads"
    if max(query.size(3), value.size(3)) > MOST:
        return f"heads of more than {MOST} numbers"
    return None


def loses(query, key, value, attn_mask, sinks, slopes, key_lengths, query_ids, key_ids, options):
    lacking = any(x is not None for x in (sinks, slopes, key_lengths, query_ids))
    if lacking or options.left >= 0 or options.softcap or options.return_lse:
        return unmeasured(_native)
    scores = query.size(0) * query.size(1) * query.size(2) * key.size(2)
    return _loses(query, scores * (query.size(3) + value.size(3)), needs_gradient(attn_mask))


def at_once(query, multiplications):
    """Tell whether SDPA makes so many multiplications, of a call that it can take and whose mask has no gradient."""
    return _loses(query, multiplications, False) is not None


def _loses(query, multiplications, biased):
    if unknown := unmeasured(_native):
        return unknown
    if on_amx(_native) and query.dtype is torch.bfloat16:  # which SDPA multiplies by AMX
        timed = query.size(2) <= FEW_QUERIES and not biased
    else:  # elsewhere on Intel AVX-512 was not timed, and kernels are taken whose margin with AVX2 was wide
        timed = _native.cpu != "intel" or biased or (on_amx(_native) and query.dtype is torch.float32)
    if not timed:
        return "SDPA may be as fast: slower in bfloat16 on AMX, or not yet measured on this CPU (intel)"
    least = LEAST if _native.cpu == "zen5" else LEAST_ELSEWHERE.get(query.dtype, 1 << 24)
    if multiplications < least:
        return f"SDPA is faster below {least} multiplications: benchmarks/LOG.md 2026-11-25 to 27"
    return None


def run(query, key, value, attn_mask, sinks, slopes, key_lengths, query_ids, key_ids, options):
    return _attention((query, key, value, attn_mask, sinks, slopes, key_lengths, query_ids, key_ids), options)


def _kernels(tensors, options):
    query, key, value, mask, sinks, slopes, key_lengths, *ids = tensors
    spans = None
    if key_lengths is not None:
        zeros = torch.zeros_like(key_lengths, dtype=torch.int64)
        spans = torch.stack([zeros, zeros + query.size(2), zeros, key_lengths.clamp(0, key.size(2))], 1)
    return Kernels(_native, query, key, value, mask, sinks, slopes, spans, ids, options)


def _forward(tensors, options, out, lse):
    _kernels(tensors, options).forward(out, lse)


def _backward(tensors, options, saved, grads, needs):
    kernels = _kernels(tensors, options)
    # What nobody sees has no gradient that the kernel writes.
    beyond = Tensor.new_empty if kernels.spans is None else Tensor.new_zeros
    found = [make(t, t.shape, dtype=kernels.stored) if need else None
             for t, need, make in zip(tensors, needs[:3], (Tensor.new_empty, beyond, beyond), strict=False)]
    found.append(kernels.new_dmask() if needs[3] else None)
    kernels.backward(*saved, *grads, *found)
    return [*found, kernels.dsinks(*saved, *grads) if needs[4] else None]


def _reference(tensors, options):
    return reference(*tensors, options)


_attention = differentiable("attention_native", _forward, _backward, _reference, like_query=True)
