"""Measure a language model on text: cross-entropy in nats per token, of which perplexity is the exponential."""

import math

import torch
from torch import Tensor

from fastlm.models import LanguageModel
from fastlm.models.language_model import evaluating


def evaluate(model: LanguageModel, tokens: Tensor, seq_len: int, batch_size: int = 32) -> float:
    """Return the mean of -log P of every token of `tokens` `[N]` but the first, in nats.

    The text is cut into windows of `seq_len` that do not overlap, and the model sees what precedes a token in its
    window: the same context for every model. Perplexities compare only on the same tokens.

    Raises:
        ValueError: fewer than two tokens, or tokens that are not in the vocabulary.
    """
    if len(tokens) < 2:
        raise ValueError(f"evaluate: the text has {len(tokens)} tokens, expected at least 2")
    if tokens.min() < 0 or tokens.max() >= model.config.vocab_size:
        raise ValueError(f"evaluate: the text has tokens {tokens.min()} to {tokens.max()}, the model's vocabulary "
                         f"{model.config.vocab_size}")
    device = next(iter(model.state_dict().values())).device
    total = 0.0
    with evaluating(model):
        for inputs, targets in windows(tokens, seq_len, batch_size):
            loss = model.loss(inputs.to(device), targets.to(device))
            total += loss.double().item() * targets.numel()
    return total / (len(tokens) - 1)


def perplexity(nats: float) -> float:
    """Return e^nats, infinite where that overflows."""
    return math.exp(nats) if nats < 700 else math.inf


def windows(tokens: Tensor, seq_len: int, batch_size: int):
    """Yield (inputs, targets), `[B, T]` each, so that every token of `tokens` `[N]` but the first is a target once."""
    count = len(tokens) - 1
    whole = count // seq_len * seq_len
    inputs, targets = tokens[:-1], tokens[1:]
    if whole:
        batches = (x[:whole].view(-1, seq_len).split(batch_size) for x in (inputs, targets))
        yield from zip(*batches, strict=True)
    if whole < count:
        yield inputs[None, whole:], targets[None, whole:]


def unknown_share(tokens: Tensor, kind: str) -> float:
    """Return which share of `tokens` is `<unk>`; byte-pair encodings have none."""
    return 0.0 if kind == "bpe" else torch.eq(tokens, 0).double().mean().item()
