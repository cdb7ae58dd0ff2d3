"""Language models with one interface: `logits`, `loss`, `generate`."""

from fastlm.models.language_model import LanguageModel
from fastlm.models.rnn import RNNLM, RNNConfig
from fastlm.models.transformer import TransformerConfig, TransformerLM
from fastlm.models.unigram import UnigramConfig, UnigramLM

__all__ = ["RNNLM", "LanguageModel", "RNNConfig", "TransformerConfig", "TransformerLM", "UnigramConfig", "UnigramLM"]
