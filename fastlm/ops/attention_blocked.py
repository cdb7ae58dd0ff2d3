"""Attention on the CPU in memory linear in the lengths; fastlm/ops/attention_tiles.py is how."""

import torch

from fastlm.autograd import Differentiable
from fastlm.ops import attention_tiles
from fastlm.ops.attention import reference
from fastlm.ops.attention_common import ACCEPTS, Options, accumulator

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# SDPA's math path, which builds all scores, is not slower below: benchmarks/LOG.md 2026-11-23.
FEW_SCORES = 1 << 23
# The mask of so few queries is small beside the keys: benchmarks/LOG.md 2026-11-24.
FEW_QUERIES = 16


def cannot(query, *rest):
    if query.device.type not in ("cpu", "meta"):
        return "computes on the CPU"
    if query.dtype not in DTYPES:
        return f"no tiles in {query.dtype}"
    return None


def loses(query, key, value, attn_mask, sinks, slopes, key_lengths, query_ids, key_ids, options):
    if any(x is not None for x in (sinks, slopes, key_lengths, query_ids)):
        return None
    if options.left >= 0 or options.softcap or options.return_lse:
        return None
    if options.right >= 0:
        return None if query.size(2) > FEW_QUERIES else "SDPA with a mask of few queries: benchmarks/LOG.md 2026-11-24"
    if attn_mask is not None and options.is_causal and not attn_mask.requires_grad:
        return None
    if options.dropout_p or value.size(3) != query.size(3) or (attn_mask is not None and attn_mask.requires_grad):
        scores = query.size(0) * query.size(1) * query.size(2) * key.size(2)
        return None if scores >= FEW_SCORES else "so few scores: benchmarks/LOG.md 2026-11-23"
    return "SDPA's flash kernel takes the call"


def run(query, key, value, attn_mask, sinks, slopes, key_lengths, query_ids, key_ids, options):
    seed = torch.randint(2**62, (), device=query.device) if options.dropout_p else None
    tensors = (query, key, value, attn_mask, sinks, slopes, key_lengths, query_ids, key_ids, seed)
    out, lse = _attention(tensors, *options)
    return (out, lse.masked_fill(lse == torch.inf, -torch.inf)) if options.return_lse else out


def _forward(tensors, needs, *options):
    found = _fake(tensors, needs)
    attention_tiles.forward(attention_tiles.Call(*tensors, Options(*options)), *found)
    return found


def _fake(tensors, needs, *options):
    query, _, value, *_ = tensors
    out = query.new_empty(*query.shape[:3], value.size(3))
    return [out, query.new_empty(query.shape[:3], dtype=accumulator(query))]


def _backward(grads, saved, tensors, needs, *options):
    call = attention_tiles.Call(*tensors, Options(*options))
    found = attention_tiles.backward(call, *saved, *grads, needs[:5])
    # Only functorch and exporting ask for gradients of the slopes, which count as constants.
    return [*found, *(torch.zeros_like(t) if n else None for t, n in zip(tensors[5:], needs[5:], strict=True))]


def _reference(tensors, *options):
    *tensors, seed = tensors
    options = Options(*options)
    dropped = None if seed is None else attention_tiles.dropped(attention_tiles.Call(*tensors, seed, options))
    out, lse = reference(*tensors, options._replace(return_lse=True), dropped)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf)


_attention = Differentiable(
    "attention_blocked", statics="float dropout_p, bool is_causal, float scale, int left, int right, float softcap, "
    "bool return_lse", outputs=2, forward=_forward, fake=_fake, backward=_backward, reference=_reference,
    reads_results=True)
