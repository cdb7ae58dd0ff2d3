"""attention(q, k, v) = softmax(s) v for each head, where s = scale · q kᵀ, capped, biased and masked.

In this order: s ← c·tanh(s / c) with `softcap` c; a float mask is added and so is ALiBi's -slope·|i + Sk - Sq - j|
(Press et al., 2022); what the boolean mask, causality, the window, the keys' lengths or the documents bar becomes -∞.
A sink is one more logit of a head in the denominator, without a value. A query that may attend to no key gives zero
and has no gradient.

With p the probabilities, o the output and g its gradient: dv = pᵀ g, dp = g vᵀ, ds = p ⊙ (dp - Σ_j o_j g_j + dlse),
which is the additive mask's gradient; through the cap ds ← ds·(1 - tanh²(s / c)); dq = scale · ds k,
dk = scale · dsᵀ q (FlashAttention-2, algorithm 2).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.autograd import ABSENT, FROZEN, NEEDED, Differentiable, autocast, mapped, transformed
from fastlm.dispatch import Op, Sample, at_once, forward_mode
from fastlm.ops.attention_common import (
    Options,
    check_floats,
    check_integers,
    check_number,
    check_scale,
    check_softcap,
    check_window,
    relative,
    seen_range,
    simplest,
    visible,
)
from fastlm.ops.tensors import accumulator, check_tensors, readable

LEAST = 1 << 22  # multiplications, below which SDPA takes less time than Python: benchmarks/LOG.md 2026-11-25


def _shortcut(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *,
              window_size=(-1, -1)):
    """Call SDPA where it can take the call as it is; see `stock`."""
    shape = key.shape
    batch, heads, queries, width = query.shape
    if len(shape) != 4 or shape != value.shape or shape[0] != batch or not query.is_cpu or transformed() or (
            scale is not None and scale <= 0):
        return None
    multiplications = 2 * batch * heads * queries * width * shape[2]
    if multiplications >= LEAST and (dropout_p or not op.at_once(query, multiplications) or not (
            attn_mask is None or not attn_mask.requires_grad) or not (
            query.stride(3) == key.stride(3) == value.stride(3) == 1)):
        return None
    if window_size != (-1, -1) and not (queries == 1 and window_size == (-1, 0)):  # a token sees all before it
        return None
    if attn_mask is not None and (dropout_p or attn_mask.dtype not in (torch.bool, query.dtype)):
        return None  # nothing is drawn in vain
    options = {} if scale is None and not enable_gqa else dict(scale=scale, enable_gqa=enable_gqa)
    found = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if found.shape != query.shape:
        return None  # a mask has widened it
    return _twice(found) if found.requires_grad else found


@at_once(_shortcut)
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                                 dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                                 enable_gqa: bool = False, *, window_size: tuple[int, int] = (-1, -1),
                                 softcap: float | None = None, alibi_slopes: Tensor | None = None,
                                 sinks: Tensor | None = None, key_lengths: Tensor | None = None,
                                 document_ids: Tensor | tuple[Tensor, Tensor] | None = None,
                                 return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from each query to the keys and return the weighted values `[..., H, Sq, Dv]`.

    All masks that are given apply together. A query i and a key j are aligned at the last ones, i + Sk - Sq against j,
    in `window_size` and `alibi_slopes`, where Sk is the row's own length if there are `key_lengths`.

    Args:
        query: `[..., H, Sq, D]`.
        key: `[..., H_kv, Sk, D]`.
        value: `[..., H_kv, Sk, Dv]`.
        attn_mask: broadcasts to `[..., H, Sq, Sk]`; boolean (True = may attend) or added to the scores (of
            query's dtype or float32); one that requires a gradient is a learned bias.
        dropout_p: probability that an attention weight is dropped.
        is_causal: query i sees the keys j ≤ i (aligned at the first key, also where Sq ≠ Sk).
        scale: factor of the scores, D^-0.5 by default.
        enable_gqa: H_kv may divide H; each group of H / H_kv query heads shares a head of keys and values.
        window_size: (left, right): i + Sk - Sq - left ≤ j ≤ i + Sk - Sq + right, -1 = unbounded. (-1, 0) is the
            causal mask for decoding with a cache.
        softcap: c > 0 bounds the scores: c·tanh(s / c).
        alibi_slopes: `[H]` or `[..., H]`: -slope·|i + Sk - Sq - j| is added to the scores. They get no gradient.
        sinks: `[H]`, a logit of each head that takes its part of the attention and has no value.
        key_lengths: `[...]` integers (a row of the batch each): keys from there on are not attended to.
        document_ids: `[..., S]` integers, or a pair of them for queries and keys: only equal ids attend.
        return_lse: also return the natural logarithm of the softmax's whole denominator, sinks included, before
            dropout: `[..., H, Sq]`, float32 (float64 for float64), differentiable, -∞ where it is empty.

    Raises:
        TypeError: an argument is no tensor, or no number.
        ValueError: `window_size`, `softcap`, or (on the CPU) a length of `key_lengths` lies outside its range.
        RuntimeError: dtypes, devices or shapes do not fit, or `dropout_p` is no probability.
    """
    query, key, value, attn_mask = _checked(query, key, value, attn_mask, dropout_p)
    window_size = check_window(window_size, "attention")
    softcap = check_softcap(softcap, "attention")
    rank = max(query.dim(), key.dim(), value.dim())
    query, key, value = (t if t.dim() > 2 else t.unsqueeze(0) for t in (query, key, value))
    batch = _broadcast("batches of query, key and value", *(t.shape[:-3] for t in (query, key, value)))
    num_heads = _num_heads(query, key, value, enable_gqa)
    shape = (*batch, num_heads, query.size(-2), key.size(-2))
    if key.size(-3) != value.size(-3):
        key, value = (t.repeat_interleave(num_heads // t.size(-3), -3) for t in (key, value))
    if query.size(-3) != num_heads:
        query = query.expand(*query.shape[:-3], num_heads, -1, -1)
    if attn_mask is not None:
        sizes = zip(reversed(attn_mask.shape), reversed(shape), strict=False)
        if attn_mask.dim() > len(shape) or any(size != 1 and size != whole for size, whole in sizes):
            raise RuntimeError(f"attention: attn_mask has shape {list(attn_mask.shape)}, expected one that "
                               f"broadcasts to {list(shape)}")
        attn_mask = attn_mask[(None,) * max(0, 3 - attn_mask.dim())]
        attn_mask = _to_4d(attn_mask, attn_mask.shape[:-3] if len(batch) < 2 else batch)
    sinks = check_floats("sinks", sinks, query, ((num_heads,),), "attention")
    rows = _per_row(query, shape, alibi_slopes, key_lengths, document_ids)
    query, key, value = (_to_4d(t, batch) for t in (query, key, value))
    scale = check_scale(scale, query.size(-1), "attention")
    options = Options(float(dropout_p), bool(is_causal), scale, *window_size, softcap, bool(return_lse))
    options = simplest(options, *shape[-2:], key_lengths)
    found = op(query, key, value, attn_mask, sinks, *rows, options)
    if rank == 4:
        return found
    out = found[0] if return_lse else found
    out = out.reshape((*shape[:-1], value.size(-1))[-rank:])
    return (out, found[1].reshape(out.shape[:-1])) if return_lse else out


# --- arguments -------------------------------------------------------------------------------------------------


def _checked(query, key, value, attn_mask, dropout_p):
    tensors = dict(query=query, key=key, value=value, attn_mask=attn_mask)
    check_tensors("attention", tensors, ("attn_mask",))
    for name, x in tensors.items():
        if x is not None and (x.is_nested or x.layout is not torch.strided):
            raise TypeError(f"attention: {name} is nested or sparse, expected a dense tensor (varlen_attn takes packed "
                            "sequences)")
    query, key, value, attn_mask = autocast(query.device.type, query, key, value, attn_mask)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2:
            raise RuntimeError(f"attention: {name} has shape {list(x.shape)}, expected [..., H, S, D]")
        if x.dtype != query.dtype or not x.is_floating_point():
            raise RuntimeError(f"attention: {name} is {x.dtype}, expected one floating dtype for query "
                               f"({query.dtype}), key and value")
    if key.size(-1) != query.size(-1):
        raise RuntimeError(f"attention: key has head_dim {key.size(-1)}, query has {query.size(-1)}")
    if value.size(-2) != key.size(-2):
        raise RuntimeError(f"attention: value has length {value.size(-2)}, key has {key.size(-2)}")
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(f"attention: attn_mask is {attn_mask.dtype}, expected torch.bool, torch.float32 or "
                           f"query's {query.dtype}")
    if not 0.0 <= check_number("dropout_p", dropout_p, "attention") <= 1.0:
        raise RuntimeError(f"attention: dropout_p is {dropout_p}, expected a probability")
    return query, key, value, attn_mask


def _per_row(query, shape, alibi_slopes, key_lengths, document_ids):
    """Return slopes `[B or 1, H]`, key lengths `[B]`, ids of queries `[B, Sq]` and of keys `[B, Sk]`, checked."""
    *batch, num_heads, queries, keys = shape
    rows = math.prod(batch)
    slopes = check_floats("alibi_slopes", alibi_slopes, query, ((num_heads,), (*batch, num_heads)), "attention")
    lengths = check_integers("key_lengths", key_lengths, query, (tuple(batch),), "attention")
    if lengths is not None:
        if readable(lengths) and lengths.numel() and not 0 <= lengths.min() <= lengths.max() <= keys:
            raise ValueError(f"attention: key_lengths has {lengths.min()} to {lengths.max()}, expected 0 to {keys}")
        lengths = lengths.reshape(rows)
    ids = (None, None)
    if document_ids is not None:
        if isinstance(document_ids, Tensor) and queries != keys:
            raise RuntimeError(f"attention: document_ids is one tensor, expected a pair for {queries} queries and "
                               f"{keys} keys")
        pair = (document_ids, document_ids) if isinstance(document_ids, Tensor) else document_ids
        if not isinstance(pair, tuple | list) or len(pair) != 2 or any(x is None for x in pair):
            raise TypeError(f"attention: document_ids must be a Tensor or a pair of them, got "
                            f"{type(document_ids).__name__}")
        ids = [check_integers("document_ids", x, query, ((*batch, length), (length,)), "attention")
               .expand(*batch, length).reshape(rows, length) for x, length in zip(pair, (queries, keys), strict=True)]
    return None if slopes is None else slopes.detach().reshape(-1, num_heads), lengths, *ids


def _broadcast(what, *shapes):
    if all(shape == shapes[0] for shape in shapes):  # torch.broadcast_shapes takes as long as a small call of SDPA
        return tuple(shapes[0])
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        shapes = " and ".join(str(list(shape)) for shape in shapes)
        hint = " (enable_gqa=True lets query heads share them)" if "heads" in what else ""
        raise RuntimeError(f"attention: sizes of {what} do not broadcast: {shapes}{hint}") from None


def _num_heads(query, key, value, enable_gqa):
    heads = [t.size(-3) for t in (query, key, value)]
    if not enable_gqa:
        return _broadcast("heads of query, key and value", *([h] for h in heads))[0]
    if any(h == 0 or heads[0] % h for h in heads):
        raise RuntimeError(f"attention: query has {heads[0]} heads, expected a multiple of key's {heads[1]} "
                           f"and value's {heads[2]}")
    return heads[0]


def _to_4d(x, batch):
    """View `x` as `[B, H, rows, columns]`, its leading dimensions broadcast to `batch` and flattened."""
    if x.dim() == 4 and x.shape[:-3] == batch:
        return x
    return x.expand(*batch, *x.shape[-3:]).reshape(math.prod(batch), *x.shape[-3:])


# --- the definition, and the best stock call -------------------------------------------------------------------


def reference(query, key, value, attn_mask, sinks, slopes, key_lengths, query_ids, key_ids, options, dropped=None):
    """Compute attention by its formula.

    Args:
        query, key, value: `[B, H, Sq, D]`, `[B, H_kv, Sk, D]`, `[B, H_kv, Sk, Dv]`.
        attn_mask: broadcasts to `[B, H, Sq, Sk]` and has four dimensions.
        sinks, slopes: `[H]` and `[B or 1, H]`, float32 or float64.
        key_lengths, query_ids, key_ids: `[B]`, `[B, Sq]`, `[B, Sk]`, int32 or int64.
        options: of `attention_common`.
        dropped: which weights dropout drops, `[B, H, Sq, Sk]`; None draws them as SDPA does.

    Returns:
        The output `[B, H, Sq, Dv]`, or with `options.return_lse` the output and the log-sum-exp `[B, H, Sq]`.
    """
    key, value = (t.repeat_interleave(query.size(1) // t.size(1), 1) for t in (key, value))
    scores = query @ key.mT * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    bias, seen = _masks(query, key, attn_mask, slopes, key_lengths, query_ids, key_ids, options)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    sink = scores.new_full((1, 1, 1), -torch.inf) if sinks is None else sinks.to(scores.dtype)[:, None, None]
    highest = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], 3).detach().amax(3, keepdim=True)
    highest = highest.masked_fill(highest == -torch.inf, 0)
    weights = (scores - highest).exp()
    total = weights.sum(3, keepdim=True) + (sink - highest).exp()
    empty = total == 0
    total = total.masked_fill(empty, 1)
    weights = weights / total
    if dropped is None:
        weights = F.dropout(weights, options.dropout_p)
    else:
        weights = weights.masked_fill(dropped, 0) / (1 - options.dropout_p or 1)
    out = weights @ value
    if not options.return_lse:
        return out
    return out, (highest + total.log()).masked_fill(empty, -torch.inf).squeeze(3).to(accumulator(query.dtype))


def _masks(query, key, attn_mask, slopes, key_lengths, query_ids, key_ids, options):
    """Return what is added to the scores and who may see whom, each None or broadcastable to `[B, H, Sq, Sk]`."""
    queries, keys = query.size(2), key.size(2)
    rows, cols = (torch.arange(n, device=query.device) for n in (queries, keys))
    seen = visible(rows, cols, queries, keys, key_lengths, query_ids, key_ids, options)
    bias = None
    if slopes is not None:
        bias = -slopes[:, :, None, None] * relative(rows, cols, queries, keys, key_lengths).abs()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        seen = attn_mask if seen is None else attn_mask & seen
    elif attn_mask is not None:
        bias = attn_mask if bias is None else attn_mask + bias
    return bias, seen


def stock(query, key, value, attn_mask, sinks, slopes, key_lengths, query_ids, key_ids, options):
    """Call SDPA, with a dense mask for what it lacks; where no mask can express that, compute the formula.

    SDPA refuses a mask beside `is_causal`, misreads a float32 mask beside halves (cuDNN) and beside float64 (CPU), and
    returns None for an empty batch (cuDNN); its CPU kernel wants the last dimension contiguous, has no second
    derivative in forward mode, and gives NaN for `is_causal` with a scale of 0 or less; on a GPU a mask's is to be
    contiguous.
    """
    if options.softcap or sinks is not None or options.return_lse or forward_mode() or not query.size(0):
        return reference(query, key, value, attn_mask, sinks, slopes, key_lengths, query_ids, key_ids, options)
    is_causal = options.is_causal
    dense = any(x is not None for x in (slopes, key_lengths, query_ids)) or options.left >= 0 or options.right >= 0
    if dense or (is_causal and (attn_mask is not None or options.scale <= 0)):
        bias, seen = _masks(query, key, attn_mask, slopes, key_lengths, query_ids, key_ids, options)
        attn_mask = seen if bias is None else bias if seen is None else bias.masked_fill(~seen, -torch.inf)
        is_causal = False
    half_on_cpu = query.device.type == "cpu" and query.element_size() == 2
    if attn_mask is not None and attn_mask.is_floating_point():
        wide = half_on_cpu and not attn_mask.requires_grad  # beside halves float32 is taken, float64 is not
        if not wide or attn_mask.dtype is torch.float64:
            attn_mask = attn_mask.to(torch.float32 if wide else query.dtype)
    if query.is_cuda and attn_mask is not None:
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], key.size(2))
        attn_mask = attn_mask if attn_mask.stride(-1) == 1 else attn_mask.contiguous()
    if query.device.type == "cpu":
        query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    return _sdpa(query, key, value, attn_mask, options.dropout_p, is_causal, options.scale, _grouped(query, key))


