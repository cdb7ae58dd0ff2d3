"""Functions: torch.nn.functional's names and arguments, the fastest implementation that applies, the same numbers."""

from fastlm.ops.attention import op as _attention
from fastlm.ops.attention import scaled_dot_product_attention
from fastlm.ops.cross_entropy import cross_entropy
from fastlm.ops.cross_entropy import op as _cross_entropy
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from fastlm.ops.linear_cross_entropy import op as _linear_cross_entropy
from fastlm.ops.softmax import op as _softmax
from fastlm.ops.softmax import softmax

# Every op, for tests and benchmarks to iterate.
ALL = (_softmax, _attention, _cross_entropy, _linear_cross_entropy)

__all__ = ["ALL", "cross_entropy", "linear_cross_entropy", "scaled_dot_product_attention", "softmax"]
