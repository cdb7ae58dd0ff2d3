"""Functions: torch.nn.functional's names and arguments, the fastest implementation that applies, the same numbers."""

from fastlm.ops.attention import op as _attention
from fastlm.ops.attention import scaled_dot_product_attention
from fastlm.ops.cross_entropy import cross_entropy
from fastlm.ops.cross_entropy import op as _cross_entropy
from fastlm.ops.gru import gru
from fastlm.ops.gru import op as _gru
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from fastlm.ops.linear_cross_entropy import op as _linear_cross_entropy
from fastlm.ops.lstm import lstm
from fastlm.ops.lstm import op as _lstm
from fastlm.ops.rnn import op as _rnn
from fastlm.ops.rnn import rnn
from fastlm.ops.rotary import op as _rotary_embedding
from fastlm.ops.rotary import rotary_embedding
from fastlm.ops.softmax import op as _softmax
from fastlm.ops.softmax import softmax

# Every op, for tests and benchmarks to iterate.
ALL = (_softmax, _attention, _cross_entropy, _linear_cross_entropy, _lstm, _gru, _rnn,
       _rotary_embedding)

__all__ = ["ALL", "cross_entropy", "gru", "linear_cross_entropy", "lstm", "rnn", "rotary_embedding",
           "scaled_dot_product_attention", "softmax"]
