"""The bag of words: P(w) = (C(w) + α) / (ΣC + αV), whatever came before.

C counts the tokens seen. A sequence is a draw from the multinomial distribution P, and its loss the cross-entropy
-Σ log P(w) / N. The baseline that any model which reads its context must beat.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm.models.language_model import LanguageModel, check_config, check_sizes, namespace
from fastlm.ops.cross_entropy import check_range

IGNORED = -100  # the target that the other models' loss does not count either


@dataclass
class UnigramConfig:
    """Sizes of a UnigramLM. `smoothing` is α; `layers` is there for the interface: it has no layers to choose."""

    vocab_size: int
    smoothing: float = 0.1
    layers: str = "fastlm"


class UnigramLM(LanguageModel):
    """Predict each token by its frequency alone. `count` trains it; it has no gradient.

    Raises:
        ValueError: vocab_size or smoothing is out of range.
    """

    def __init__(self, config: UnigramConfig):
        super().__init__()
        check_config("UnigramLM", config, UnigramConfig)
        namespace(config.layers)
        check_sizes("UnigramLM", vocab_size=config.vocab_size)
        if not 0 <= config.smoothing < float("inf"):
            raise ValueError(f"UnigramLM: smoothing is {config.smoothing}, expected 0 or more")
        self.config = config
        self.register_buffer("counts", torch.zeros(config.vocab_size, dtype=torch.int64))

    def count(self, tokens: Tensor) -> None:
        """Add the tokens of a tensor of any shape to C.

        Raises:
            ValueError: a token lies outside the vocabulary.
        """
        if (tokens < 0).any():
            raise ValueError(f"UnigramLM: tokens has {tokens.min()}, expected 0 to {self.config.vocab_size - 1}")
        found = torch.bincount(tokens.flatten(), minlength=self.config.vocab_size)
        if len(found) > self.config.vocab_size:
            raise ValueError(f"UnigramLM: tokens has {len(found) - 1}, expected 0 to {self.config.vocab_size - 1}")
        self.counts += found

    def log_probabilities(self) -> Tensor:
        """Return log P, `[V]`, float32."""
        mass = self.counts + self.config.smoothing
        return mass.log() - mass.sum().log()

    def logits(self, tokens: Tensor) -> Tensor:
        """Return log P for every position of `tokens` `[B, T]`, `[B, T, V]`: a view without memory of its own."""
        self.check(tokens)
        return self.log_probabilities().expand(*tokens.shape, -1)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean of -log P(target) over the targets that are not -100, in nats per token."""
        self.check(tokens, targets)
        check_range("UnigramLM: targets", targets, self.config.vocab_size, IGNORED)
        return -self.log_probabilities()[targets[targets != IGNORED]].mean()

    def step(self, tokens: Tensor, state) -> tuple[Tensor, None]:
        return self.log_probabilities().expand(tokens.size(0), -1), None
