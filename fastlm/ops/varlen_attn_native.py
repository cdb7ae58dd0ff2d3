"""varlen_attn on the CPU by the kernel of csrc/attention.h: all sequences in one call, packed as they are."""

import torch

import fastlm._native as _native
from fastlm.ops.attention_common import PACKED_ACCEPTS as ACCEPTS
from fastlm.ops.attention_common import differentiable
from fastlm.ops.attention_kernels import MOST, Kernels
from fastlm.ops.cpu import cannot_here, on_amx, unmeasured
from fastlm.ops.tensors import FLOATS, accumulator
from fastlm.ops.varlen_attn import few, reference, sequences, unpaged

DTYPES = FLOATS
FEW_QUERIES = 4  # of each sequence, in bfloat16 on AMX: benchmarks/LOG.md 2026-11-27
LEAST, LEAST_ON_AVX2 = 1 << 23, 1 << 26  # multiplications of few sequences
ROW = "benchmarks/LOG.md 2026-11-25 to 27"

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]


def cannot(query, key, value, *rest):
    if reason := cannot_here(query, DTYPES):
        return reason
    if max(query.size(-1), value.size(-1)) > MOST:
        return f"heads of more than {MOST} numbers"
    return None


def loses(query, key, value, sinks, slopes, cu_seq_q, cu_seq_k, seqused_k, block_table, max_q, max_k, num_splits,
          options):
    if unknown := unmeasured(_native):
        return unknown
    lacking = sinks is not None or slopes is not None or options.softcap or options.return_lse or options.left >= 0
    if lacking or torch.compiler.is_compiling():  # stock's loop over sequences reads values, which a graph has not
        return None
    timed = query.dtype is torch.float32 or (query.dtype is torch.bfloat16 and max_q <= FEW_QUERIES)
    if _native.cpu == "intel" and not (on_amx(_native) and timed):
        return "no faster than SDPA for each sequence, or not yet measured on this CPU (intel)"
    count = cu_seq_q.size(0) - 1
    least = LEAST_ON_AVX2 if _native.cpu == "avx2" else LEAST
    work = count * max_q * max_k * query.size(1) * (query.size(2) + value.size(-1))
    if (count < 4 and work < least) or few(work, count, query, key, value):
        return f"SDPA for each of so few sequences is faster below {least} multiplications: {ROW}"
    return None


def run(query, key, value, sinks, slopes, cu_seq_q, cu_seq_k, seqused_k, block_table, max_q, max_k, num_splits,
        options):
    return _varlen_attn((query, key, value, sinks, slopes, cu_seq_q, cu_seq_k, seqused_k, block_table), options)


class _Packed:
    """A call's kernels, and which tokens of a pool of pages it reads (None: all of the packed keys)."""

    def __init__(self, tensors, options):
        query, key, value, sinks, slopes, *where = tensors
        self.tokens, spans = _spans(key, *where)
        key, value = (unpaged(x) if self.tokens is None else unpaged(x)[self.tokens] for x in (key, value))
        self.kernels = Kernels(_native, *map(_rows, (query, key, value)), None, sinks, slopes, spans, (None, None),
                               options)

    def scattered(self, grad, x):
        """Return the gradient of `x`, where that is a pool of pages, from the one of the tokens that were read."""
        if self.tokens is None:
            return grad
        whole = x.new_zeros(unpaged(x).shape, dtype=accumulator(grad.dtype))
        return whole.index_add_(0, self.tokens, grad.to(whole.dtype)).view(x.shape)


def _spans(key, cu_seq_q, cu_seq_k, seqused_k, block_table):
    """Return the tokens of the pages, one sequence after the other, or None, and `[N, 4]` for csrc/attention.h."""
    if block_table is None:
        keys = cu_seq_k.diff() if seqused_k is None else seqused_k
        return None, torch.stack([x.long() for x in (cu_seq_q[:-1], cu_seq_q.diff(), cu_seq_k[:-1], keys)], 1)
    spans, tokens, end = [[0] * 4 for _ in seqused_k], [seqused_k.new_empty(0, dtype=torch.int64)], 0
    for n, queries, keys in sequences(key, cu_seq_q, None, seqused_k, block_table):
        spans[n] = [queries.start, queries.stop - queries.start, end, keys.numel()]
        tokens.append(keys)
        end += keys.numel()
    return torch.cat(tokens), seqused_k.new_tensor(spans, dtype=torch.int64).view(-1, 4)


def _rows(x):
    """View `[T, H, …]` as a batch of one row, `[1, H, T, …]`."""
    return None if x is None else x.transpose(0, 1)[None]


def _forward(tensors, options, out, lse):
    end = int(tensors[5][-1])
    out[end:], lse[end:] = 0, torch.inf
    if end:
        _Packed(tensors, options).kernels.forward(_rows(out), _rows(lse))


def _backward(tensors, options, saved, grads, needs):
    if not int(tensors[5][-1]):
        return [torch.zeros_like(t) if need else None for t, need in zip(tensors[:4], needs, strict=False)]
    packed = _Packed(tensors, options)
    kernels, rows = packed.kernels, [_rows(x) for x in (*saved, *grads)]
    found = [t.new_zeros(t.size(2), t.size(1), t.size(3), dtype=kernels.stored) if need else None
             for t, need in zip((kernels.query, kernels.key, kernels.value), needs[:3], strict=True)]
    kernels.backward(*rows, *map(_rows, found), None)
    for i in (1, 2):
        if found[i] is not None:
            found[i] = packed.scattered(found[i], tensors[i])
    return [*found, kernels.dsinks(*rows) if needs[3] else None]


def _reference(tensors, options):
    return reference(*tensors, 0, 0, None, options)


_varlen_attn = differentiable("varlen_attn_native", _forward, _backward, _reference)
