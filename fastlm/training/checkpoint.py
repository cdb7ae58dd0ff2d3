"""A run's folder: `config.json`, `tokenizer.json`, `model.safetensors`, `training.safetensors`, `losses.csv`.

The two JSON files are written when a run starts and never change. `training.safetensors` alone holds all that a run
needs to go on (weights, optimizer, losses), and `model.safetensors` alone all that its users need (the weights), so
the two need not agree with each other. Every file appears under a temporary name, reaches the disk and is renamed:
whenever the process dies, each file is the old one or the new one.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.models import LanguageModel
from fastlm.training.config import RunConfig, build_model, check_device, replace
from fastlm.training.data import Tokenizer, tokenizer_from_json

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
TRAINING, LOSSES = "training.safetensors", "losses.csv"


class CheckpointError(ValueError):
    """A run's folder lacks something, is damaged, or does not fit together."""


class Run(NamedTuple):
    """What a run's folder says about itself before any weights are read."""

    folder: Path
    config: RunConfig
    tokenizer: Tokenizer
    corpus: str  # fingerprint of the text
    vocabulary: str  # fingerprint of tokenizer.json


class Loaded(NamedTuple):
    """A trained model with what it needs to read and write text."""

    model: LanguageModel
    run: Run


def start(folder: str | Path, config: RunConfig, tokenizer: Tokenizer, corpus: str) -> Run:
    """Create the folder of a new run, `corpus` being the fingerprint of its text.

    Raises:
        CheckpointError: the folder holds a run already.
    """
    folder = Path(folder)
    if (folder / CONFIG).exists():
        raise CheckpointError(f"checkpoint: {folder} holds a run already: go on with it (--resume) or choose another "
                              "folder (--out)")
    folder.mkdir(parents=True, exist_ok=True)
    text = tokenizer.to_json()
    run = Run(folder, config, tokenizer, corpus, _digest(text))
    # The configuration comes last: where it exists, the run has begun.
    _replace(folder / TOKENIZER, text.encode())
    write_config(run)
    return run


def write_config(run: Run) -> None:
    """Write the settings of a run."""
    stored = {"settings": dataclasses.asdict(run.config), "corpus": run.corpus, "vocabulary": run.vocabulary}
    _replace(run.folder / CONFIG, (json.dumps(stored, indent=2) + "\n").encode())


def read_run(folder: str | Path) -> Run:
    """Read settings and vocabulary of a run.

    Raises:
        CheckpointError: there is no run, a file is damaged, or the vocabulary is another run's.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"checkpoint: {folder} holds no run: {folder / CONFIG} is missing")
    try:
        stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config = RunConfig(**stored["settings"])
        corpus, vocabulary = stored["corpus"], stored["vocabulary"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint: {folder / CONFIG} is damaged: {error}") from error
    try:
        text = (folder / TOKENIZER).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint: {folder / TOKENIZER} cannot be read: {error}") from error
    if _digest(text) != vocabulary:
        raise CheckpointError(f"checkpoint: vocabulary mismatch: {folder / TOKENIZER} is damaged or another run's")
    return Run(folder, config, tokenizer_from_json(text), corpus, vocabulary)


def save(run: Run, state: dict[str, Tensor]) -> None:
    """Write `Trainer.state()` of a run."""
    _write(run.folder / TRAINING, state, run)
    weights = {name[6:]: tensor for name, tensor in state.items() if name.startswith("model.")}
    _write(run.folder / WEIGHTS, weights, run)
    rows = (f"{i + 1},{loss!r}" for i, loss in enumerate(state["losses"].tolist()))
    _replace(run.folder / LOSSES, ("\n".join(["step,loss", *rows]) + "\n").encode())


def read_state(run: Run) -> dict[str, Tensor] | None:
    """Return the last state saved of a run, None where it was interrupted before the first."""
    path = run.folder / TRAINING
    return _read(path, run) if path.exists() else None


def load(folder: str | Path, device: str = "cpu", layers: str | None = None) -> Loaded:
    """Load the model of a run, in eval mode, with its own kind of `layers` or another.

    Raises:
        CheckpointError: a file is missing, damaged, or does not belong to the others.
        ValueError: the device does not exist here.
    """
    check_device(device)
    run = read_run(folder)
    # A run trained on a GPU is read anywhere: its own device does not matter.
    run = run._replace(config=replace(run.config, device=device, layers=layers))
    path = run.folder / WEIGHTS
    if not path.exists():
        raise CheckpointError(f"checkpoint: {path} is missing: the run was interrupted before it saved anything")
    weights = _read(path, run)
    with torch.random.fork_rng([]):
        model = build_model(run.config, len(run.tokenizer))
    expect(weights, model.state_dict(), path)
    model.load_state_dict(weights)
    return Loaded(model.to(device).eval(), run)


def expect(found: dict[str, Tensor], expected: dict[str, Tensor], path: Path | str) -> None:
    """Raise CheckpointError unless `found` has the names, shapes and dtypes of `expected`."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected:
            where = "lacks" if name not in found else "has a surplus tensor"
            raise CheckpointError(f"checkpoint: {path} does not fit the model of {CONFIG}: it {where} {name}")
        a, b = found[name], expected[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            raise CheckpointError(f"checkpoint: {path} does not fit the model of {CONFIG}: {name} is "
                                  f"{a.dtype}{list(a.shape)}, expected {b.dtype}{list(b.shape)}")


def _write(path: Path, tensors: dict[str, Tensor], run: Run) -> None:
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "checksum": _checksum(tensors), "vocabulary": run.vocabulary}
    _replace(path, save(tensors, metadata))


def _read(path: Path, run: Run) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle, no dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint: {path} is damaged: {error}") from error
    if metadata.get("checksum") != _checksum(tensors):
        raise CheckpointError(f"checkpoint: {path} is damaged: its checksum is not that of its tensors")
    if metadata.get("vocabulary") != run.vocabulary:
        raise CheckpointError(f"checkpoint: vocabulary mismatch: {path} was not trained with {run.folder / TOKENIZER}")
    return tensors


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _checksum(tensors: dict[str, Tensor]) -> str:
    """Return a CRC-32 of names and values: safetensors notices a truncated file, but no flipped bit."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
