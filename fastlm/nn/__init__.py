"""Modules: torch.nn names, arguments and state_dict, faster underneath."""

from fastlm.nn.activation import GEGLU, GELU, LogSoftmax, Softmax, SwiGLU
from fastlm.nn.attention import MultiheadAttention
from fastlm.nn.linear import Linear
from fastlm.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss, LinearDistillationLoss
from fastlm.nn.norm import LayerNorm, RMSNorm
from fastlm.nn.quantized import QuantizedLinear
from fastlm.nn.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from fastlm.nn.self_attention import KVCache, SelfAttention
from fastlm.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = ["GEGLU", "GELU", "GRU", "LSTM", "RNN", "CrossEntropyLoss", "GRUCell", "KVCache", "LSTMCell", "LayerNorm",
           "Linear", "LinearCrossEntropyLoss", "LinearDistillationLoss", "LogSoftmax", "MultiheadAttention",
           "QuantizedLinear", "RMSNorm", "RNNCell", "SelfAttention", "Softmax", "SwiGLU", "TransformerDecoderLayer",
           "TransformerEncoderLayer"]