def additive(attn_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the mask as one to be added to scores of `dtype`."""
    if attn_mask is None or attn_mask.dtype is not torch.bool:
        return attn_mask
    return torch.zeros((), dtype=dtype, device=attn_mask.device).where(attn_mask, -torch.inf)


def _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """Call SDPA, and where that is its CPU kernel, whose backward has no derivative, see to it that there is one."""
    if torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                                              enable_gqa=enable_gqa)
    # A checkpoint lets a node read what it saved once only.
    hooked = torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True)
    if (hooked or transformed()) and query.is_cpu and not mapped():  # vmap can't ask for the choice
        choice = torch._fused_sdp_choice(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa=enable_gqa)
        if choice == int(torch._C._SDPBackend.FLASH_ATTENTION):
            scale = check_scale(scale, query.size(-1), "attention")
            return _flash((query, key, value, additive(attn_mask, query.dtype)), is_causal, scale)[0]
    found = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                                           enable_gqa=enable_gqa)
    return _twice(found) if found.requires_grad else found


def _twice(found):
    """Let what SDPA has returned be differentiated twice: its CPU kernel's backward has no derivative."""
    node = found.grad_fn
    if node.name() == FLASH:
        node.register_hook(_flash_twice)
    return found


def _grouped(query, key) -> bool:
    """Tell whether heads of queries share keys."""
    if query.size(1) == key.size(1):  # noqa: SIM103 (SDPA wants a bool, which the compiler has of symbols in branches)
        return False
    return True


def _flash_forward(tensors, needs, is_causal, scale):
    query, key, value, attn_mask = tensors
    return list(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale))


