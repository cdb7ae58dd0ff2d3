"""All settings of one training run, and the model they describe."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from fastlm.models import (
    RNNLM,
    LanguageModel,
    RNNConfig,
    TransformerConfig,
    TransformerLM,
    UnigramConfig,
    UnigramLM,
)
from fastlm.models.language_model import LAYERS
from fastlm.training.data import BUILT_IN, TOKENIZERS

MODELS = ("unigram", "rnn", "gru", "lstm", "transformer")
DTYPES = ("float32", "bfloat16")
SEEDS = range(-2**63, 2**64)  # what torch takes

# Chosen on python-docs, where each takes a minute or two on two cores.
DEFAULTS = {
    "unigram": {},
    "rnn": {"steps": 400, "lr": 2e-3},
    "gru": {"steps": 400, "lr": 4e-3},
    "lstm": {"steps": 400, "lr": 4e-3},
    "transformer": {"steps": 300, "lr": 2e-3, "num_layers": 2},
}


@dataclass(frozen=True)
class RunConfig:
    """What `config.json` of a run holds. `configure` fills in the defaults of a model.

    `steps` may be None for the unigram model alone: one pass over the training text. `dtype` "bfloat16" means
    autocast; parameters stay float32. `device` is "cpu", "cuda" or "cuda:1".
    """

    model: str = "lstm"
    data: str = "python-docs"
    tokenizer: str = "word"
    vocab_size: int = 8192
    steps: int | None = None
    batch_size: int = 16
    seq_len: int = 64
    lr: float = 1e-3
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    layers: str = "fastlm"
    hidden_size: int = 256
    num_layers: int = 1
    dropout: float = 0.3
    weight_decay: float = 0.1
    grad_clip: float = 1.0

    def __post_init__(self):
        choices = {"model": MODELS, "tokenizer": TOKENIZERS, "dtype": DTYPES, "layers": tuple(LAYERS)}
        for name, expected in choices.items():
            if getattr(self, name) not in expected:
                raise ValueError(f"train: {name} is {getattr(self, name)!r}, expected one of {', '.join(expected)}")
        for name in ("vocab_size", "steps", "batch_size", "seq_len", "hidden_size", "num_layers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"train: {name} is {value}, expected 1 or more")
        if self.steps is None and self.model != "unigram":
            raise ValueError("train: steps is None, expected a number")
        for name, fits, expected in (("lr", 0 < self.lr < math.inf, "a finite number above 0"),
                                     ("dropout", 0 <= self.dropout < 1, "0 to below 1"),
                                     ("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number, 0 or more"),
                                     ("grad_clip", self.grad_clip > 0, "more than 0"),
                                     ("seed", self.seed in SEEDS, "a number of 64 bits")):
            if not fits:
                raise ValueError(f"train: {name} is {getattr(self, name)}, expected {expected}")


def configure(model: str = "lstm", **given) -> RunConfig:
    """Return the settings of a run of `model`: those given (None counts as not given), else its defaults."""
    if model not in MODELS:
        raise ValueError(f"train: model is {model!r}, expected one of {', '.join(MODELS)}")
    given = {name: value for name, value in given.items() if value is not None}
    given.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    check_device(given["device"])
    if "data" in given:
        given["data"] = data_name(given["data"])
    return RunConfig(**{"model": model, **DEFAULTS[model], **given})


def data_name(name: str) -> str:
    """Return the name of a built-in corpus as it is, that of a file as an absolute path."""
    return name if name in BUILT_IN else str(Path(name).resolve())


def check_device(name: str) -> None:
    """Raise ValueError unless `name` is a device on which PyTorch can compute here."""
    try:
        torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}, expected cpu, cuda or cuda:1") from None
    try:
        torch.zeros(1, device=name).item()  # "meta" makes tensors too, but computes nothing
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # behind it, all that PyTorch was not built for
        raise ValueError(f"device is {name!r}, which PyTorch cannot use here: {reason}") from error


def build_model(config: RunConfig, vocab_size: int) -> LanguageModel:
    """Return the untrained model of a run, on the CPU; its weights come from torch's random numbers."""
    if config.model == "unigram":
        return UnigramLM(UnigramConfig(vocab_size, layers=config.layers))
    sizes = {name: getattr(config, name) for name in ("hidden_size", "num_layers", "dropout", "layers")}
    if config.model == "transformer":
        heads = next(n for n in range(max(1, config.hidden_size // 64), 0, -1) if config.hidden_size % n == 0)
        return TransformerLM(TransformerConfig(vocab_size, num_heads=heads, max_seq_len=config.seq_len, **sizes))
    return RNNLM(RNNConfig(vocab_size, cell=config.model, **sizes))


def changed(stored: RunConfig, **given) -> str | None:
    """Return the first of the settings given that differs from the stored ones, in words, else None.

    A run may go on elsewhere and with other layers, for these do not change what it computes, and for longer.
    """
    for name, value in given.items():
        if value is not None and name == "data":
            value = data_name(value)
        if value is not None and name not in ("device", "layers", "steps") and getattr(stored, name) != value:
            return f"{name} is {value!r}, the run in this folder has {getattr(stored, name)!r}"
    return None


def replace(config: RunConfig, **given) -> RunConfig:
    """Return `config` with the settings given in place of its own (None counts as not given)."""
    return dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
