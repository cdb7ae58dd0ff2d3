"""fastlm: faster drop-in PyTorch layers for language models, with the proof beside each one."""

from fastlm import nn, ops
from fastlm.dispatch import backend, explain

__version__ = "0.1.0"
__all__ = ["backend", "explain", "nn", "ops", "profile"]


def __getattr__(name):
    """Import the profiler only when it is asked for."""
    if name == "profile":
        from fastlm.tools.profile import profile

        return profile
    raise AttributeError(f"module 'fastlm' has no attribute {name!r}")