def _flash_fake(tensors, needs, is_causal, scale):
    query = tensors[0]
    return [query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=accumulator(query.dtype))]


def _flash_backward(grads, saved, tensors, needs, is_causal, scale):
    query, key, value, attn_mask = tensors
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grads[0], query, key, value, *saved, 0.0, is_causal, attn_mask=attn_mask, scale=scale)
    of_mask = None
    if needs[3]:  # under functorch, which hides from SDPA's choice that a mask needs a gradient
        with torch.enable_grad():
            mask = attn_mask.detach().requires_grad_()
            out = _flash_reference((query, key, value, mask), is_causal, scale)[0]
            of_mask, = torch.autograd.grad(out, mask, grads[0])
    return [*(g if need else None for g, need in zip(found, needs[:3], strict=True)), of_mask]


def _flash_reference(tensors, is_causal, scale):
    return (reference(*tensors, *[None] * 5, Options(is_causal=is_causal, scale=scale)),)


# SDPA's CPU kernel with a second derivative.
_flash = Differentiable("sdpa_flash", statics="bool is_causal, float scale", outputs=1, forward=_flash_forward,
                        fake=_flash_fake, backward=_flash_backward, reference=_flash_reference, reads=1)
FLASH = "ScaledDotProductFlashAttentionForCpuBackward0"


