"""Continue a text with a trained language model, piece by piece."""

from collections.abc import Iterator

import torch

from fastlm.training.checkpoint import Loaded
from fastlm.training.config import SEEDS


def continue_text(loaded: Loaded, prompt: str, tokens: int, temperature: float = 1.0, top_k: int | None = None,
                  top_p: float | None = None, seed: int = 0) -> Iterator[str]:
    """Yield the text of `tokens` sampled tokens behind `prompt`, as they come; see `LanguageModel.generate`.

    Raises:
        ValueError: the prompt is empty, or an argument is out of range.
    """
    device = next(iter(loaded.model.state_dict().values())).device
    tokenizer = loaded.run.tokenizer
    ids = tokenizer.encode(prompt)
    if len(ids) == 0:
        raise ValueError("generate: prompt is empty, expected some text to continue")
    if seed not in SEEDS:
        raise ValueError(f"generate: seed is {seed}, expected a number of 64 bits")
    generator = torch.Generator(device).manual_seed(seed)
    new: list[int] = []
    shown = ""
    for token in loaded.model.stream(ids[None].to(device), tokens, temperature, top_k, top_p, generator):
        new.append(token.item())
        text = tokenizer.decode(new)
        # A byte-level token may end within a character: wait for the rest of it.
        if not text.endswith("\ufffd"):
            yield text[len(shown):]
            shown = text
    yield tokenizer.decode(new)[len(shown):]
