"""Elman's recurrent network: h_t = φ(W x_t + b + U h_{t-1} + b') with φ = tanh or relu."""

from typing import overload

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlm.dispatch import Op, Sample, at_once
from fastlm.ops import recurrent

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


@overload
def rnn(input: Tensor, hx: Tensor, params: list[Tensor], has_biases: bool, num_layers: int, dropout: float,
        train: bool, bidirectional: bool, batch_first: bool, *, nonlinearity: str = "tanh"
        ) -> tuple[Tensor, Tensor]: ...


@overload
def rnn(data: Tensor, batch_sizes: Tensor, hx: Tensor, params: list[Tensor], has_biases: bool, num_layers: int,
        dropout: float, train: bool, bidirectional: bool, *, nonlinearity: str = "tanh"
        ) -> tuple[Tensor, Tensor]: ...


@at_once(lambda *args, nonlinearity="tanh": op.at_once(*args, nonlinearity) if args[0].dim() == 3 else None)
def rnn(*args, nonlinearity="tanh", **kwargs):
    """Run a network of Elman layers; arguments and results are those of `torch.rnn_tanh` and `torch.rnn_relu`.

    Args:
        input: [T, B, I], or [B, T, I] when `batch_first`.
        data, batch_sizes: a packed batch instead: [N, I] rows and [T] sequences alive at each step.
        hx: h0 [L·D, B, H] for L layers, D directions.
        params: for each layer and direction w_ih [H, I], w_hh [H, H], then b_ih and b_hh [H] if `has_biases`.
        dropout: between layers, while `train`.
        nonlinearity: "tanh" or "relu".

    Returns:
        output [T, B, D·H] (or [B, T, D·H], or [N, D·H]) and h_n [L·D, B, H].

    Raises:
        ValueError: an unknown nonlinearity.
        TypeError: arguments are missing or no tensors.
        RuntimeError: a shape, dtype, device or count does not fit the others.
    """
    if nonlinearity not in ACTIVATIONS:
        raise ValueError(f"rnn: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    return op(*recurrent.canonical("rnn", 1, 1, args, kwargs), nonlinearity)


def step(nonlinearity, projected, states, w_hh, b_hh, w_hr=None):
    return (ACTIVATIONS[nonlinearity](projected + linear(states[0], w_hh, b_hh)),)


def reference(*args):
    *args, nonlinearity = args
    return recurrent.reference(lambda *now: step(nonlinearity, *now), *args)


def stock(*args):
    *args, nonlinearity = args
    return recurrent.stock(nonlinearity, *args)


def samples(scale: str, dtype: torch.dtype, device: str):
    for sample in recurrent.samples(1, 1, scale, dtype, device):
        yield Sample(sample.name, (*sample.args, "tanh"))
    if scale == "test":
        for name in ("plain", "hidden 129", "long", "packed bidirectional layers", "one sequence"):
            args = recurrent.make_args(1, 1, dtype, device, **recurrent.TEST_SHAPES[name])
            yield Sample(f"relu {name}", (*args, "relu"))


def cost(*args) -> tuple[int, int]:
    return recurrent.cost(1, *args[:-1])


op = Op("rnn", reference=reference, torch=stock, fast=("native",), exports=False, samples=samples,
        cost=cost, compiled=False)
