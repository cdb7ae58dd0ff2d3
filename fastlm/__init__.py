"""fastlm: faster drop-in PyTorch layers for language models, with the proof beside each one."""

from fastlm import nn, ops
from fastlm.dispatch import backend, explain

__version__ = "0.1.0"
__all__ = ["backend", "explain", "nn", "ops"]
