"""The LSTM by the kernels of csrc/rnn.h."""

import fastlm._native as _native
from fastlm.ops.lstm import step
from fastlm.ops.recurrent_kernels import ACCEPTS, DTYPES, Layers
from fastlm.ops.recurrent_rules import losses

__all__ = ["ACCEPTS", "DTYPES", "at_once", "cannot", "loses", "run"]

_layers = Layers(_native, "lstm", step)
cannot, run, at_once = _layers.cannot, _layers.run, _layers.at_once


def loses(*args) -> str | None:
    return losses(_native, "lstm", *args)
