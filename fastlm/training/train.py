"""Train a language model: AdamW, clipped gradients, a cosine schedule, and batches that depend on the step alone.

Step i draws its batch and its dropout masks from generators seeded by (seed, i). So the step number is the whole
position in the data and in the random numbers, and a run that goes on from a checkpoint is the run that was never
interrupted, bit for bit.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastlm.dispatch import Calls, explain
from fastlm.training.config import RunConfig, build_model
from fastlm.training.data import Data


class Trainer:
    """A model, its optimizer and the number of steps done.

    >>> data = tokenize(corpus := load_corpus("python-docs"), build_tokenizer("word", corpus.train, 8192), 64)
    >>> trainer = Trainer(configure("lstm"), data)
    >>> trainer.step().item()          # the loss of the first step, in nats per token

    Attributes:
        model, optimizer: the unigram model has no gradient, and None for an optimizer.
        steps: how many a whole run has.
        losses: of the steps done, scalars on the model's device.
    """

    def __init__(self, config: RunConfig, data: Data):
        self.config, self.tokens = config, data.train
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)
        self.model = build_model(config, len(data.tokenizer)).to(self.device)
        chunk = config.batch_size * config.seq_len
        self.one_pass = math.ceil(len(self.tokens) / chunk)
        self.steps = config.steps or self.one_pass
        self.optimizer = self._optimizer()
        self.losses: list[Tensor] = []

    def _optimizer(self):
        parameters = list(self.model.parameters())
        if not parameters:
            return None
        groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.config.weight_decay},
                  {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]
        fused = self.device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, lr=self.config.lr, betas=(0.9, 0.98), fused=fused)

    @property
    def done(self) -> int:
        """Return the number of steps done."""
        return len(self.losses)

    def step(self) -> Tensor:
        """Do one training step; return its loss, a scalar without gradient."""
        step = self.done
        torch.manual_seed(_mix(self.config.seed, step))
        tokens, targets = self.batch(step)
        self.model.train()
        if self.optimizer is None:
            loss = self.model.loss(tokens, targets)
            self.model.count(targets)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config.lr, step, self.steps)
            loss = self._backward(tokens, targets)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())
        return self.losses[-1]

    def _backward(self, tokens, targets):
        low = self.config.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            loss = self.model.loss(tokens, targets)
        if loss.requires_grad:
            loss.backward()
        return loss

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets `[B, T]` of a step: windows at random places of the training text.

        The unigram model reads it in order instead, so that one pass counts every token exactly once.
        """
        batch_size, seq_len = self.config.batch_size, self.config.seq_len
        if self.optimizer is None:
            chunk = self.tokens.split(batch_size * seq_len)[step % self.one_pass][None].to(self.device)
            return chunk, chunk
        generator = torch.Generator().manual_seed(_mix(self.config.seed, step))
        starts = torch.randint(len(self.tokens) - seq_len, (batch_size, 1), generator=generator)
        windows = self.tokens[starts + torch.arange(seq_len + 1)].to(self.device)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def explain(self) -> Calls:
        """Tell which implementations a step runs: forward and backward of the next one, leaving no trace."""
        tokens, targets = self.batch(self.done)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            calls = explain(self._backward, tokens, targets)
        self.model.zero_grad(set_to_none=True)
        return calls

    def state(self) -> dict[str, Tensor]:
        """Return all that changes during a run: weights, optimizer and losses, whose number is the position."""
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, tensor in self.optimizer.state[parameter].items():
                state[f"optimizer.{name}.{key}"] = tensor
        return state | {"losses": torch.stack(self.losses) if self.losses else torch.empty(0)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned, from a trainer of the same settings."""
        weights = {name[6:]: tensor for name, tensor in state.items() if name.startswith("model.")}
        self.model.load_state_dict(weights)
        for name, parameter in self.model.named_parameters():
            prefix = f"optimizer.{name}."
            self.optimizer.state[parameter] = {key[len(prefix):]: tensor.to(self.device) for key, tensor
                                               in state.items() if key.startswith(prefix)}
        self.losses = list(state["losses"].to(self.device).unbind())


def losses(config: RunConfig, data: Data, steps: int) -> list[float]:
    """Train a fresh model for `steps` steps and return the loss of each: what benchmarks compare.

    The learning rate follows the schedule of `config.steps`, so a short run is the beginning of the long one.
    """
    trainer = Trainer(config, data)
    return [trainer.step().item() for _ in range(steps)]


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Return the rate of a step: up to `peak` in the first tenth (at most 100 steps), then a cosine to a tenth."""
    warmup = min(100, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def _mix(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**63
