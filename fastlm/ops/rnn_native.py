"""Elman's network by the kernels of csrc/rnn.h."""

from functools import partial

import fastlm._native as _native
from fastlm.ops.recurrent_kernels import ACCEPTS as SHARED
from fastlm.ops.recurrent_kernels import DTYPES, Layers
from fastlm.ops.recurrent_rules import losses
from fastlm.ops.rnn import step

__all__ = ["ACCEPTS", "DTYPES", "at_once", "cannot", "loses", "run"]

ACCEPTS = SHARED | {"relu plain", "relu packed bidirectional layers"}

_layers = {name: Layers(_native, name, partial(step, name)) for name in ("tanh", "relu")}


def cannot(*args) -> str | None:
    return _layers[args[-1]].cannot(*args[:-1])


def loses(*args) -> str | None:
    return losses(_native, args[-1], *args[:-1])


def run(*args):
    return _layers[args[-1]].run(*args[:-1])


def at_once(*args):
    return _layers[args[-1]].at_once(*args[:-1])
