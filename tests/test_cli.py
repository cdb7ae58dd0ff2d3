"""The commands, as a user types them."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.tools import bench
from fastlm.training import checkpoint, train

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--steps", 20, "--batch-size", 4, "--seq-len", 8, "--hidden-size", 16, "--vocab-size", 300, "--lr", 0.02,
         "--device", "cpu"]


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A text file in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "text.txt"
    path.write_text("the cat sees [red] birds\nand a dog hears it\n" * 80, encoding="utf-8")
    return str(path)


def fastlm(*args, status=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


def perplexity(output):
    return float(re.search(r"perplexity ([\d.]+) \(", output)[1])


@pytest.mark.parametrize("model", ["unigram", "rnn", "gru", "lstm", "transformer"])
@pytest.mark.parametrize("layers", ["fastlm", "stock"])
def test_train_eval_generate(text, model, layers):
    output = fastlm("train", "--model", model, "--data", text, "--out", "run", "--layers", layers, *SMALL)
    assert "One training step runs:" in output
    if model == "unigram" or layers == "stock":
        assert "no fastlm op was called" in output
    else:
        assert "linear_cross_entropy" in output
    for word in ("step 20/20", "loss", "tokens/s", "ETA", "validation perplexity"):
        assert word in output
    assert "\x1b" not in output, "escape codes in what is no terminal"
    test = perplexity(output)
    assert perplexity(fastlm("eval", "run")) == pytest.approx(test, abs=0.1)
    assert perplexity(fastlm("eval", "run", "--data", text)) == pytest.approx(test, abs=0.1)
    first, second = (fastlm("generate", "run", "--prompt", "the cat", "--tokens", 12, "--top-k", 9, "--top-p", 0.9,
                            "--temperature", 0.8, "--seed", 3) for _ in range(2))
    assert first == second
    assert first.startswith("the cat")
    assert first != fastlm("generate", "run", "--prompt", "the cat", "--tokens", 12, "--seed", 4)


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_tokenizers(text, tokenizer):
    fastlm("train", "--model", "gru", "--data", text, "--tokenizer", tokenizer, "--out", "run", *SMALL)
    assert f"{tokenizer} tokens" in fastlm("eval", "run")
    assert fastlm("generate", "run", "--tokens", 5, "--prompt", "[red]").startswith("[red]")


def test_eval_of_other_text(text, tmp_path):
    fastlm("train", "--model", "unigram", "--data", text, "--out", "run", *SMALL)
    other = tmp_path / "other.txt"
    other.write_text("the cat sees the dog, purple elephants\n")
    output = fastlm("eval", "run", "--data", other)
    assert str(other) in output
    assert "8 word tokens, 50.0% of them unknown" in output
    other.write_text("unheard cat\n")  # the first token is not predicted, and does not count
    assert "2 word tokens, 0.0% of them unknown" in fastlm("eval", "run", "--data", other)


def test_eval_says_that_the_text_has_changed(text):
    fastlm("train", "--model", "unigram", "--data", text, "--out", "run", *SMALL)
    assert "is not the text that this run began with" not in fastlm("eval", "run")
    with open(text, "a") as file:
        file.write("and more of it\n")
    assert "is not the text that this run began with" in fastlm("eval", "run")


def test_default_folders(text):
    for folder in ("runs/lstm", "runs/lstm-2"):
        assert f"saved in {folder}" in fastlm("train", "--data", text, *SMALL)


@pytest.mark.parametrize(("numbers", "status"), [([signal.SIGINT], 130), ([signal.SIGTERM], 143),
                                                 ([signal.SIGTERM, signal.SIGTERM], 143)])
def test_interrupt_and_resume(text, monkeypatch, numbers, status):
    command = ["train", "--model", "lstm", "--data", text, *SMALL]
    fastlm(*command, "--out", "whole")
    step = train.Trainer.step

    def interrupted(trainer):
        if trainer.done == 7:
            for number in numbers:
                os.kill(os.getpid(), number)
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", interrupted)
        output = fastlm(*command, "--out", "parts", status=status)
    assert "Interrupted after step 8 of 20" in output
    assert "fastlm train --resume --out parts" in output
    output = fastlm("train", "--resume", "--out", "parts")
    assert "Going on after step 8" in output
    whole, parts = (checkpoint.load(folder).model.state_dict() for folder in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert "The run is complete: 20 steps" in fastlm(*command, "--resume", "--out", "parts")


def test_a_second_interrupt_stops_at_once(text, monkeypatch):
    monkeypatch.setattr(train.Trainer, "step", lambda trainer: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert "Interrupted" not in fastlm("train", "--data", text, "--out", "run", *SMALL, status=130)
    assert not Path("run/training.safetensors").exists()


def test_divergence_is_an_error(text):
    output = fastlm("train", "--data", text, "--out", "run", *SMALL, "--lr", 1e30, "--grad-clip", 2, status=1)
    assert re.search(r"error: train: the loss of step \d is (nan|inf): training diverged", output)
    assert "smaller learning rate (lr is 1e+30), or clip gradients at a smaller norm (grad_clip is 2)" in output
    assert not Path("run/model.safetensors").exists()


@pytest.mark.parametrize(("step", "message"), [(31, "the loss of step 32 is nan"),
                                               (40, "a weight is not finite after step 40")])
def test_divergence_leaves_the_last_state_as_it_was(text, monkeypatch, step, message):
    fastlm("train", "--model", "gru", "--data", text, "--out", "run", *SMALL)
    before = {path: path.read_bytes() for path in Path("run").glob("*.safetensors")}
    do_step = train.Trainer.step

    def diverge(trainer):
        loss = do_step(trainer)
        if trainer.done == step:
            trainer.model.head_bias.data.fill_(torch.nan)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", diverge)
        output = fastlm("train", "--resume", "--out", "run", "--steps", 40, status=1)
    assert message in output
    assert "test perplexity" not in output
    assert len(before) == 2
    assert {path: path.read_bytes() for path in Path("run").glob("*.safetensors")} == before
    assert "step 40/40" in fastlm("train", "--resume", "--out", "run")


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"garbage")])
def test_a_complete_run_that_is_resumed_is_whole_again(text, damage):
    fastlm("train", "--model", "gru", "--data", text, "--out", "run", *SMALL)
    weights, losses = checkpoint.load("run").model.state_dict(), Path("run/losses.csv").read_text()
    for name in ("model.safetensors", "losses.csv"):
        damage(Path("run", name))
    fastlm("train", "--resume", "--out", "run")
    again = checkpoint.load("run").model.state_dict()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert Path("run/losses.csv").read_text() == losses


@pytest.mark.parametrize(("args", "message"), [
    (["train", "--model", "bert"], "model is 'bert', expected one of unigram, rnn, gru, lstm, transformer"),
    (["train", "--data", "nowhere.txt"], "nowhere.txt is not a file"),
    (["train", "--resume"], "--resume needs --out"),
    (["train", "--resume", "--out", "nowhere"], "nowhere holds no run"),
    (["eval", "nowhere"], "nowhere holds no run"),
    (["generate", "nowhere"], "nowhere holds no run"),
])
def test_errors_are_one_line(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    output = fastlm(*args, status=1)
    assert message in output
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    assert not list(tmp_path.iterdir()), "a command that failed left something behind"


@pytest.mark.parametrize("command", [["train"], ["eval", "run"], ["generate", "run"], ["doctor"], ["bench"],
                                     ["profile", "lstm"]])
@pytest.mark.parametrize(("device", "message"), [
    ("toaster", "device is 'toaster', expected cpu, cuda or cuda:1"),
    ("meta", "device is 'meta', which PyTorch cannot use here"),
    ("cuda:99", "device is 'cuda:99', which PyTorch cannot use here"),
])
def test_a_device_that_is_not_there_is_a_bad_option(tmp_path, monkeypatch, command, device, message):
    monkeypatch.chdir(tmp_path)
    output = fastlm(*command, "--device", device, status=2)
    assert f"Invalid value for '--device': {message}" in " ".join(output.replace("│", "").split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("args", "message", "status"), [
    (["--out", "text.txt/results"], "Not a directory: 'text.txt/results'", 1),
    (["--out", "text.txt"], "'text.txt' is a file", 2),
    (["--dtype", "float7"], "error: bench: dtype is 'float7'", 1),
    (["--suite", "nonsense"], "error: bench: unknown suite nonsense", 1),
])
def test_bench_looks_at_its_options_before_it_measures(text, monkeypatch, args, message, status):
    monkeypatch.setattr(bench, "run", lambda *args, **options: pytest.fail("it measures"))
    assert message in fastlm("bench", *args, status=status)


def test_errors_of_a_run(text):
    fastlm("train", "--model", "unigram", "--data", text, "--out", "run", *SMALL)
    assert "holds a run already" in fastlm("train", "--data", text, "--out", "run", status=1)
    output = fastlm("train", "--resume", "--out", "run", "--seed", 5, status=1)
    assert "seed is 5, the run in this folder has 0" in output
    assert "is a file" in fastlm("train", "--data", text, "--out", text, status=2)
    assert "prompt is empty" in fastlm("generate", "run", "--prompt", "", status=1)
    assert "top_p is 2.0" in fastlm("generate", "run", "--top-p", 2, status=1)
    assert f"seed is {2**64}, expected" in fastlm("generate", "run", "--seed", 2**64, status=1)


def test_help_names_every_command_and_default():
    output = fastlm("--help")
    assert all(command in output for command in ("train", "eval", "generate"))
    assert fastlm("train", "--help").count("default: ") >= 12


def test_missing_libraries_are_named():
    code = "import sys; sys.modules['typer'] = None; from fastlm.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip() == "fastlm: the command line needs typer: pip install 'fastlm[cli]'"
