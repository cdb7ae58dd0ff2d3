"""attention(q, k, v) = softmax(scale · q kᵀ + mask) v, for each head.

With p the probabilities, o the output and g its gradient: dv = pᵀ g, dp = g vᵀ, ds = p ⊙ (dp - Σ_j o_j g_j),
dq = scale · ds k, dk = scale · dsᵀ q, and an additive mask's gradient is ds (FlashAttention-2, algorithm 2).
A query that may attend to no key gives zero and has no gradient.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.autograd import autocast
from fastlm.dispatch import Op, Sample


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                                 dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                                 enable_gqa: bool = False) -> Tensor:
    """Attend from each query to the keys and return the weighted values `[..., H, Sq, Dv]`.

    Args:
        query: `[..., H, Sq, D]`.
        key: `[..., H_kv, Sk, D]`.
        value: `[..., H_kv, Sk, Dv]`.
        attn_mask: broadcasts to `[..., H, Sq, Sk]`; boolean (True = may attend) or added to the scores (of
            query's dtype or float32). Unlike in stock PyTorch it may come with `is_causal`; then both apply.
        dropout_p: probability that an attention weight is dropped.
        is_causal: query i sees the keys j ≤ i (aligned at the first key, also where Sq ≠ Sk).
        scale: factor of the scores, D^-0.5 by default.
        enable_gqa: H_kv may divide H; each group of H / H_kv query heads shares a head of keys and values.

    Raises:
        TypeError: an argument is no tensor.
        RuntimeError: dtypes, devices or shapes do not fit, or `dropout_p` is no probability.
    """
    query, key, value, attn_mask = _checked(query, key, value, attn_mask, dropout_p)
    rank = max(query.dim(), key.dim(), value.dim())
    query, key, value = (t if t.dim() > 2 else t.unsqueeze(0) for t in (query, key, value))
    batch = _broadcast("batches of query, key and value", *(t.shape[:-3] for t in (query, key, value)))
    num_heads = _num_heads(query, key, value, enable_gqa)
    shape = (*batch, num_heads, query.size(-2), key.size(-2))
    if key.size(-3) != value.size(-3):
        key, value = (t.repeat_interleave(num_heads // t.size(-3), -3) for t in (key, value))
    query = query.expand(*query.shape[:-3], num_heads, -1, -1)
    if attn_mask is not None:
        if _broadcast("attn_mask and scores", attn_mask.shape, shape) != shape:
            raise RuntimeError(f"attention: attn_mask has shape {list(attn_mask.shape)}, expected one that "
                               f"broadcasts to {list(shape)}")
        attn_mask = attn_mask[(None,) * max(0, 3 - attn_mask.dim())]
        attn_mask = _to_4d(attn_mask, attn_mask.shape[:-3] if len(batch) < 2 else batch)
    query, key, value = (_to_4d(t, batch) for t in (query, key, value))
    scale = max(query.size(-1), 1) ** -0.5 if scale is None else float(scale)
    out = op(query, key, value, attn_mask, float(dropout_p), bool(is_causal), scale)
    return out.reshape((*shape[:-1], value.size(-1))[-rank:])


def _checked(query, key, value, attn_mask, dropout_p):
    for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if not isinstance(x, Tensor) and (name != "attn_mask" or x is not None):
            raise TypeError(f"attention: {name} must be a Tensor, got {type(x).__name__}")
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
    for name, x in (("key", key), ("value", value), ("attn_mask", attn_mask)):
        if x is not None and x.device != query.device:
            raise RuntimeError(f"attention: {name} is on {x.device}, query is on {query.device}")
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"attention: dropout_p is {dropout_p}, expected a probability")
    return query, key, value, attn_mask


def _broadcast(what, *shapes):
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
    return x.expand(*batch, *x.shape[-3:]).reshape(math.prod(batch), *x.shape[-3:])


def reference(query, key, value, attn_mask, dropout_p, is_causal, scale):
    group = query.size(1) // key.size(1)
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = query @ key.mT * scale
    if is_causal:
        scores = scores.masked_fill(~_causal(scores), -torch.inf)
    if attn_mask is not None:
        scores = scores + _additive(attn_mask, scores.dtype)
    if key.size(2) == 0:
        return scores @ value
    highest = scores.detach().amax(-1, keepdim=True)
    weights = (scores - highest.masked_fill(highest == -torch.inf, 0)).exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1, total)
    return F.dropout(weights, dropout_p) @ value


def _causal(scores):
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()


def _additive(attn_mask, dtype):
    if attn_mask.dtype is not torch.bool:
        return attn_mask.to(dtype)
    return torch.zeros((), dtype=dtype, device=attn_mask.device).where(attn_mask, -torch.inf)


def stock(query, key, value, attn_mask, dropout_p, is_causal, scale):
    """Call SDPA, which refuses a mask beside `is_causal`, and whose cuDNN misreads a float32 mask on halves."""
    if attn_mask is not None:
        if attn_mask.is_cuda and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(query.dtype)
        if is_causal:
            seen = torch.ones(query.size(2), key.size(2), dtype=torch.bool, device=query.device).tril()
            boolean = attn_mask.dtype is torch.bool
            attn_mask = attn_mask & seen if boolean else attn_mask.where(seen, -torch.inf)
            is_causal = False
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                                          enable_gqa=query.size(1) != key.size(1))


def samples(scale: str, dtype: torch.dtype, device: str):
    def qkv(batch, heads, kv_heads, queries, keys, dim, value_dim=None, gain=1.0):
        shapes = ((heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim or dim))
        return tuple((gain * torch.randn(batch, *shape, device=device)).to(dtype) for shape in shapes)

    def call(name, tensors, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        return Sample(name, (*tensors, attn_mask, dropout_p, is_causal, scale or tensors[0].size(-1) ** -0.5))

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
    yield call("outliers", qkv(1, 1, 1, 40, 40, 16, gain=8.0))
    yield from _masked_samples(call, qkv, dtype, device)
    yield call("no rows", qkv(0, 1, 1, 4, 4, 16))
    yield call("no queries", qkv(1, 1, 1, 0, 4, 16))
    yield call("no keys", qkv(1, 1, 1, 4, 0, 16))
    yield call("lengths before heads", tuple(t.transpose(1, 2) for t in qkv(1, 20, 20, 3, 3, 16)))
    yield call("transposed", tuple(t.mT for t in qkv(1, 2, 2, 16, 16, 30)))
    yield call("expanded keys", tuple(t.expand(3, -1, -1, -1) for t in qkv(1, 2, 2, 12, 12, 16)))
    yield call("dropout", qkv(1, 2, 2, 20, 20, 16), dropout_p=0.3)


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


def cost(query, key, value, attn_mask, dropout_p, is_causal, scale) -> tuple[int, int]:
    queries, keys = query.size(2), key.size(2)
    pairs = queries * keys
    if is_causal:
        pairs = sum(min(i + 1, keys) for i in range(queries))
    tensors = [query, key, value] + [attn_mask] * (attn_mask is not None)
    moved = sum(t.numel() * t.element_size() for t in tensors)
    moved += query.numel() // max(query.size(3), 1) * value.size(3) * query.element_size()
    return 2 * query.size(0) * query.size(1) * pairs * (query.size(3) + value.size(3)), moved


op = Op("attention", reference=reference, torch=stock, fast=("triton",), samples=samples, cost=cost)
