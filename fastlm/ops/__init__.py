"""Functions: torch.nn.functional's names and arguments, the fastest implementation that applies, the same numbers."""

from fastlm.ops.activation import geglu, geglu_op, gelu, gelu_op, swiglu, swiglu_op
from fastlm.ops.attention import op as _attention
from fastlm.ops.attention import scaled_dot_product_attention
from fastlm.ops.cross_entropy import cross_entropy
from fastlm.ops.cross_entropy import op as _cross_entropy
from fastlm.ops.distillation import linear_distillation
from fastlm.ops.distillation import op as _distillation
from fastlm.ops.dropout import dropout_add
from fastlm.ops.dropout import op as _dropout_add
from fastlm.ops.gru import gru
from fastlm.ops.gru import op as _gru
from fastlm.ops.linear import linear
from fastlm.ops.linear import op as _linear
from fastlm.ops.linear_cross_entropy import Auxiliary, linear_cross_entropy, shift_targets
from fastlm.ops.linear_cross_entropy import op as _linear_cross_entropy
from fastlm.ops.lstm import lstm
from fastlm.ops.lstm import op as _lstm
from fastlm.ops.norm import (
    add_layer_norm,
    add_layer_op,
    add_rms_norm,
    add_rms_op,
    layer_norm,
    layer_op,
    rms_norm,
    rms_op,
)
from fastlm.ops.quantized_linear import op as _quantized_linear
from fastlm.ops.quantized_linear import quantized_linear
from fastlm.ops.rnn import op as _rnn
from fastlm.ops.rnn import rnn
from fastlm.ops.rotary import op as _rotary_embedding
from fastlm.ops.rotary import rotary_embedding
from fastlm.ops.softmax import log_op as _log_softmax
from fastlm.ops.softmax import log_softmax, masked_softmax, softmax
from fastlm.ops.softmax import masked_op as _masked_softmax
from fastlm.ops.softmax import op as _softmax
from fastlm.ops.varlen_attn import op as _varlen_attn
from fastlm.ops.varlen_attn import varlen_attn

# Every op, for tests and benchmarks to iterate.
ALL = (_softmax, _log_softmax, _masked_softmax, _attention, _varlen_attn, _cross_entropy, _linear_cross_entropy,
       _distillation, _lstm, _gru, _rnn, rms_op, layer_op, add_rms_op, add_layer_op, gelu_op, swiglu_op, geglu_op,
       _rotary_embedding, _dropout_add, _linear, _quantized_linear)

__all__ = ["ALL", "Auxiliary", "add_layer_norm", "add_rms_norm", "cross_entropy", "dropout_add", "geglu", "gelu", "gru",
           "layer_norm", "linear", "linear_cross_entropy", "linear_distillation", "log_softmax", "lstm",
           "masked_softmax", "quantized_linear", "rms_norm", "rnn", "rotary_embedding", "scaled_dot_product_attention",
           "shift_targets", "softmax", "swiglu", "varlen_attn"]
