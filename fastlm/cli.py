"""The command line: each command parses its options and calls the function that does the work."""

import functools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(name="fastlm", no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False,
                  help="Faster drop-in PyTorch layers for language models, with the proof beside each one.")


def clear_errors(command):
    """Print an error that the user can mend as one line, without a traceback, and exit with status 1."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, FloatingPointError) as error:
            message = str(error)
        except ModuleNotFoundError as error:
            if error.name not in ("safetensors", "tokenizers", "numpy"):
                raise
            message = f"{error.name} is not installed: pip install 'fastlm[cli]'"
        Console(stderr=True).print(f"[bold red]error:[/] {_escape(message)}", soft_wrap=True, highlight=False)
        raise typer.Exit(1)

    return run


def _escape(text):
    from rich.markup import escape

    return escape(text)


def _console() -> Console:
    return Console(highlight=False)


def _version(wanted: bool):
    if wanted:
        import fastlm

        print(fastlm.__version__)
        raise typer.Exit


@app.callback()
def main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                               help="Print the version.")] = False):
    """Faster drop-in PyTorch layers for language models, with the proof beside each one."""


def _usable(device: str | None) -> str | None:
    """Return the device that was asked for; one that is not there is a bad option."""
    if device is not None:
        from fastlm.training.config import check_device

        try:
            check_device(device)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return device


Run = Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)]
Device = Annotated[str | None, typer.Option(callback=_usable, help="cpu or cuda (default: cuda where there is one).")]


def _device(name: str | None) -> str:
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


@app.command()
@clear_errors
def train(
    model: Annotated[str | None, typer.Option(help="unigram, rnn, gru, lstm or transformer "
                                                   "(default: lstm).")] = None,
    data: Annotated[str | None, typer.Option(help="A text file, python-docs or python-source "
                                                  "(default: python-docs).")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="word, char or bpe (default: word).")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Most tokens in the vocabulary (default: 8192).")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps (default: 400; transformer: 300; "
                                                   "unigram: one pass).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step (default: 16).")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a sequence (default: 64).")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate (default: chosen for the model).")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Width of the model (default: 256).")] = None,
    num_layers: Annotated[int | None, typer.Option(help="Depth of the model (default: 1; transformer: 2).")] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout between layers (default: 0.3).")] = None,
    grad_clip: Annotated[float | None, typer.Option(help="Largest norm of the gradient (default: 1).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers (default: 0).")] = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 (autocast) (default: float32).")] = None,
    layers: Annotated[str | None, typer.Option(help="fastlm or stock (default: fastlm).")] = None,
    out: Annotated[Path | None, typer.Option(file_okay=False,
                                                   help="Folder of the run (default: a new one in runs/).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
):
    """Train a language model, and report its perplexity on text that it never saw."""
    from fastlm.training import session

    given = dict(model=model, data=data, tokenizer=tokenizer, vocab_size=vocab_size, steps=steps, batch_size=batch_size,
                 seq_len=seq_len, lr=lr, hidden_size=hidden_size, num_layers=num_layers, dropout=dropout,
                 grad_clip=grad_clip, seed=seed, device=device, dtype=dtype, layers=layers)
    if interrupted := session.train(_console(), out, resume, given):
        raise typer.Exit(128 + interrupted)  # as a shell reports a process that a signal ended


@app.command()
@clear_errors
def eval(
    run: Run,
    data: Annotated[str | None, typer.Option(help="A text file, python-docs or python-source "
                                                  "(default: the run's own test text).")] = None,
    device: Device = None,
):
    """Report the perplexity of a trained model."""
    from fastlm.training import session

    session.evaluate_run(_console(), run, data, _device(device))


@app.command()
@clear_errors
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "The",
    tokens: Annotated[int, typer.Option(help="How many tokens to add.")] = 200,
    temperature: Annotated[float, typer.Option(help="Below 1 safer, above 1 wilder, 0 the likeliest only.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the fewest tokens of this probability.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    device: Device = None,
):
    """Continue a text with a trained model."""
    from fastlm.training import session

    session.generate(_console(), run, prompt, tokens, temperature, top_k, top_p, seed, _device(device))


@app.command()
@clear_errors
def doctor(device: Device = None):
    """Say what this machine has, which implementation of each op runs and why, and how to mend what is missing."""
    from rich.table import Table

    from fastlm.tools import doctor

    device = _device(device)
    colours = {"ok": "green", "off": "yellow", "missing": "red"}
    sized = f"implementations on {device} at one size of real models, float32; fastlm.explain tells of your call"
    for title, checks in (("this machine", doctor.environment()), (sized, doctor.implementations(device))):
        table = Table("what", "state", "detail", "fix", title=title)
        for check in checks:
            table.add_row(check.name, f"[{colours[check.state]}]{check.state}[/]", _escape(check.detail),
                          _escape(check.fix))
        _console().print(table)


@app.command()
@clear_errors
def bench(
    suite: Annotated[str, typer.Option(help="all (ops, modules, models), one of these, or a family held to its goals: "
                                           "rnn-cpu, rnn-cuda, head, norms, attention, small.")] = "all",
    device: Device = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16; may be repeated.")] = None,
    only: Annotated[str, typer.Option(help="Measure only rows whose name and case contain this.")] = "",
    full: Annotated[bool, typer.Option("--full", help="Every shape of every op, and longer.")] = False,
    every: Annotated[bool, typer.Option("--every", help="Each implementation that can run, chosen or not.")] = False,
    out: Annotated[Path, typer.Option(file_okay=False, writable=True, help="Folder for the JSON and HTML results.")
                   ] = Path("benchmarks/results"),
):
    """Measure every op, module and model here against stock PyTorch: numbers, time, memory."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from fastlm.tools import bench, report

    suites = bench.EVERYTHING if suite == "all" else (suite,)
    name = "-".join(filter(None, (suite, only, "every" * every, "full" * full)))
    percentage, what = TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}")
    columns = (BarColumn(), percentage, TimeElapsedColumn(), what)
    bench.check(suites, dtype)  # before anything is drawn
    out.mkdir(parents=True, exist_ok=True)  # fails before anything is measured
    with Progress(*columns, console=_console()) as progress:
        task = progress.add_task("", total=1.0)
        result = bench.run(suites, _device(device), dtype, 2.0 if full else None, only=only, full=full, every=every,
                           progress=lambda what, done: progress.update(task, description=what, completed=done),
                           keep=lambda result: report.save_partial(result, out, name))
    wide = _console() if _console().is_terminal else Console(highlight=False, width=250)  # what a pipe shows whole
    for table in report.tables(result):
        wide.print(table)
    held = [row for row in result["rows"] if row["goal"]]
    if held:
        print(f"{sum(not row['missed'] for row in held)} of {len(held)} rows reach their goals")
    for path in report.save(result, out, name):
        print(path)
    if not all(row["within_rule"] for row in result["rows"]):
        raise ValueError("bench: some numbers break the error rule; their speed means nothing")
    if any(curve["difference"] > bench.SAME_LOSSES for curve in result["curves"]):
        raise ValueError(f"bench: losses of stock and fastlm layers differ by more than {bench.SAME_LOSSES}")


@app.command()
@clear_errors
def profile(
    name: Annotated[str, typer.Argument(help="An op, a module or a model: lstm, LSTM, RNNLM …")],
    device: Device = None,
    trace: Annotated[Path | None, typer.Option(help="Chrome trace file (default: NAME.trace.json).")] = None,
):
    """Profile a training step beside stock PyTorch and the reference: operators, memory, FLOPs, a trace."""
    from fastlm.tools.profile import profile, target

    device = _device(device)
    print(profile(target(name, device), device=device, trace=trace or Path(f"{name}.trace.json")))


@app.command()
@clear_errors
def report(
    results: Annotated[Path, typer.Option(help="Folder of JSON results.")] = Path("benchmarks/results"),
    readme: Annotated[Path, typer.Option(help="File whose results sections are filled.")] = Path("README.md"),
):
    """Fill the README's tables from the committed results."""
    from fastlm.tools.report import update_readme

    update_readme(readme, results)
