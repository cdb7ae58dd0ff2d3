"""Train a language model: AdamW, clipped gradients, a cosine schedule, and batches that depend on the step alone.

Step i draws its batch and its dropout masks from generators seeded by (seed, i). So the step number is the whole
position in the data and in the random numbers, and a run that goes on from a checkpoint is the run that was never
interrupted, bit for bit.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastlm.dispatch import Calls, explain
from fastlm.training import checkpoint
from fastlm.training.checkpoint import CheckpointError, Run
from fastlm.training.config import RunConfig, build_model, changed, check_device, replace
from fastlm.training.data import Corpus, Data, build_tokenizer, load_corpus, tokenize


class Trainer:
    """A model, its optimizer and the number of steps done.

    >>> config = configure("lstm")
    >>> trainer = Trainer(config, load_data(config))
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

    def check(self) -> None:
        """Raise FloatingPointError where training has diverged: a loss or a weight is infinite or NaN.

        It waits for the device, so it is for steps whose loss is read or whose state is saved.
        """
        wrong = torch.stack(self.losses).isfinite().logical_not().nonzero()
        if len(wrong):
            found = f"the loss of step {wrong[0].item() + 1} is {self.losses[wrong[0]].item()}"
        elif all(parameter.isfinite().all() for parameter in self.model.parameters()):
            return
        else:
            found = f"a weight is not finite after step {self.done}"
        raise FloatingPointError(
            f"train: {found}: training diverged. What was saved before stays as it was. Start anew with a smaller "
            f"learning rate (lr is {self.config.lr:g}), or clip gradients at a smaller norm (grad_clip is "
            f"{self.config.grad_clip:g})")

    def state(self) -> dict[str, Tensor]:
        """Return all that changes during a run: weights, optimizer and losses, whose number is the position."""
        state = {"losses": torch.stack(self.losses) if self.losses else torch.empty(0)}
        state |= {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, tensor in self.optimizer.state[parameter].items():
                state[f"optimizer.{name}.{key}"] = tensor
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned, from a trainer of the same settings."""
        weights = {name[6:]: tensor for name, tensor in state.items() if name.startswith("model.")}
        checkpoint.expect(weights, self.model.state_dict(), checkpoint.TRAINING)
        self.model.load_state_dict(weights)
        for name, parameter in self.model.named_parameters():
            prefix = f"optimizer.{name}."
            self.optimizer.state[parameter] = {key[len(prefix):]: tensor.to(self.device) for key, tensor
                                               in state.items() if key.startswith(prefix)}
        self.losses = list(state["losses"].to(self.device).unbind())


def load_data(config: RunConfig) -> Data:
    """Load a run's corpus and build its vocabulary on the training split."""
    return prepare(load_corpus(config.data), config)


def prepare(corpus: Corpus, config: RunConfig) -> Data:
    """Build a run's vocabulary on the training split of `corpus` and encode all three."""
    return tokenize(corpus, build_tokenizer(config.tokenizer, corpus.train, config.vocab_size), config.seq_len)


def begin(folder: str | Path, config: RunConfig) -> tuple[Run, Data, Trainer]:
    """Start a run in a folder.

    Raises:
        CheckpointError: the folder holds a run already.
        ValueError, OSError: the data cannot be read, or is too short.
    """
    corpus = load_corpus(config.data)
    data = prepare(corpus, config)
    trainer = Trainer(config, data)
    return checkpoint.start(folder, config, data.tokenizer, corpus.fingerprint), data, trainer


def resume(folder: str | Path, device: str | None = None, layers: str | None = None,
           steps: int | None = None, **given) -> tuple[Run, Data, Trainer]:
    """Go on with the run in a folder, on its device, with its layers and for its steps, or others.

    Other `steps` are kept, and the learning rate follows their schedule from here on.

    Raises:
        CheckpointError: there is no run, it is damaged, its text has changed, or a setting given is not the run's.
    """
    run = checkpoint.read_run(folder)
    if difference := changed(run.config, **given):
        raise CheckpointError(f"resume: {difference}: leave it out, or start a new run in another folder (--out)")
    run = run._replace(config=replace(run.config, steps=steps))
    config = replace(run.config, device=device, layers=layers)
    check_device(config.device)
    corpus = load_corpus(config.data)
    if corpus.fingerprint != run.corpus:
        raise CheckpointError(f"resume: the text of {config.data} is not the one this run began with")
    data = tokenize(corpus, run.tokenizer, config.seq_len)
    trainer = Trainer(config, data)
    state = checkpoint.read_state(run)
    if state is not None:
        trainer.restore(state)
    if steps is not None:
        checkpoint.write_config(run)
    return run, data, trainer


def train(run: Run, trainer: Trainer, on_step: Callable[[Trainer], None] = lambda trainer: None,
          save_seconds: float = 30.0) -> int | None:
    """Train to the end; save every `save_seconds`, at the end and when interrupted.

    A run that is complete already is saved again: its model may be damaged, missing or older than its last state.
    Ctrl-C and SIGTERM let the step that runs finish first; a second Ctrl-C stops at once, and what was saved last
    stays whole. A second SIGTERM changes nothing: timeout(1) sends two.

    Returns:
        None where the run is complete, else the number of the signal that interrupted it.

    Raises:
        FloatingPointError: it diverged, which is noticed before anything is saved.
    """
    def save():
        trainer.check()
        checkpoint.save(run, trainer.state())

    saved_at, saved_step = time.monotonic(), 0
    with interruptions() as caught:
        while trainer.done < trainer.steps and not caught:
            trainer.step()
            on_step(trainer)
            if time.monotonic() - saved_at >= save_seconds:
                save()
                saved_at, saved_step = time.monotonic(), trainer.done
        if saved_step < trainer.done:
            save()
    return caught[0] if trainer.done < trainer.steps else None


@contextlib.contextmanager
def interruptions():
    """Yield a list to which SIGINT and SIGTERM add their numbers; a second SIGINT raises KeyboardInterrupt."""
    caught: list[int] = []

    def handle(number, frame):
        caught.append(number)
        if caught.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may handle signals
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Return the rate of a step: up to `peak` in the first tenth (at most 100 steps), then a cosine to a tenth."""
    warmup = min(100, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def _mix(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step + 1) % 2**63
