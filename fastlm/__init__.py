"""fastlm: faster drop-in PyTorch layers for language models, with the proof beside each one."""

from fastlm import nn, ops
from fastlm.dispatch import backend, explain

__version__ = "0.1.0"
__all__ = ["backend", "explain", "models", "nn", "ops", "profile"]


def __getattr__(name):
    """Import models and the profiler only when they are asked for."""
    if name == "models":
        import fastlm.models

        return fastlm.models
    if name == "profile":
        from fastlm.tools.profile import profile

        return profile
    raise AttributeError(f"module 'fastlm' has no attribute {name!r}")
