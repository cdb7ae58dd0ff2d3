"""varlen_attn on the CPU: each sequence is a call of fastlm/ops/attention_tiles.py, in place in the packed tensors.

Lanes are heads: each goes through all sequences.
"""

import functools

import torch

from fastlm.ops import attention_lanes, attention_tiles
from fastlm.ops.attention_common import PACKED_ACCEPTS as ACCEPTS
from fastlm.ops.attention_common import differentiable, simplest
from fastlm.ops.cpu import cannot_here
from fastlm.ops.tensors import FLOATS, accumulator, needs_gradient
from fastlm.ops.varlen_attn import reference, rows, sequences, unpaged

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]

DTYPES = FLOATS
FEW_QUERIES = 16


def cannot(query, *rest):
    return cannot_here(query, DTYPES)


def loses(query, key, value, sinks, slopes, cu_seq_q, cu_seq_k, seqused_k, block_table, max_q, max_k, num_splits,
          options):
    lacking = sinks is not None or slopes is not None or options.softcap or options.return_lse
    if torch.compiler.is_compiling():
        return None  # the loop over sequences reads values, which a graph has not
    if lacking or options.left >= 0 or value.size(-1) != query.size(-1):
        return None
    masked = options.right >= 0 and max_q != max_k
    if max_q <= FEW_QUERIES or not (masked or needs_gradient(query, key, value)):
        return "SDPA for each sequence: benchmarks/LOG.md 2026-11-24"
    return None


def run(query, key, value, sinks, slopes, cu_seq_q, cu_seq_k, seqused_k, block_table, max_q, max_k, num_splits,
        options):
    return _varlen_attn((query, key, value, sinks, slopes, cu_seq_q, cu_seq_k, seqused_k, block_table), options)


def _calls(tensors, options):
    """Return (queries, keys, call) of each sequence that has queries (see `sequences` of varlen_attn.py), and lanes."""
    query, key, value, sinks, slopes, *where = tensors
    flat, found = (unpaged(key), unpaged(value)), []
    for n, queries, keys in sequences(key, *where):
        slope = None if slopes is None else slopes[n % slopes.size(0), None]
        q, k, v = rows(query, queries), *(rows(x, keys) for x in flat)
        found.append((queries, keys, attention_tiles.Call(q, k, v, None, sinks, slope, *[None] * 4,
                                                          simplest(options, q.size(2), k.size(2)))))
    scores = sum(call.query.size(1) * call.query.size(2) * call.key.size(2) for _, _, call in found)
    return found, attention_lanes.lanes(found[0][2], scores) if found else []


def _forward(tensors, options, out, lse):
    calls, lanes = _calls(tensors, options)

    def run(lane):
        for queries, _, call in calls:
            attention_tiles.forward(lane.part(call), *(lane.of_queries(rows(x, queries)) for x in (out, lse)))

    attention_lanes.side_by_side([functools.partial(run, lane) for lane in lanes])
    end = calls[-1][0].stop if calls else 0
    out[end:], lse[end:] = 0, torch.inf


def _backward(tensors, options, saved, grads, needs):
    found = [t.new_zeros(t.shape, dtype=accumulator(t.dtype)) if need else None
             for t, need in zip(tensors[:4], needs, strict=False)]
    dquery, dkey, dvalue, dsinks = found
    wanted = [*needs[:3], False, needs[3]]
    calls, lanes = _calls(tensors, options)

    def run(lane):
        for queries, keys, call in calls:
            out, lse, dout, dlse = (lane.of_queries(rows(x, queries)) for x in (*saved, *grads))
            dq, dk, dv, _, ds = attention_tiles.backward(lane.part(call), out, lse, dout, dlse, wanted)
            if dquery is not None:
                dquery[queries, lane.query_heads] = dq[0].transpose(0, 1)
            for total, part in ((dkey, dk), (dvalue, dv)):
                if total is not None:
                    total = unpaged(total)[:, lane.heads]
                    part = part[0].transpose(0, 1)
                    if isinstance(keys, slice):
                        total[keys] += part
                    else:  # a sequence may list a page twice
                        total.index_add_(0, keys, part.to(total.dtype))
            if dsinks is not None:
                dsinks[lane.query_heads] += ds

    attention_lanes.side_by_side([functools.partial(run, lane) for lane in lanes])
    return found


def _reference(tensors, options):
    return reference(*tensors, 0, 0, None, options)


_varlen_attn = differentiable("varlen_attn_blocked", _forward, _backward, _reference)
