"""What `fastlm train`, `eval` and `generate` do, and what they show on a terminal or in a log file."""

import itertools
import math
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastlm.training import checkpoint
from fastlm.training.config import configure, data_name
from fastlm.training.data import BUILT_IN, Data, load_corpus, read_text
from fastlm.training.evaluate import evaluate, perplexity, unknown_share
from fastlm.training.generate import continue_text
from fastlm.training.train import Trainer, begin, resume
from fastlm.training.train import train as train_run

REPORTS = 10  # how often a run reports validation perplexity


class Display:
    """Show a run's progress: a bar on a terminal, and on any output ten lines with the validation perplexity."""

    def __init__(self, console: Console, trainer: Trainer, data: Data):
        self.console, self.data, self.first = console, data, trainer.done
        self.every = max(1, trainer.steps // REPORTS)
        self.progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"),
            TextColumn("ETA"), TimeRemainingColumn(), console=console, transient=True,
            disable=not console.is_terminal)
        self.task = self.progress.add_task("train", total=trainer.steps, completed=trainer.done, figures="")
        self.seconds, self.since = 0.0, time.monotonic()

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *exc):
        self.progress.stop()

    def __call__(self, trainer: Trainer) -> None:
        """Show the step just done."""
        config = trainer.config
        speed = (trainer.done - self.first) * config.batch_size * config.seq_len / self._elapsed()
        report = trainer.done % self.every == 0 or trainer.done == trainer.steps
        # On a GPU, to read a loss is to wait for it: not more than a few times a second.
        shown = self.console.is_terminal and time.monotonic() - self.since > 0.2
        if not report and not shown:
            return
        self.seconds = self._elapsed()
        loss = trainer.losses[-1].item()
        if not math.isfinite(loss):
            trainer.check()  # which raises, and names the first such step
        figures = f"loss {loss:.3f}  perplexity {perplexity(loss):.1f}  {speed:,.0f} tokens/s"
        self.progress.update(self.task, completed=trainer.done, figures=figures)
        if report:
            nats = evaluate(trainer.model, self.data.validation, config.seq_len, config.batch_size)
            left = (trainer.steps - trainer.done) * self.seconds / (trainer.done - self.first)
            self.console.print(f"step {trainer.done}/{trainer.steps}  {figures}  ETA {_clock(left)}  "
                               f"validation perplexity {perplexity(nats):.1f}", soft_wrap=True)
        self.since = time.monotonic()

    def _elapsed(self) -> float:
        """Return the seconds spent training: the time of validation does not count."""
        return self.seconds + time.monotonic() - self.since


def train(console: Console, out: Path | None, go_on: bool, given: dict) -> int | None:
    """Start a run, or go on with one, and report its test perplexity; return the signal that interrupted it, if any.

    Args:
        out: the run's folder; None: a new one in runs/.
        go_on: go on with the run in `out`.
        given: settings of `RunConfig`, None where the default (or the run's own) applies.
    """
    if go_on and out is None:
        raise ValueError("train: --resume needs --out, the folder of the run to go on with")
    if go_on:
        run, data, trainer = resume(out, **given)
    else:
        config = configure(given.pop("model") or "lstm", **given)
        run, data, trainer = begin(out or new_folder(config.model), config)
    _introduce(console, run.folder, data, trainer)
    with Display(console, trainer, data) as display:
        interrupted = train_run(run, trainer, display)
    if interrupted:
        console.print(f"Interrupted after step {trainer.done} of {trainer.steps}; saved. To go on:\n"
                      f"  fastlm train --resume --out {run.folder}", soft_wrap=True)
        return interrupted
    nats = evaluate(trainer.model, data.test, trainer.config.seq_len, trainer.config.batch_size)
    console.print(f"[bold]test perplexity {perplexity(nats):.1f}[/] ({nats:.4f} nats a token, {len(data.test) - 1:,} "
                  f"{trainer.config.tokenizer} tokens); saved in {run.folder}", soft_wrap=True)
    return None


def _introduce(console, folder, data, trainer):
    config = trainer.config
    parameters = sum(p.numel() for p in trainer.model.parameters())
    splits = " / ".join(f"{len(split):,}" for split in data[1:])
    console.print(f"[bold]{config.model}[/] on {config.data}: {splits} tokens to train / validate / test, vocabulary "
                  f"of {len(data.tokenizer):,}", soft_wrap=True)
    console.print(f"{parameters:,} parameters, {config.device}, {config.dtype}, {config.layers} layers; "
                  f"run in {folder}", soft_wrap=True)
    if trainer.done >= trainer.steps:
        console.print(f"The run is complete: {trainer.done} steps.")
        return
    if trainer.done:
        console.print(f"Going on after step {trainer.done}.")
    console.print("\nOne training step runs:")
    console.print(str(trainer.explain()) + "\n", soft_wrap=True, markup=False)


def new_folder(model: str) -> Path:
    """Return the first of runs/MODEL, runs/MODEL-2, runs/MODEL-3, … that does not exist."""
    names = itertools.chain([model], (f"{model}-{i}" for i in itertools.count(2)))
    return next(path for path in (Path("runs") / name for name in names) if not path.exists())


def evaluate_run(console: Console, folder: Path, data: str | None, device: str) -> float:
    """Report the perplexity of a run on its own test text, that of a built-in corpus, or a whole file."""
    loaded = checkpoint.load(folder, device)
    config, tokenizer = loaded.run.config, loaded.run.tokenizer
    name = data_name(data) if data else config.data
    if name in BUILT_IN or name == config.data:
        corpus = load_corpus(name)
        text, what = corpus.test, f"the test text of {name}"
        if name == config.data and corpus.fingerprint != loaded.run.corpus:
            console.print(f"[yellow]{name} is not the text that this run began with: it may have been trained on parts "
                          "of what is now the test text.[/]", soft_wrap=True)
    else:
        text, what = read_text(name), name
    tokens = tokenizer.encode(text)
    nats = evaluate(loaded.model, tokens, config.seq_len, config.batch_size)
    unknown = unknown_share(tokens[1:], config.tokenizer)  # of those that are predicted
    console.print(f"{config.model} on {what}: [bold]perplexity {perplexity(nats):.2f}[/] ({nats:.4f} nats a token, "
                  f"{len(tokens) - 1:,} {config.tokenizer} tokens, {unknown:.1%} of them unknown)", soft_wrap=True)
    return nats


def generate(console: Console, folder: Path, prompt: str, tokens: int, temperature: float, top_k: int | None,
             top_p: float | None, seed: int, device: str) -> None:
    """Print `prompt` and its continuation, each token as soon as it is there."""
    loaded = checkpoint.load(folder, device)
    pieces = continue_text(loaded, prompt, tokens, temperature, top_k, top_p, seed)
    first = next(pieces, "")  # errors in the arguments come before any output
    for piece in itertools.chain([prompt, first], pieces):
        # Not through rich: it would wrap lines and read brackets as markup.
        console.file.write(piece)
        console.file.flush()
    console.file.write("\n")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