def _flash_twice(grads, upstream):
    """Take the place of a node of SDPA's own where its gradients are to have a derivative (create_graph)."""
    if not torch.is_grad_enabled() or upstream[0] is None:
        return None
    node = torch._C._current_autograd_node()
    tensors = [node._saved_query, node._saved_key, node._saved_value, node._saved_attn_mask]
    slots = [FROZEN if g is None else NEEDED for g in grads] + [ABSENT if tensors[3] is None else FROZEN]
    scale = check_scale(node._saved_scale, tensors[0].size(-1), "attention")
    return tuple(_flash.pull(upstream[:1], (node._saved_output, node._saved_logsumexp),
                             [t for t in tensors if t is not None], slots, (node._saved_is_causal, scale))[:3])


# --- samples ---------------------------------------------------------------------------------------------------


def samples(scale: str, dtype: torch.dtype, device: str):
    def qkv(batch, heads, kv_heads, queries, keys, dim, value_dim=None, gain=1.0):
        shapes = ((heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim or dim))
        return tuple((gain * torch.randn(batch, *shape, device=device)).to(dtype) for shape in shapes)

    def call(name, tensors, attn_mask=None, *, sinks=None, slopes=None, lengths=None, ids=(None, None), scale=None,
             **options):
        options = Options(scale=scale or tensors[0].size(-1) ** -0.5, **options)
        return Sample(name, (*tensors, attn_mask, sinks, slopes, lengths, *ids, options))

    if scale == "bench":
        cuda = torch.device(device).type == "cuda"
        for batch, heads, n, dim in ((4, 16, 2048, 128), (1, 32, 8192, 64)) if cuda else ((2, 8, 512, 64),):
            yield call(f"{n}x{dim}", qkv(batch, heads, heads, n, n, dim))
            yield call(f"{n}x{dim} causal", qkv(batch, heads, heads, n, n, dim), is_causal=True)
            yield call(f"{n}x{dim} grouped", qkv(batch, heads, heads // 4, n, n, dim), is_causal=True)
        return
    for length in (1, 127, 128, 129):
        yield call(f"length {length}", qkv(1, 1, 1, length, length, 16))
    yield call("causal", qkv(2, 2, 2, 70, 70, 32), is_causal=True)
    yield call("causal, more keys", qkv(1, 2, 2, 33, 140, 16), is_causal=True)
    yield call("causal, more queries", qkv(1, 2, 2, 140, 33, 16), is_causal=True)
    yield call("cross", qkv(1, 2, 2, 5, 150, 16))
    yield call("grouped", qkv(2, 6, 2, 40, 40, 16), is_causal=True)
    yield call("one key head", qkv(1, 4, 1, 20, 30, 16))
    for dim in (1, 3, 80, 128, 256):
        yield call(f"head size {dim}", qkv(1, 1, 1, 18, 18, dim))
    yield call("wide values", qkv(1, 2, 1, 18, 21, 16, 48))
    yield call("scale", qkv(1, 1, 1, 18, 18, 16), scale=0.7)
    yield call("negative scale", qkv(1, 1, 1, 18, 18, 16), scale=-0.3, is_causal=True)
    yield call("outliers", qkv(1, 1, 1, 40, 40, 16, gain=8.0))
    yield from _masked_samples(call, qkv, dtype, device)
    yield from _featured_samples(call, qkv, device)
    yield call("no rows", qkv(0, 1, 1, 4, 4, 16))
    yield call("no queries", qkv(1, 1, 1, 0, 4, 16))
    yield call("no keys", qkv(1, 1, 1, 4, 0, 16))
    yield call("lengths before heads", tuple(t.transpose(1, 2) for t in qkv(1, 20, 20, 3, 3, 16)))
    yield call("transposed", tuple(t.mT for t in qkv(1, 2, 2, 16, 16, 30)))
    yield call("expanded keys", tuple(t.expand(3, -1, -1, -1) for t in qkv(1, 2, 2, 12, 12, 16)))


def _masked_samples(call, qkv, dtype, device):
    def allowed(*shape):
        mask = torch.rand(shape, device=device) > 0.3
        mask[..., 1:2, :] = False
        return mask

    def bias(*shape):
        return torch.randn(shape, device=device)

    yield call("boolean mask", qkv(2, 2, 2, 20, 70, 16), allowed(2, 2, 20, 70))
    yield call("shared mask", qkv(2, 4, 2, 20, 70, 16), allowed(1, 1, 20, 70))
    yield call("key padding", qkv(2, 2, 2, 20, 70, 16), torch.rand(2, 1, 1, 70, device=device) > 0.3)
    yield call("additive mask", qkv(2, 2, 1, 20, 70, 16), bias(2, 2, 20, 70).to(dtype))
    yield call("learned bias", qkv(2, 2, 2, 20, 70, 16), bias(1, 2, 20, 70).to(dtype))
    yield call("float32 bias", qkv(1, 2, 2, 20, 30, 16), bias(1, 1, 1, 30))
    yield call("minus infinity", qkv(1, 1, 1, 20, 30, 16),
               bias(1, 1, 20, 30).where(allowed(20, 30), -torch.inf).to(dtype))
    yield call("causal and mask", qkv(1, 2, 2, 40, 70, 16), allowed(1, 1, 40, 70), is_causal=True)
    yield call("causal and bias", qkv(1, 2, 2, 40, 70, 16), bias(1, 2, 1, 70).to(dtype), is_causal=True)


def _featured_samples(call, qkv, device):
    """Yield each feature that SDPA lacks; their pairs are in tests/cases/test_attention_features.py."""
    def ids(batch, n):
        return torch.randint(3, (batch, n), device=device)

    yield call("window", qkv(2, 2, 2, 150, 150, 16), left=20, right=7)
    yield call("window, more keys", qkv(1, 2, 2, 30, 170, 16), left=9, right=0)
    yield call("window, more queries", qkv(1, 2, 2, 170, 30, 16), left=9, right=0)
    yield call("causal at the last key", qkv(1, 4, 2, 5, 140, 16), right=0)
    yield call("softcap", qkv(1, 2, 2, 70, 70, 16, gain=3.0), softcap=5.0)
    yield call("alibi", qkv(2, 4, 2, 30, 140, 16), slopes=torch.rand(1, 4, device=device))
    yield call("alibi for each row", qkv(2, 4, 2, 33, 40, 16), slopes=torch.rand(2, 4, device=device), is_causal=True)
    yield call("sinks", qkv(2, 4, 4, 40, 50, 16), sinks=torch.randn(4, device=device))
    yield call("key lengths", qkv(4, 2, 2, 20, 150, 16), lengths=torch.tensor([150, 0, 17, 129], device=device))
    yield call("documents", qkv(2, 2, 2, 150, 150, 16), ids=(ids(2, 150).sort().values,) * 2, is_causal=True)
    yield call("unordered documents", qkv(2, 2, 1, 30, 150, 16), ids=(ids(2, 30), ids(2, 150)))
    yield call("log-sum-exp", qkv(2, 4, 2, 40, 70, 16), is_causal=True, return_lse=True)
    yield call("log-sum-exp of nothing", qkv(3, 2, 2, 9, 70, 16), return_lse=True,
               lengths=torch.tensor([0, 70, 5], device=device))
    yield call("everything dropped", qkv(1, 2, 2, 20, 20, 16), dropout_p=1.0)
    yield call("everything", qkv(2, 4, 2, 30, 140, 16, 8), torch.randn(2, 1, 30, 140, device=device),
               sinks=torch.randn(4, device=device), slopes=torch.rand(1, 4, device=device), softcap=5.0, left=90,
               right=9, lengths=torch.tensor([120, 60], device=device), ids=(ids(2, 30), ids(2, 140)), return_lse=True)


def cost(query, key, value, attn_mask, sinks, slopes, key_lengths, query_ids, key_ids, options) -> tuple[int, int]:
    queries, keys = query.size(2), key.size(2)
    pairs = queries * keys
    if options.is_causal or options.left >= 0 or options.right >= 0:
        pairs = sum(max(0, end - start) for start, end in (
            seen_range(i, i + 1, queries, keys, options) for i in range(queries)))
    tensors = [query, key, value] + [attn_mask] * (attn_mask is not None)
    moved = sum(t.numel() * t.element_size() for t in tensors)
    moved += query.numel() // max(query.size(3), 1) * value.size(3) * query.element_size()
    return 2 * query.size(0) * query.size(1) * pairs * (query.size(3) + value.size(3)), moved


op = Op("attention", reference=reference, torch=stock, fast=("triton", "native", "blocked"), samples=samples, cost=cost,
        constants=(5,))
