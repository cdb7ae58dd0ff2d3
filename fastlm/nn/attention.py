"""MultiheadAttention: torch.nn's, with every dense call going through fastlm's ops.

In eval mode without gradients, stock runs `torch._native_multi_head_attention` instead (and in its encoder layer
`torch._transformer_encoder_layer_fwd`), a fused function that builds the whole `[B, H, L, S]` score matrix. On the CPU
it runs here too where that matrix is small, or is asked for as the weights, and nothing is masked; `fastlm.explain`
says so. Elsewhere such a call takes the same road as training. Nested tensors always run stock's fused functions, which
alone know them, and `explain` lists no call for them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import dispatch, ops
from fastlm.autograd import autocasts, plain, transformed
from fastlm.ops.attention import op as ATTENTION
from fastlm.ops.linear import op as LINEAR

LEAST_SCORES = 1 << 21  # below, stock's fused functions are faster: benchmarks/LOG.md 2026-11-24
FUSED = {"attention": "stock's fused function is faster: benchmarks/LOG.md 2026-11-24"}


class MultiheadAttention(nn.MultiheadAttention):
    """Attend from queries to keys and values in several heads, with the arguments of `torch.nn.MultiheadAttention`."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
                need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return the attention output and, where `need_weights`, the weights.

        Args:
            query: `[L, N, E]`, `[N, L, E]` with `batch_first`, or `[L, E]`; `key` and `value` alike with length S
                and `kdim` and `vdim` features.
            key_padding_mask: `[N, S]` (`[S]`): True bars a key, floats are added to the scores.
            need_weights: also return the weights, `[N, L, S]` or, not averaged, `[N, H, L, S]`. Ask for them only
                if you need them: without, scaled_dot_product_attention does the work.
            attn_mask: `[L, S]` or `[N * H, L, S]`: True bars a key from a query, floats are added.
            is_causal: a hint that `attn_mask`, which must be given, is the causal mask.

        Raises:
            AssertionError: number of dimensions, features or dtype of an argument do not fit, or the shape of
                `key_padding_mask`.
            RuntimeError: `attn_mask` or a batch size does not fit, or `is_causal` comes without `attn_mask`.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            dispatch.runs_stock(ATTENTION, "nested tensors")
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask,
                                   average_attn_weights, is_causal)
        if is_causal and attn_mask is None:
            raise RuntimeError("MultiheadAttention: is_causal is a hint about attn_mask, which is missing")
        if attn_mask is None and key_padding_mask is None and query is key and key is value and self.fuses(
                query, need_weights):
            dispatch.note("multihead_attention", "torch", FUSED)
            return torch._native_multi_head_attention(
                query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias,
                self.out_proj.weight, self.out_proj.bias, None, need_weights, average_attn_weights)
        batched = self._check(query, key, value)
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        # Causal attention needs no mask in memory, unless another one joins it or the weights are asked for.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        q, k, v = (self._heads(x, batched) for x in self._project(query, key, value))
        mask = self._merge_masks(None if is_causal else attn_mask, key_padding_mask, q, k)
        k, v, mask = self._extend(k, v, mask)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            attended, weights = _attend_with_weights(q, k, v, mask, dropout)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            allowed = ~mask if mask is not None and mask.dtype is torch.bool else mask
            attended, weights = ops.scaled_dot_product_attention(q, k, v, allowed, dropout, is_causal), None
        if self.batch_first and batched and not self.training:
            return self.project_out(attended.transpose(1, 2).flatten(2)), weights
        # In memory [L, N, E] as in stock, whatever batch_first says: a dropout that follows draws the same mask.
        output = self.project_out(attended.permute(2, 0, 1, 3).flatten(2))
        if not batched:
            return output.squeeze(1), weights
        return output.transpose(0, 1) if self.batch_first else output, weights

    def project_out(self, x: Tensor) -> Tensor:
        """Apply `out_proj`: as torch.nn does, a Linear's weight alone, whatever its forward; anything else as it is."""
        out = self.out_proj
        return ops.linear(x, out.weight, out.bias) if isinstance(out, nn.Linear) else out(x)

    def fuses(self, x: Tensor, need_weights: bool = False) -> bool:
        """Tell whether stock's fused function takes self-attention over `x` without masks, and is faster.

        These are the conditions under which stock calls it; `fastlm.backend` asks for an implementation of attention.
        """
        if self.training or x.dim() != 3 or x.device.type != "cpu" or torch.compiler.is_compiling() or not (
                self.batch_first and torch.backends.mha.get_fastpath_enabled() and dispatch.is_default()):
            return False
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is None or bias is None or self.bias_k is not None or self.add_zero_attn or self.num_heads % 2 or (
                not isinstance(self.out_proj, nn.Linear)):
            return False
        if x.size(2) != self.embed_dim or x.dtype != weight.dtype or autocasts("cpu") or transformed() or not (
                plain((x, weight, bias))):
            return False
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters())):
            return False
        few = need_weights or x.size(0) * self.num_heads * x.size(1) ** 2 < LEAST_SCORES
        product = LINEAR.implementations["native"]  # where that is the faster one, so it is beside what is fused
        return few and bool(product.cannot(x, weight, bias) or product.loses(x, weight, bias))

    def _check(self, query, key, value) -> bool:
        """Raise where the inputs do not fit; return whether they are batched."""
        rank = query.dim()
        if rank not in (2, 3) or key.dim() != rank or value.dim() != rank:
            raise AssertionError("MultiheadAttention: query, key and value must all be 2-D or all be 3-D, got "
                                 f"{query.dim()}-D, {key.dim()}-D and {value.dim()}-D")
        widths = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        for name, x, width in widths:
            if x.size(-1) != width:
                raise AssertionError(f"MultiheadAttention: {name} has {x.size(-1)} features, expected {width}")
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(f"MultiheadAttention: key has shape {list(key.shape)}, value has {list(value.shape)}")
        batch_dim = 0 if self.batch_first else 1
        if rank == 3 and key.size(batch_dim) != query.size(batch_dim):
            raise RuntimeError(f"MultiheadAttention: key has batch size {key.size(batch_dim)}, query has "
                               f"{query.size(batch_dim)}")
        return rank == 3

    def _project(self, query, key, value):
        bias, packed = self.in_proj_bias, self.in_proj_weight
        if packed is not None and query is key and key is value:
            return ops.linear(query, packed, bias).chunk(3, -1)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if packed is None else packed.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return [ops.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """Bring a projection into the shape `[N, H, L, D]`."""
        x = x if batched else x.unsqueeze(0)
        x = x.view(*x.shape[:2], self.num_heads, self.head_dim)
        return x.permute(0, 2, 1, 3) if self.batch_first or not batched else x.permute(1, 2, 0, 3)

    def _merge_masks(self, attn_mask, key_padding_mask, q, k) -> Tensor | None:
        """Join both masks into one that broadcasts to `[N, H, L, S]`: boolean (True = barred), or to be added."""
        (batch, heads, query_len, _), key_len = q.shape, k.size(2)
        shapes = {"attn_mask": ((query_len, key_len), (batch * heads, query_len, key_len)),
                  "key_padding_mask": ((batch, key_len),)}
        given = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        given = {name: mask for name, mask in given.items() if mask is not None}
        for name, mask in given.items():
            if mask.dtype is not torch.bool and not mask.is_floating_point():
                raise AssertionError(f"MultiheadAttention: {name} must be boolean or floating point, got {mask.dtype}")
            if not any(mask.shape == shape for shape in shapes[name]):  # `in` does not know the compiler's symbols
                expected = " or ".join(str(list(shape)) for shape in shapes[name])
                # torch.nn's types: a mask of the right rank and the wrong size is a RuntimeError, but for padding.
                error = RuntimeError if name == "attn_mask" and mask.dim() in (2, 3) else AssertionError
                raise error(f"MultiheadAttention: {name} has shape {list(mask.shape)}, expected {expected}")
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, heads)))
        if key_padding_mask is not None:
            masks.append(key_padding_mask[:, None, None])
        if any(mask.is_floating_point() for mask in masks):
            masks = [mask if mask.is_floating_point() else _additive(mask, q.dtype) for mask in masks]
            return masks[0] if len(masks) == 1 else masks[0] + masks[1]
        return masks[0] | masks[-1] if masks else None

    def _extend(self, k, v, mask):
        """Append the keys and values of `add_bias_kv` and `add_zero_attn`, which no mask bars."""
        if self.bias_k is not None:
            bias_k, bias_v = (b.to(k.dtype).view(1, self.num_heads, 1, self.head_dim).expand(k.size(0), -1, -1, -1)
                              for b in (self.bias_k, self.bias_v))
            k, v = torch.cat([k, bias_k], 2), torch.cat([v, bias_v], 2)
        if self.add_zero_attn:
            zeros = k.new_zeros(k.size(0), self.num_heads, 1, self.head_dim)
            k, v = torch.cat([k, zeros], 2), torch.cat([v, zeros], 2)
        if mask is not None and mask.size(-1) != k.size(2):
            mask = F.pad(mask, (0, k.size(2) - mask.size(-1)))
        return k, v, mask


def _attend_with_weights(q, k, v, mask, dropout):
    """Return the attended values `[N, H, L, D]` and the weights `[N, H, L, S]` that dropout left."""
    scores = q * math.sqrt(1 / q.size(-1)) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(mask, -math.inf) if mask.dtype is torch.bool else scores + mask.to(scores.dtype)
    weights = F.dropout(ops.softmax(scores, -1), dropout)
    return weights @ v, weights


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
