"""The Transformer language model: causal self-attention and position-wise feed-forward layers.

Vaswani et al., "Attention Is All You Need" (2017), the decoder without cross-attention, with the normalisation
before each sub-layer and learned positions, as in Radford et al., "Language Models are Unsupervised Multitask
Learners" (2019).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm.models.language_model import LanguageModel, check_config, check_sizes, namespace
from fastlm.nn import KVCache
from fastlm.ops import scaled_dot_product_attention


@dataclass
class TransformerConfig:
    """Sizes of a TransformerLM. `max_seq_len` is how many tokens it can see at once."""

    vocab_size: int
    hidden_size: int = 256
    num_layers: int = 2
    num_heads: int = 4
    max_seq_len: int = 128
    dropout: float = 0.0
    tied: bool = True
    layers: str = "fastlm"


class TransformerLM(LanguageModel):
    """Predict the next token by attending to the tokens before it."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        check_config("TransformerLM", config, TransformerConfig)
        check_sizes("TransformerLM", vocab_size=config.vocab_size, hidden_size=config.hidden_size,
                    num_layers=config.num_layers, num_heads=config.num_heads, max_seq_len=config.max_seq_len)
        if config.hidden_size % config.num_heads:
            raise ValueError(f"TransformerLM: hidden_size is {config.hidden_size}, "
                             f"expected a multiple of num_heads, {config.num_heads}")
        self.config = config
        width = config.hidden_size
        self.embedding = torch.nn.Embedding(config.vocab_size, width)
        self.positions = torch.nn.Embedding(config.max_seq_len, width)
        for table in (self.embedding, self.positions):
            torch.nn.init.normal_(table.weight, std=0.02)
        self.dropout = torch.nn.Dropout(config.dropout)
        self.blocks = torch.nn.ModuleList(
            namespace(config.layers).TransformerEncoderLayer(
                width, config.num_heads, 4 * width, config.dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(config.num_layers))
        self.norm = torch.nn.LayerNorm(width)
        self.make_head(self.embedding, config.tied)

    def hidden(self, tokens: Tensor) -> Tensor:
        seq_len = tokens.size(1)
        if seq_len > self.config.max_seq_len:
            raise ValueError(f"TransformerLM: tokens has {seq_len} positions, "
                             f"expected at most max_seq_len, {self.config.max_seq_len}")
        positions = torch.arange(seq_len, device=tokens.device)
        future = torch.ones(seq_len, seq_len, dtype=torch.bool, device=tokens.device).triu(1)
        x = self.dropout(self.embedding(tokens) + self.positions(positions))
        for block in self.blocks:
            x = block(x, src_mask=future, is_causal=True)
        return self.norm(x)

    def step(self, tokens: Tensor, state) -> tuple[Tensor, object]:
        """Return the logits after the last `max_seq_len` tokens.

        The state is these tokens and a cache for each block, or None where they are computed again: once tokens have
        dropped out, when all others have other positions, or where a state is continued a second time, because its
        caches belong to the first continuation.
        """
        seen, caches = (tokens[:, :0], self._empty_caches(tokens.size(0))) if state is None else state
        if caches and caches[0].length != seen.size(1):
            caches = None
        seen = torch.cat([seen, tokens], 1)
        if caches is None or seen.size(1) > self.config.max_seq_len:
            seen, caches = seen[:, -self.config.max_seq_len:], None
            hidden = self.hidden(seen)[:, -1]
        else:
            hidden = self._continue(tokens, caches)[:, -1]
        return self.linear(hidden, self.head_weight, self.head_bias), (seen, caches)

    def _empty_caches(self, batch):
        weight, heads = self.embedding.weight, self.config.num_heads
        return [KVCache(batch, self.config.max_seq_len, heads, self.config.hidden_size // heads, device=weight.device,
                        dtype=weight.dtype) for _ in self.blocks]

    def _continue(self, tokens, caches):
        """Return the hidden states of `tokens`, which follow those in the caches, and add them there."""
        start = caches[0].length
        positions = torch.arange(start, start + tokens.size(1), device=tokens.device)
        x = self.embedding(tokens) + self.positions(positions)
        for block, cache in zip(self.blocks, caches, strict=True):
            attention = block.self_attn
            qkv = self.linear(block.norm1(x), attention.in_proj_weight, attention.in_proj_bias)
            q, k, v = qkv.unflatten(2, (3, self.config.num_heads, -1)).permute(2, 0, 3, 1, 4)
            k, v = cache.update(k.to(cache.key.dtype), v.to(cache.key.dtype))  # autocast may have lowered them
            attended = scaled_dot_product_attention(q, k, v, window_size=(-1, 0))
            attended, out = attended.transpose(1, 2).flatten(2), attention.out_proj
            linear = isinstance(out, torch.nn.Linear)  # else it was replaced, such as by a QuantizedLinear
            x = x + (self.linear(attended, out.weight, out.bias) if linear else out(attended))
            x = x + block.linear2(block.activation(block.linear1(block.norm2(x))))
        return self.norm(x)
