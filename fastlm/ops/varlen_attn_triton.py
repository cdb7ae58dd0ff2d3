"""varlen_attn in Triton: attention's kernels over packed sequences and pages; attention_kernels_triton.py is how."""

import torch

from fastlm.autograd import Differentiable, transformed
from fastlm.ops import attention_launch_triton as launch
from fastlm.ops.attention_common import PACKED_ACCEPTS as ACCEPTS
from fastlm.ops.attention_common import Options
from fastlm.ops.triton_kernels import DTYPES, loses
from fastlm.ops.varlen_attn import reference

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]


def cannot(query, key, value, *rest):
    return launch.cannot(query, value)


def run(query, key, value, sinks, slopes, cu_seq_q, cu_seq_k, seqused_k, block_table, max_q, max_k, num_splits,
        options):
    if block_table is not None and (transformed() or (
            torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)))):
        key, value, cu_seq_k = _packed(key, value, block_table)
        block_table = None
    tensors = (query, key, value, sinks, slopes, cu_seq_q, cu_seq_k, seqused_k, block_table)
    out, lse = _varlen_attn(tensors, max_q, max_k, num_splits or 0, options.scale, options.left, options.right,
                            options.softcap)
    return (out, lse) if options.return_lse else out


def _packed(key, value, table):
    """Copy pages, which have no backward kernel, into sequences of equal length; return where they begin, too."""
    length = table.size(1) * key.size(1)
    starts = torch.arange(table.size(0) + 1, device=table.device, dtype=torch.int32) * length
    return *(x[table.flatten()].flatten(0, 1) for x in (key, value)), starts


def _call(tensors, max_q, max_k, splits, scale, left, right, softcap):
    query, key, value, sinks, slopes, cu_q, cu_k, used, table = tensors
    key, value = (_heads_first(x) if table is None else x.transpose(1, 2) for x in (key, value))
    return launch.Call(
        _heads_first(query), key, value, None, sinks, slopes, used, None, None, None,
        Options(scale=scale, left=left, right=right, softcap=softcap), cu_q, cu_k, table, max_q, max_k, splits)


def _heads_first(x):
    """View `[T, H, …]` as `[1, H, T, …]`."""
    return x.transpose(0, 1)[None]


def _forward(tensors, needs, *statics):
    out, lse = _fake(tensors, needs, *statics)
    launch.forward(_call(tensors, *statics), out, _heads_first(lse))
    return [out, lse]


def _fake(tensors, needs, *statics):
    query, _, value, *_ = tensors
    return [query.new_empty(*query.shape[:2], value.size(-1)), query.new_empty(query.shape[:2], dtype=torch.float32)]


def _backward(grads, saved, tensors, needs, *statics):
    (out, lse), (dout, dlse) = saved, grads
    like = (*tensors[:3], None, tensors[3])
    dq, dk, dv, _, dsinks = launch.backward(
        _call(tensors, *statics), out, _heads_first(lse), _heads_first(dout), _heads_first(dlse.contiguous()),
        [*needs[:3], False, needs[3]], like)
    # Only functorch and exporting ask for gradients of the slopes, which count as constants.
    rest = (torch.zeros_like(t) if n else None for t, n in zip(tensors[4:], needs[4:], strict=True))
    return [dq, dk, dv, dsinks, *rest]


def _reference(tensors, max_q, max_k, splits, scale, left, right, softcap):
    options = Options(scale=scale, left=left, right=right, softcap=softcap, return_lse=True)
    return reference(*tensors, max_q, max_k, splits, options)


_varlen_attn = Differentiable(
    "varlen_attn_triton",
    statics="SymInt max_q, SymInt max_k, int splits, float scale, int left, int right, float softcap", outputs=2,
    forward=_forward, fake=_fake, backward=_backward, reference=_reference, reads=2)
