"""Modules: torch.nn names, arguments and state_dict, faster underneath."""

from fastlm.nn.activation import GEGLU, GELU, LogSoftmax, Softmax, SwiGLU
from fastlm.nn.attention import MultiheadAttention, TransformerEncoderLayer
from fastlm.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from fastlm.nn.norm import LayerNorm, RMSNorm
from fastlm.nn.recurrent import GRU, LSTM, RNN

__all__ = ["GEGLU", "GELU", "GRU", "LSTM", "RNN", "CrossEntropyLoss", "LayerNorm", "LinearCrossEntropyLoss",
           "LogSoftmax", "MultiheadAttention", "RMSNorm", "Softmax", "SwiGLU", "TransformerEncoderLayer"]
