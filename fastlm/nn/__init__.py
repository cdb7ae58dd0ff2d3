"""Modules: torch.nn names, arguments and state_dict, faster underneath."""

from fastlm.nn.activation import Softmax
from fastlm.nn.attention import MultiheadAttention, TransformerEncoderLayer
from fastlm.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from fastlm.nn.recurrent import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "CrossEntropyLoss", "LinearCrossEntropyLoss", "MultiheadAttention", "Softmax",
           "TransformerEncoderLayer"]
