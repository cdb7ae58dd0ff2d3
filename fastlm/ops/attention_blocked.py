"""Attention on the CPU in memory linear in the lengths; fastlm/ops/attention_tiles.py is how."""

import torch

from fastlm.ops import attention_tiles
from fastlm.ops.attention import reference
from fastlm.ops.attention_common import ACCEPTS, differentiable
from fastlm.ops.cpu import cannot_here
from fastlm.ops.tensors import FLOATS

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]

DTYPES = FLOATS

# SDPA's math path, which builds all scores, is not slower below: benchmarks/LOG.md 2026-11-23.
LEAST_SCORES = 1 << 23
# The mask of so few queries is small beside the keys: benchmarks/LOG.md 2026-11-24.
FEW_QUERIES = 16


def cannot(query, *rest):
    return cannot_here(query, DTYPES)


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
        return None if scores >= LEAST_SCORES else "so few scores: benchmarks/LOG.md 2026-11-23"
    return "SDPA's flash kernel takes the call"


def run(query, key, value, attn_mask, sinks, slopes, key_lengths, query_ids, key_ids, options):
    seed = torch.randint(2**62, (), device=query.device) if options.dropout_p else None
    return _attention((query, key, value, attn_mask, sinks, slopes, key_lengths, query_ids, key_ids, seed), options)


def _forward(tensors, options, out, lse):
    attention_tiles.forward(attention_tiles.Call(*tensors, options), out, lse)


def _backward(tensors, options, saved, grads, needs):
    return attention_tiles.backward(attention_tiles.Call(*tensors, options), *saved, *grads, needs[:5])


def _reference(tensors, options):
    *tensors, seed = tensors
    dropped = None if seed is None else attention_tiles.dropped(attention_tiles.Call(*tensors, seed, options))
    return reference(*tensors, options, dropped)


_attention = differentiable("attention_blocked", _forward, _backward, _reference)
