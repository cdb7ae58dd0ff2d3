"""TransformerEncoderLayer and TransformerDecoderLayer: torch.nn's, with our attention inside."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import dispatch
from fastlm.nn.attention import ATTENTION, FUSED, MultiheadAttention
from fastlm.nn.linear import Linear
from fastlm.nn.norm import LayerNorm

# What stock's fused layer may read weights of: a part that was replaced (quantized, adapted) has a forward of its own.
PLAIN = nn.Linear, Linear, nn.LayerNorm, LayerNorm


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Apply self-attention and a feed-forward network, with the arguments of `torch.nn.TransformerEncoderLayer`.

    It takes its place in a `torch.nn.TransformerEncoder`, whose nested tensors run stock's fused layer.
    """

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
                 activation: str | Callable[[Tensor], Tensor] = F.relu, layer_norm_eps: float = 1e-5,
                 batch_first: bool = False, norm_first: bool = False, bias: bool = True, device=None, dtype=None):
        super().__init__(d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first,
                         bias, device, dtype)
        # Ours add no state: what stock has drawn from the generator becomes ours as it is.
        self.self_attn.__class__ = MultiheadAttention
        self.linear1.__class__ = self.linear2.__class__ = Linear

    def forward(self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        """Return a tensor of the shape of `src`.

        Args:
            src: `[L, N, E]`, `[N, L, E]` with `batch_first`, or `[L, E]`.
            src_mask, src_key_padding_mask, is_causal: as `attn_mask`, `key_padding_mask` and `is_causal` of
                `MultiheadAttention`.
        """
        if src.is_nested:
            dispatch.runs_stock(ATTENTION, "nested tensors")
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if src_mask is None and src_key_padding_mask is None and not is_causal and self._fuses(src):
            dispatch.note("transformer_encoder_layer", "torch", FUSED)
            attention, norms = self.self_attn, (self.norm1, self.norm2)
            return torch._transformer_encoder_layer_fwd(
                src, attention.embed_dim, attention.num_heads, attention.in_proj_weight, attention.in_proj_bias,
                attention.out_proj.weight, attention.out_proj.bias, self.activation_relu_or_gelu == 2, self.norm_first,
                self.norm1.eps, *(x for norm in norms for x in (norm.weight, norm.bias)), self.linear1.weight,
                self.linear1.bias, self.linear2.weight, self.linear2.bias)
        masks = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), *masks)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, *masks))
        return self.norm2(x + self._ff_block(x))

    def _fuses(self, src):
        """Tell whether stock's fused layer takes `src` and is faster; stock calls no hooks there, so none may wait."""
        frozen = not (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()))
        return (frozen and not self.training and self.self_attn.fuses(src) and bool(self.activation_relu_or_gelu)
                and all(type(m) in PLAIN for m in (self.linear1, self.linear2, self.norm1, self.norm2))
                and self.norm1.eps == self.norm2.eps
                and not any(m._forward_hooks or m._forward_pre_hooks for m in self.modules()))


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """Apply self-attention, attention to a memory and a feed-forward network, with the arguments of
    `torch.nn.TransformerDecoderLayer`.

    `forward` is torch.nn's; it takes its place in a `torch.nn.TransformerDecoder`.
    """

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
                 activation: str | Callable[[Tensor], Tensor] = F.relu, layer_norm_eps: float = 1e-5,
                 batch_first: bool = False, norm_first: bool = False, bias: bool = True, device=None, dtype=None):
        super().__init__(d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first,
                         bias, device, dtype)
        # As in TransformerEncoderLayer.
        self.self_attn.__class__ = self.multihead_attn.__class__ = MultiheadAttention
        self.linear1.__class__ = self.linear2.__class__ = Linear
