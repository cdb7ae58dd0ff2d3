"""Corpora without leakage, training that goes on bit for bit, and checkpoints that say what is wrong with them."""

import dataclasses
import itertools
import json
import lzma
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastlm.models import UnigramConfig, UnigramLM
from fastlm.training import checkpoint
from fastlm.training import data as corpora
from fastlm.training.checkpoint import CheckpointError
from fastlm.training.config import configure
from fastlm.training.data import build_tokenizer, load_corpus, tokenizer_from_json
from fastlm.training.evaluate import evaluate, perplexity, windows
from fastlm.training.generate import continue_text
from fastlm.training.train import Trainer, begin, learning_rate, load_data, resume, train

pytestmark = pytest.mark.usefixtures("one_thread")
AUSTEN = Path(__file__).parents[2] / "shared/corpus/austen.txt.xz"
MODELS = ("unigram", "rnn", "gru", "lstm", "transformer")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A small text with a grammar, so that there is something to learn."""
    draw = random.Random(0)
    subjects, verbs, objects = ["the cat", "a dog", "our aunt"], ["sees", "likes", "hears"], ["it", "me", "a bird"]
    lines = [f"{draw.choice(subjects)} {draw.choice(verbs)} {draw.choice(objects)}." for _ in range(600)]
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def settings(text_file):
    """Settings of a run that takes milliseconds a step."""
    def make(model="lstm", **given):
        sizes = dict(steps=12, batch_size=4, seq_len=8, hidden_size=16, vocab_size=50, dropout=0.2, device="cpu")
        return configure(model, data=str(text_file), **sizes | given)

    return make


def losses(config, data, steps):
    """Train a fresh model for `steps` steps of the schedule of `config.steps` and return the loss of each."""
    trainer = Trainer(config, data)
    return [trainer.step().item() for _ in range(steps)]


# --- data --------------------------------------------------------------------------------------------------------


def test_a_file_is_cut_into_three(text_file):
    corpus = load_corpus(str(text_file))
    text = text_file.read_text()
    assert corpus.train + corpus.validation + corpus.test == text
    assert [round(len(part) / len(text), 1) for part in corpus[1:]] == [0.8, 0.1, 0.1]
    assert all(part.endswith("\n") for part in corpus[1:])


def test_vocabulary_knows_nothing_of_the_test_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("alpha beta " * 400 + "validation " * 55 + "zulu " * 110, encoding="utf-8")
    corpus = load_corpus(str(path))
    assert "zulu" in corpus.test
    assert "zulu" not in corpus.train + corpus.validation
    for kind in ("word", "char"):
        tokenizer = build_tokenizer(kind, corpus.train, 500)
        assert not any("z" in token for token in tokenizer.tokens)
        assert 0 in tokenizer.encode("zulu")
    bpe = build_tokenizer("bpe", corpus.train, 500)
    assert not any("zu" in token for token in bpe.bpe.get_vocab())
    assert len(bpe.encode(" alpha")) == 1


@pytest.mark.parametrize("name", ["python-docs", "python-source"])
def test_built_in_corpora_do_not_leak(name, monkeypatch):
    monkeypatch.setattr(corpora, "SOURCE_CHARACTERS", 300_000)
    corpus, again = load_corpus(name), load_corpus(name)
    assert corpus == again
    assert corpus.fingerprint == again.fingerprint
    paragraphs = [{" ".join(p.split()) for p in part.split("\n\n")} - {""} for part in corpus[1:]]
    assert all(len(p) > 30 for p in paragraphs)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert paragraphs[i].isdisjoint(paragraphs[j])
    total = sum(map(len, corpus[1:]))
    assert total > 250_000
    assert len(corpus.train) > 0.7 * total


TEXT = "Say “no”: x_1 = f(a)[0]\n    return x   # twice…\n\n\tπ and ** and ***** are 3.14\r!"


@pytest.mark.parametrize("kind", ["word", "char", "bpe"])
def test_tokenizers_are_reversible(kind):
    tokenizer = build_tokenizer(kind, TEXT * 2, 300)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids.tolist()) == TEXT
    assert ids.max() < len(tokenizer) <= 300
    again = tokenizer_from_json(tokenizer.to_json())
    assert torch.equal(again.encode(TEXT), ids)
    assert again.to_json() == tokenizer.to_json()


def test_words_keep_their_space_and_rare_ones_are_unknown():
    tokenizer = build_tokenizer("word", "the cat, a dog\n  the cat once", 100)
    assert set(tokenizer.tokens) == {"<unk>", "the", " cat"}
    assert tokenizer.decode(tokenizer.encode("the cat  <unk> cat").tolist()) == "the cat <unk> <unk> <unk> <unk> cat"
    assert len(build_tokenizer("word", " a a a b b c c", 3)) == 3
    assert build_tokenizer("word", " a a a b b c c", 3).tokens == ["<unk>", " a", " b"]


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"),
    (b" \n ", "is empty"),
    ("na\u00efve".encode("latin-1"), "is not UTF-8 text: byte 0xef at offset 2"),
    (b"ab", "too few to split"),
    (b"one two three four five six seven eight nine ten", "no word occurs twice"),
    (b"a b a b a b a b a b a b", "the train split of .* has .* tokens, expected at least 65"),
])
def test_bad_text(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_data(configure("lstm", data=str(path), device="cpu"))


def test_missing_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.txt is not a file, expected a text file or one of"):
        load_corpus(str(tmp_path / "missing.txt"))
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_corpus(str(tmp_path))


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert corpora.read_text(path) == "one\ntwo\n"


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "message"), [
    ({"model": "bert"}, "model is 'bert', expected one of unigram"),
    ({"tokenizer": "letters"}, "tokenizer is 'letters'"),
    ({"dtype": "int8"}, "dtype is 'int8'"),
    ({"layers": "slow"}, "layers is 'slow', expected one of fastlm, stock"),
    ({"steps": 0}, "steps is 0, expected 1 or more"),
    ({"lr": -1.0}, "train: lr is -1.0, expected a finite number above 0$"),
    ({"lr": math.nan}, "train: lr is nan, expected a finite number above 0$"),
    ({"dropout": 1.0}, "train: dropout is 1.0, expected 0 to below 1$"),
    ({"weight_decay": -1.0}, "train: weight_decay is -1.0, expected a finite number, 0 or more$"),
    ({"grad_clip": 0.0}, "train: grad_clip is 0.0, expected more than 0$"),
    ({"seed": 2**64}, f"train: seed is {2**64}, expected a number of 64 bits$"),
    ({"device": "toaster"}, "device is 'toaster', expected cpu, cuda or cuda:1"),
    ({"device": "meta"}, "device is 'meta', which PyTorch cannot use here"),
])
def test_bad_settings(given, message):
    with pytest.raises(ValueError, match=message):
        configure(**{"device": "cpu"} | given)


def test_unigram_counts_the_training_text_once(settings):
    config = settings("unigram", steps=None)
    config = dataclasses.replace(config, steps=None)
    data = load_data(config)
    trainer = Trainer(config, data)
    for _ in range(trainer.steps):
        trainer.step()
    counts = Counter(data.train.tolist())
    assert trainer.model.counts.tolist() == [counts[i] for i in range(len(data.tokenizer))]


@pytest.mark.parametrize("model", MODELS[1:])
def test_models_beat_the_bag_of_words(settings, model):
    found = {}
    for name, given in (("unigram", {"steps": None}), (model, {"steps": 80, "lr": 2e-2, "dropout": 0.0})):
        config = settings(name, **given)
        data = load_data(config)
        trainer = Trainer(config, data)
        while trainer.done < trainer.steps:
            trainer.step()
        found[name] = perplexity(evaluate(trainer.model, data.test, config.seq_len))
    assert found[model] < found["unigram"] / 2, found


@pytest.mark.parametrize("model", MODELS)
def test_layers_give_the_same_loss_curve(settings, model):
    curves = [torch.tensor(losses(settings(model, layers=layers, steps=100), load_data(settings(model)), 50))
              for layers in ("fastlm", "stock")]
    torch.testing.assert_close(*curves, rtol=1e-4, atol=0)
    assert curves[0][-5:].mean() < curves[0][:5].mean() or model == "unigram"


def test_the_seed_decides(settings):
    data = load_data(settings())
    curves = [losses(settings(seed=seed), data, 3) for seed in (1, 1, 2)]
    assert curves[0] == curves[1] != curves[2]


def test_bfloat16_is_near_float32(settings):
    data = load_data(settings())
    low, high = (torch.tensor(losses(settings("transformer", dtype=dtype, dropout=0.0), data, 8))
                 for dtype in ("bfloat16", "float32"))
    torch.testing.assert_close(low, high, rtol=0.02, atol=0)
    assert not torch.equal(low, high)


@pytest.mark.parametrize("model", MODELS)
def test_explain_leaves_no_trace(settings, model):
    data = load_data(settings(model))
    plain, explained = (Trainer(settings(model), data) for _ in range(2))
    weights = {name: tensor.clone() for name, tensor in explained.model.state_dict().items()}
    state = torch.get_rng_state()
    calls = explained.explain()
    assert {call.op for call in calls} >= (set() if model == "unigram" else {"linear_cross_entropy"})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], tensor) for name, tensor in explained.model.state_dict().items())
    assert explained.done == 0
    assert all(p.grad is None for p in explained.model.parameters())
    assert [plain.step().item() for _ in range(3)] == [explained.step().item() for _ in range(3)]


def test_batches_are_windows_of_the_training_text(settings):
    trainer = Trainer(settings(), load_data(settings()))
    text = trainer.tokens.tolist()
    joined = {tuple(text[i:i + 9]) for i in range(len(text) - 8)}
    for step in range(20):
        x, y = trainer.batch(step)
        assert x.shape == y.shape == (4, 8)
        assert all(tuple([*a, b[-1]]) in joined for a, b in zip(x.tolist(), y.tolist(), strict=True))
        assert torch.equal(x[:, 1:], y[:, :-1])


def test_learning_rate():
    rates = [learning_rate(1.0, step, 200) for step in range(200)]
    assert rates[0] == 1 / 20
    assert rates[19] == rates[20] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert learning_rate(1.0, 0, 1) == 1.0


def test_evaluate_predicts_each_token_once():
    tokens = torch.randint(7, (83,))
    targets = torch.cat([y.flatten() for _, y in windows(tokens, 8, 3)])
    assert torch.equal(targets, tokens[1:])
    assert all(torch.equal(x[:, 1:], y[:, :-1]) for x, y in windows(tokens, 8, 3))
    model = UnigramLM(UnigramConfig(7))
    model.count(tokens)
    expected = -model.log_probabilities()[tokens[1:]].mean().item()
    assert evaluate(model, tokens, 8, 3) == pytest.approx(expected, rel=1e-6)
    assert perplexity(math.log(20)) == pytest.approx(20)
    assert perplexity(1e4) == math.inf
    with pytest.raises(ValueError, match="has 1 tokens, expected at least 2"):
        evaluate(model, tokens[:1], 8)
    with pytest.raises(ValueError, match="the model's vocabulary 7"):
        evaluate(model, torch.tensor([1, 7]), 8)


@pytest.mark.skipif(not AUSTEN.exists(), reason=f"{AUSTEN} is not there")
def test_a_real_novel(tmp_path):
    path = tmp_path / "austen.txt"
    path.write_text(lzma.decompress(AUSTEN.read_bytes()).decode()[:400_000], encoding="utf-8")
    config = configure("unigram", data=str(path), device="cpu")
    data = load_data(config)
    trainer = Trainer(config, data)
    while trainer.done < trainer.steps:
        trainer.step()
    assert trainer.model.counts.sum() == len(data.train)
    assert 100 < perplexity(evaluate(trainer.model, data.test, 64)) < 600


# --- checkpoints -------------------------------------------------------------------------------------------------


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("model", MODELS)
def test_resumed_run_is_the_uninterrupted_run(settings, tmp_path, model):
    run, _, whole = begin(tmp_path / "whole", settings(model))
    assert train(run, whole) is None
    run, _, first = begin(tmp_path / "parts", settings(model))

    def interrupt(trainer):
        if trainer.done == 5:
            os.kill(os.getpid(), signal.SIGINT)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert train(run, first, interrupt) == signal.SIGINT
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert first.done == 5
    torch.manual_seed(99)  # nothing may depend on what another process would not know
    run, _, second = resume(tmp_path / "parts")
    assert second.done == 5
    assert train(run, second) is None
    assert same(whole.state(), second.state())
    rows = (tmp_path / "parts/losses.csv").read_text().splitlines()
    assert rows[0] == "step,loss"
    assert [float(row.split(",")[1]) for row in rows[1:]] == pytest.approx([x.item() for x in whole.losses], rel=1e-6)


def test_resume_before_anything_was_saved(settings, tmp_path):
    begin(tmp_path, settings())
    run, _, trainer = resume(tmp_path)
    assert trainer.done == 0
    assert train(run, trainer) is None
    assert resume(tmp_path)[2].done == 12
    with pytest.raises(CheckpointError, match="holds a run already"):
        begin(tmp_path, settings())


def test_resume_for_more_steps(settings, tmp_path):
    run, _, trainer = begin(tmp_path, settings(steps=4))
    assert train(run, trainer) is None
    run, _, trainer = resume(tmp_path, steps=7)
    assert (trainer.done, trainer.steps) == (4, 7)
    assert train(run, trainer) is None
    _, _, trainer = resume(tmp_path)  # the new number was kept
    assert (trainer.done, trainer.steps) == (7, 7)


def test_resume_with_other_layers(settings, tmp_path):
    run, _, trainer = begin(tmp_path, settings())
    stop = train(run, trainer, lambda t: os.kill(os.getpid(), signal.SIGTERM) if t.done == 6 else None)
    assert (stop, trainer.done) == (signal.SIGTERM, 6)
    run, _, trainer = resume(tmp_path, layers="stock")
    assert trainer.model.config.layers == "stock"
    assert train(run, trainer) is None


def test_a_save_that_fails_leaves_the_last_one_whole(settings, tmp_path, monkeypatch):
    run, _, trainer = begin(tmp_path, settings())
    trainer.step()
    checkpoint.save(run, trainer.state())
    before = checkpoint.read_state(run)
    trainer.step()

    def fail(*paths):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(run, trainer.state())
    assert same(checkpoint.read_state(run), before)


KILLED = """
import sys
from fastlm.training.train import resume, train
run, _, trainer = resume(sys.argv[1])
train(run, trainer, lambda t: print(t.done, flush=True), save_seconds=0)
"""


def test_survives_kill_9(settings, tmp_path):
    """A process that saves after every step dies somewhere; the run goes on and ends as if nothing had happened."""
    config = settings(steps=400)
    begin(tmp_path, config)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    for _ in range(7):
        process.stdout.readline()
    time.sleep(random.random() / 50)
    process.kill()
    process.wait()
    _, _, trainer = resume(tmp_path)
    assert 6 <= trainer.done < 400
    whole = Trainer(config, load_data(config))
    while whole.done < trainer.done + 3:
        whole.step()
    for _ in range(3):
        trainer.step()
    assert same(whole.state(), trainer.state())


@pytest.fixture
def trained(settings, tmp_path):
    run, _, trainer = begin(tmp_path, settings())
    train(run, trainer)
    return tmp_path


def test_load(trained, settings):
    loaded = checkpoint.load(trained)
    assert not loaded.model.training
    assert same(loaded.model.state_dict(), {k[6:]: v for k, v in checkpoint.read_state(loaded.run).items()
                                            if k.startswith("model.")})
    assert loaded.run.config == settings()
    assert checkpoint.load(trained, layers="stock").model.config.layers == "stock"


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "garbage", "empty"])
def test_damaged_weights(trained, name, damage):
    path = trained / name
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[-100] ^= 1
    path.write_bytes({"truncate": raw[:-8], "flip": raw, "garbage": b"garbage" * 50, "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        checkpoint.load(trained) if name == "model.safetensors" else resume(trained)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"settings": {"a": 1}, "corpus": "", "vocabulary": ""}'])
def test_damaged_configuration(trained, content):
    (trained / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config.json is damaged"):
        checkpoint.load(trained)


def edit(folder, **given):
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    stored["settings"].update(given)
    path.write_text(json.dumps(stored))


def test_files_that_do_not_fit_together(trained, settings, tmp_path_factory, text_file):
    edit(trained, hidden_size=32)
    for read in (checkpoint.load, resume):
        with pytest.raises(CheckpointError, match=r"does not fit the model of config.json: .* expected .*32"):
            read(trained)
    edit(trained, hidden_size=16, model="gru")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        checkpoint.load(trained)
    edit(trained, model="lstm")
    checkpoint.load(trained)
    other = tmp_path_factory.mktemp("other")
    run, _, trainer = begin(other, settings(tokenizer="char"))
    train(run, trainer)
    tokenizer = (trained / "tokenizer.json").read_text()
    (trained / "tokenizer.json").write_text((other / "tokenizer.json").read_text())
    with pytest.raises(CheckpointError, match=r"vocabulary mismatch: .*tokenizer.json"):
        checkpoint.load(trained)
    (trained / "tokenizer.json").write_text(tokenizer)
    (trained / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"vocabulary mismatch: .*model.safetensors was not trained with"):
        checkpoint.load(trained)
    (trained / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="interrupted before it saved"):
        checkpoint.load(trained)
    (trained / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read"):
        checkpoint.load(trained)


def test_resume_refuses_another_run(trained, settings, tmp_path_factory):
    with pytest.raises(CheckpointError, match=r"lr is 0.5, the run in this folder has 0.004"):
        resume(trained, lr=0.5)
    with pytest.raises(CheckpointError, match="holds no run"):
        resume(trained / "nowhere")
    changed = tmp_path_factory.mktemp("changed") / "text.txt"
    changed.write_text("one two one two\n" * 200)
    edit(trained, data=str(changed))
    with pytest.raises(CheckpointError, match="is not the one this run began with"):
        resume(trained)


# --- text --------------------------------------------------------------------------------------------------------


def test_continue_text(trained):
    loaded = checkpoint.load(trained)
    draws = ["".join(continue_text(loaded, "the cat", 20, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    ids = loaded.run.tokenizer.encode("the cat")[None]
    likeliest = loaded.model.generate(ids, 20, temperature=0)[0, ids.size(1):]
    expected = loaded.run.tokenizer.decode(likeliest.tolist())
    assert "".join(continue_text(loaded, "the cat", 20, temperature=0)) == expected
    with pytest.raises(ValueError, match="prompt is empty"):
        next(continue_text(loaded, "", 5))


def test_streamed_bytes_make_whole_characters(settings, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("“ä” ñ π — 日本語 ☃\n" * 80, encoding="utf-8")
    run, _, trainer = begin(tmp_path / "run", configure(
        "unigram", data=str(path), tokenizer="bpe", vocab_size=256, seq_len=8, device="cpu"))
    train(run, trainer)
    loaded = checkpoint.load(tmp_path / "run")
    pieces = list(continue_text(loaded, "“", 120))
    new = loaded.model.generate(run.tokenizer.encode("“")[None], 120, generator=torch.Generator().manual_seed(0))
    assert "".join(pieces) == run.tokenizer.decode(new[0, len(run.tokenizer.encode("“")):].tolist())
