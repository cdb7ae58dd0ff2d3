"""SelfAttention for new code, and the cache of keys and values that it decodes with."""

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.autograd import autocasts
from fastlm.nn.linear import Linear


class KVCache:
    """Keys and values of the tokens so far, in memory that is taken once.

    Args:
        batch: sequences.
        max_len: the most tokens of a sequence.
        num_kv_heads, head_dim: heads of keys and values, and their size.
        value_dim: size of a value's head, `head_dim` by default.
        device, dtype: of the tensors.

    Attributes:
        key, value: `[batch, num_kv_heads, max_len, head_dim]` (`value_dim`), of which the first `length` tokens count.
        length: tokens so far.
    """

    def __init__(self, batch: int, max_len: int, num_kv_heads: int, head_dim: int, *, value_dim: int | None = None,
                 device=None, dtype: torch.dtype | None = None):
        shape = (batch, num_kv_heads, max_len)
        self.key = torch.zeros(*shape, head_dim, device=device, dtype=dtype)
        self.value = torch.zeros(*shape, head_dim if value_dim is None else value_dim, device=device, dtype=dtype)
        self.length = 0

    @property
    def max_len(self) -> int:
        """The most tokens that fit."""
        return self.key.size(2)

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values `[batch, num_kv_heads, T, ...]`; return all so far, views of the cache.

        Raises:
            TypeError: an argument is no tensor.
            ValueError: a shape does not fit, or T tokens more than `max_len` would be in the cache.
            RuntimeError: the dtype or device is another, or a gradient would be lost.
        """
        for name, new, kept in (("key", key, self.key), ("value", value, self.value)):
            if not isinstance(new, Tensor):
                raise TypeError(f"KVCache: {name} must be a Tensor, got {type(new).__name__}")
            if new.dim() != 4 or (*new.shape[:2], new.size(3)) != (*kept.shape[:2], kept.size(3)):
                raise ValueError(f"KVCache: {name} has shape {list(new.shape)}, expected "
                                 f"{[*kept.shape[:2], 'T', kept.size(3)]}")
            if new.dtype != kept.dtype or new.device != kept.device:
                raise RuntimeError(f"KVCache: {name} is {new.dtype} on {new.device}, the cache is {kept.dtype} on "
                                   f"{kept.device}")
            if torch.is_grad_enabled() and new.requires_grad:
                raise RuntimeError(f"KVCache: {name} requires a gradient, which a cache does not pass on; use no_grad")
        if key.size(2) != value.size(2):
            raise ValueError(f"KVCache: value has {value.size(2)} tokens, key has {key.size(2)}")
        start, end = self.length, self.length + key.size(2)
        if end > self.max_len:
            raise ValueError(f"KVCache: {end} tokens, expected at most max_len, {self.max_len}")
        self.key[:, :, start:end] = key
        self.value[:, :, start:end] = value
        self.length = end
        return self.key[:, :, :end], self.value[:, :, :end]

    def reset(self) -> None:
        """Forget all tokens."""
        self.length = 0

    def reorder(self, rows: Tensor) -> None:
        """Let row i of the batch continue what was row `rows[i]` (beam search); `rows` is `[batch]`, integers."""
        if not isinstance(rows, Tensor):
            raise TypeError(f"KVCache: rows must be a Tensor, got {type(rows).__name__}")
        if rows.shape != (self.key.size(0),) or rows.is_floating_point() or rows.dtype is torch.bool:
            raise ValueError(f"KVCache: rows is {rows.dtype}{list(rows.shape)}, expected integers [{self.key.size(0)}]")
        for kept in (self.key, self.value):
            kept[:, :, : self.length] = kept[:, :, : self.length].index_select(0, rows)


class SelfAttention(nn.Module):
    """Attend from each token of a sequence to it and those before it, with shared key heads, RoPE and a cache.

    Args:
        embed_dim: features of a token.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values, a divisor of `num_heads` (its default).
        rope: turn queries and keys by their positions (`ops.rotary_embedding`, halves).
        rope_base: of the angles' frequencies, rope_base^(-2i / head_dim).
        head_dim: size of a head, `embed_dim / num_heads` by default.
        bias: whether the two projections add one.
        dropout: of the attention weights, in training.
        is_causal: False lets every token attend to all.
        window: attend to at most so many tokens before the own one (with `is_causal`).
        softcap: bounds the scores.
        sinks: learn a logit for each head that takes attention and gives nothing.
        device, dtype: of the parameters.

    Attributes:
        qkv_proj, out_proj: `Linear` layers; rows of `qkv_proj` are those of queries, of keys, then of values.
    """

    def __init__(self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, rope: bool = False, *,
                 rope_base: float = 10000.0, head_dim: int | None = None, bias: bool = False, dropout: float = 0.0,
                 is_causal: bool = True, window: int | None = None, softcap: float | None = None, sinks: bool = False,
                 device=None, dtype: torch.dtype | None = None):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"SelfAttention: num_heads is {num_heads}, expected a multiple of num_kv_heads, "
                             f"{num_kv_heads}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"SelfAttention: embed_dim is {embed_dim}, expected a multiple of num_heads, {num_heads}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"SelfAttention: dropout is {dropout}, expected a probability")
        if window is not None and (window < 0 or not is_causal):
            raise ValueError(f"SelfAttention: window is {window}, expected 0 or more, with is_causal")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.rope, self.rope_base, self.dropout, self.is_causal = rope, rope_base, dropout, is_causal
        self.window, self.softcap = window, softcap
        if rope and self.head_dim % 2:
            raise ValueError(f"SelfAttention: head_dim is {self.head_dim}, expected an even one for rope")
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.qkv_proj = Linear(embed_dim, (num_heads + 2 * num_kv_heads) * self.head_dim, **options)
        self.out_proj = Linear(num_heads * self.head_dim, embed_dim, **options)
        self.sinks = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype)) if sinks else None

    def extra_repr(self) -> str:
        return (f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
                f"rope={self.rope}, is_causal={self.is_causal}")

    def make_cache(self, batch: int, max_len: int) -> KVCache:
        """Return an empty cache for this layer, of its weights' dtype and device."""
        weight = self.qkv_proj.weight
        return KVCache(batch, max_len, self.num_kv_heads, self.head_dim, device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor, cache: KVCache | None = None, *, attn_mask: Tensor | None = None,
                key_lengths: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Return a tensor of the shape of `x`.

        Args:
            x: `[B, S, embed_dim]`; with a cache the tokens behind those that it holds, to which they are added.
            cache: of this layer; without gradients.
            attn_mask, key_lengths, document_ids: as in `ops.scaled_dot_product_attention`, over all keys.
        """
        if x.dim() != 3 or x.size(2) != self.qkv_proj.in_features:
            raise ValueError(f"SelfAttention: x has shape {list(x.shape)}, expected [B, S, "
                             f"{self.qkv_proj.in_features}]")
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = self.qkv_proj(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2).split(heads, 1)
        if self.rope:
            cos, sin = self._angles(0 if cache is None else cache.length, x)
            q, k = ops.rotary_embedding(q, cos, sin), ops.rotary_embedding(k, cos, sin)
        if cache is not None:
            if autocasts(x.device.type):  # which lowers them here, but not the cache
                k, v = k.to(cache.key.dtype), v.to(cache.value.dtype)
            k, v = cache.update(k, v)
        window = (-1 if self.window is None else self.window, 0) if self.is_causal else (-1, -1)
        out = ops.scaled_dot_product_attention(
            q, k, v, attn_mask, self.dropout if self.training else 0.0, enable_gqa=self.num_heads != self.num_kv_heads,
            window_size=window, softcap=self.softcap, sinks=self.sinks, key_lengths=key_lengths,
            document_ids=document_ids)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _angles(self, start, x):
        """Return cosines and sines `[S, head_dim / 2]` of the positions from `start`."""
        pairs = torch.arange(0, self.head_dim, 2, device=x.device, dtype=torch.float32)
        positions = torch.arange(start, start + x.size(1), device=x.device, dtype=torch.float32)
        angles = positions[:, None] * self.rope_base ** (-pairs / self.head_dim)
        return angles.cos(), angles.sin()
