"""TransformerEncoderLayer and TransformerDecoderLayer: torch.nn's, with our attention inside."""

from torch import Tensor, nn

from fastlm.nn.attention import MultiheadAttention


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Apply self-attention and a feed-forward network, with the arguments of `torch.nn.TransformerEncoderLayer`.

    It takes its place in a `torch.nn.TransformerEncoder`, whose nested tensors run stock's fused layer.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Ours adds no state: the module that stock has drawn from the generator becomes ours as it is.
        self.self_attn.__class__ = MultiheadAttention

    def forward(self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        """Return a tensor of the shape of `src`.

        Args:
            src: `[L, N, E]`, `[N, L, E]` with `batch_first`, or `[L, E]`.
            src_mask, src_key_padding_mask, is_causal: as `attn_mask`, `key_padding_mask` and `is_causal` of
                `MultiheadAttention`.
        """
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        masks = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), *masks)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, *masks))
        return self.norm2(x + self._ff_block(x))


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """Apply self-attention, attention to a memory and a feed-forward network, with the arguments of
    `torch.nn.TransformerDecoderLayer`.

    `forward` is torch.nn's; it takes its place in a `torch.nn.TransformerDecoder`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # As in TransformerEncoderLayer.
        self.self_attn.__class__ = self.multihead_attn.__class__ = MultiheadAttention
