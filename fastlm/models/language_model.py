"""What the three language models share: one interface, the loss of a linear head, and sampling."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm.nn
from fastlm import ops

# Where a model takes its layers from. Both have the same parameters, so that a checkpoint fits either.
LAYERS = {"fastlm": fastlm.nn, "stock": torch.nn}


def namespace(layers: str):
    """Return `fastlm.nn` for "fastlm" and `torch.nn` for "stock"."""
    if layers not in LAYERS:
        raise ValueError(f"layers is {layers!r}, expected one of {', '.join(LAYERS)}")
    return LAYERS[layers]


class LanguageModel(torch.nn.Module):
    """Predict the next token of a sequence: P(w_{t+1} | w_1 … w_t).

    A subclass sets `config` (with `vocab_size` and `layers`) and defines `hidden` and `step`.
    """

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the hidden states `[B, T, H]` that the head turns into logits; that of t sees tokens up to t."""
        raise NotImplementedError

    def step(self, tokens: Tensor, state) -> tuple[Tensor, object]:
        """Return the logits `[B, V]` after `tokens` `[B, T]`, which follow those of `state` (None: the beginning)."""
        raise NotImplementedError

    def make_head(self, embedding: torch.nn.Embedding, tied: bool) -> None:
        """Add the layer softmax(W·h + b), W being the embedding where `tied`."""
        vocab_size, width = embedding.weight.shape
        self.head = None if tied else torch.nn.Linear(width, vocab_size, bias=False)
        self.head_bias = torch.nn.Parameter(torch.zeros(vocab_size))

    @property
    def head_weight(self) -> Tensor:
        """W of the head, `[V, H]`."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return `logits(tokens)`."""
        return self.logits(tokens)

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits `[B, T, V]` of the token after each of `tokens` `[B, T]`."""
        self.check(tokens)
        return self.linear(self.hidden(tokens), self.head_weight, self.head_bias)

    @property
    def linear(self):
        """The function of that name of the layers' library."""
        return F.linear if self.config.layers == "stock" else ops.linear

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy, in nats per token, of `targets` `[B, T]` given `tokens` `[B, T]`.

        Targets of -100 count nothing; any other that is no token raises IndexError (on the CPU).
        With fastlm's layers the logits of all tokens never exist at once.
        """
        self.check(tokens, targets)
        hidden, targets = self.hidden(tokens).flatten(0, 1), targets.flatten()
        if self.config.layers == "stock":
            return F.cross_entropy(F.linear(hidden, self.head_weight, self.head_bias), targets)
        return ops.linear_cross_entropy(hidden, self.head_weight, targets, linear_bias=self.head_bias)

    def generate(self, prompt: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Return `prompt` `[B, T]` with `max_new_tokens` sampled tokens behind it, `[B, T + max_new_tokens]`.

        Args:
            prompt: int64, T ≥ 1, on the model's device.
            temperature: divides the logits; 0 always takes the likeliest token.
            top_k: sample among the k likeliest tokens only.
            top_p: then among the fewest likeliest tokens whose probabilities sum to at least this.
            generator: where random numbers come from, on the model's device; None: torch's own.

        Raises:
            ValueError: one of these lies outside its range, or `prompt` holds a token that is none.
        """
        new = [token[:, None] for token in self.stream(prompt, max_new_tokens, temperature, top_k, top_p, generator)]
        return torch.cat([prompt, *new], 1)

    def stream(self, prompt: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
               top_p: float | None = None, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Yield the tokens `[B]` of `generate` one after the other."""
        self.check(prompt)
        if prompt.size(1) == 0:
            raise ValueError("generate: prompt is empty, expected at least one token")
        readable = prompt.device.type == "cpu" and prompt.numel() > 0
        if readable and not 0 <= prompt.min() <= prompt.max() < self.config.vocab_size:
            raise ValueError(f"generate: prompt has tokens {prompt.min()} to {prompt.max()}, "
                             f"expected 0 to {self.config.vocab_size - 1}")
        if max_new_tokens < 0:
            raise ValueError(f"generate: max_new_tokens is {max_new_tokens}, expected 0 or more")
        check_sampling(temperature, top_k, top_p)
        tokens, state = prompt, None
        for _ in range(max_new_tokens):
            # Each step enters and leaves eval mode, so that a consumer in between sees the model as it was.
            with evaluating(self):
                logits, state = self.step(tokens, state)
                token = sample(logits, temperature, top_k, top_p, generator)
            yield token
            tokens = token[:, None]

    def check(self, tokens: Tensor, targets: Tensor | None = None) -> None:
        """Raise ValueError unless `tokens` is an integer tensor `[B, T]` and `targets` one of its shape."""
        name = type(self).__name__
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{name}: tokens is {tokens.dtype}{list(tokens.shape)}, expected int64 [B, T]")
        if targets is not None and (targets.shape != tokens.shape or targets.dtype != torch.int64):
            raise ValueError(f"{name}: targets is {targets.dtype}{list(targets.shape)}, "
                             f"expected int64 {list(tokens.shape)}")


@contextlib.contextmanager
def evaluating(model: torch.nn.Module):
    """Run a block in eval mode without gradients, then give every submodule its own mode back."""
    trained = [module for module in model.modules() if module.training]
    for module in trained:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in trained:
            module.training = True


def check_config(model: str, config, expected: type) -> None:
    """Raise TypeError unless `config` is of the model's own class."""
    if not isinstance(config, expected):
        name = expected.__name__
        raise TypeError(f"{model}: config is {type(config).__name__}, expected {name}: {model}({name}(vocab_size))")


def check_sizes(model: str, **sizes: int) -> None:
    """Raise ValueError unless every size is a whole number of 1 or more."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{model}: {name} is {size!r}, expected a whole number, 1 or more")


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError where an argument of `sample` lies outside its range."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature is {temperature}, expected 0 or more")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"generate: top_k is {top_k!r}, expected a whole number, 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p is {top_p}, expected more than 0, at most 1")


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | None = None) -> Tensor:
    """Draw one token `[B]` from the logits `[B, V]` of each sequence; see `LanguageModel.generate`."""
    if temperature < 1e-30:  # 0, or what is near to it in float32
        return logits.argmax(-1)
    logits = logits.float()
    # The maximum goes first, or a small temperature would make it infinite.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is None and top_p is None:
        return torch.multinomial(scaled.softmax(-1), 1, generator=generator).squeeze(-1)
    if top_k is None:
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
    else:  # 0.06 ms of 50,000 tokens, which take 3.5 to sort
        scaled, order = scaled.topk(min(top_k, scaled.size(-1)))
    probabilities = scaled.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        # The likeliest token stays whatever the rounding of the sum.
        probabilities[:, 1:].masked_fill_(before[:, 1:] >= top_p, 0)
    rank = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, rank).squeeze(-1)
