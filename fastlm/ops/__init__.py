"""Functions: torch.nn.functional's names and arguments, the fastest implementation that applies, the same numbers."""

from fastlm.ops.softmax import op as _softmax
from fastlm.ops.softmax import softmax

# Every op, for tests and benchmarks to iterate.
ALL = (_softmax,)

__all__ = ["ALL", "softmax"]
