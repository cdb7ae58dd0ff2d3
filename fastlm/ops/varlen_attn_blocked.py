"""varlen_attn on the CPU: each sequence is a call of fastlm/ops/attention_tiles.py, in place in the packed tensors.

Lanes are heads: each goes through all sequences.
"""

import functools

import torch

from fastlm.autograd import Differentiable
from fastlm.ops import attention_lanes, attention_tiles
from fastlm.ops.attention_common import PACKED_ACCEPTS as ACCEPTS
from fastlm.ops.attention_common import Options, accumulator, simplest
from fastlm.ops.varlen_attn import reference, rows, sequences, unpaged

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]

FEW_QUERIES = 16
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def cannot(query, *rest):
    if query.device.type not in ("cpu", "meta"):
        return "computes on the CPU"
    if query.dtype not in DTYPES:
        return f"no tiles in {query.dtype}"
    return None


def loses(query, key, value, sinks, slopes, cu_seq_q, cu_seq_k, seqused_k, block_table, max_q, max_k, num_splits,
          options):
    lacking = sinks is not None or slopes is not None or options.softcap or options.return_lse
    if torch.compiler.is_compiling():
        return None  # the loop over sequences reads values, which a graph has not
    if lacking or options.left >= 0 or value.size(-1) != query.size(-1):
        return None
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    masked = options.right >= 0 and max_q != max_k
    if max_q <= FEW_QUERIES or not (training or masked):
        return "SDPA for each sequence: benchmarks/LOG.md 2026-11-24"
    return None


def run(query, key, value, sinks, slopes, cu_seq_q, cu_seq_k, seqused_k, block_table, max_q, max_k, num_splits,
        options):
    tensors = (query, key, value, sinks, slopes, cu_seq_q, cu_seq_k, seqused_k, block_table)
    out, lse = _varlen_attn(tensors, options.scale, options.left, options.right, options.softcap, options.return_lse)
    return (out, lse.masked_fill(lse == torch.inf, -torch.inf)) if options.return_lse else out


def _options(scale, left, right, softcap, return_lse):
    return Options(scale=scale, left=left, right=right, softcap=softcap, return_lse=return_lse)


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


def _forward(tensors, needs, *options):
    out, lse = _fake(tensors, needs, *options)
    calls, lanes = _calls(tensors, _options(*options))

    def run(lane):
        for queries, _, call in calls:
            attention_tiles.forward(lane.part(call), *(lane.of_queries(rows(x, queries)) for x in (out, lse)))

    attention_lanes.side_by_side([functools.partial(run, lane) for lane in lanes])
    end = calls[-1][0].stop if calls else 0
    out[end:], lse[end:] = 0, torch.inf
    return [out, lse]


def _fake(tensors, needs, *options):
    query, _, value, *_ = tensors
    out = query.new_empty(*query.shape[:2], value.size(-1))
    return [out, query.new_empty(query.shape[:2], dtype=accumulator(query))]


def _backward(grads, saved, tensors, needs, *options):
    found = [torch.zeros(t.shape, dtype=accumulator(t)) if n else None for t, n in zip(tensors, needs, strict=True)]
    dquery, dkey, dvalue, dsinks, *_ = found
    wanted = [*needs[:3], False, needs[3]]
    calls, lanes = _calls(tensors, _options(*options))

    def run(lane):
        for queries, keys, call in calls:
            out, lse, dout, dlse = (lane.of_queries(rows(x, queries)) for x in (*saved, *grads))
            dq, dk, dv, _, ds = attention_tiles.backward(lane.part(call), out, lse, dout, dlse, wanted)
            if dquery is not None:
                dquery[queries, lane.query_heads] = dq[0].transpose(0, 1)
            for total, part in ((dkey, dk), (dvalue, dv)):
                if total is not None:
                    total = unpaged(total)[:, lane.heads]
                    total[keys] = total[keys] + part[0].transpose(0, 1)
            if dsinks is not None:
                dsinks[lane.query_heads] += ds

    attention_lanes.side_by_side([functools.partial(run, lane) for lane in lanes])
    return [None if g is None else g.to(t.dtype) for g, t in zip(found, tensors, strict=True)]


def _reference(tensors, *options):
    query, key, value, sinks, slopes, *where = tensors
    out, lse = reference(query, key, value, sinks, slopes, *where, 0, 0, None,
                         _options(*options)._replace(return_lse=True))
    return out, lse.masked_fill(lse == -torch.inf, torch.inf)


_varlen_attn = Differentiable(
    "varlen_attn_blocked", statics="float scale, int left, int right, float softcap, bool return_lse", outputs=2,
    forward=_forward, fake=_fake, backward=_backward, reference=_reference, reads_results=True)
