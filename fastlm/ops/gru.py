"""Gated recurrent units (Cho et al. 2014, https://arxiv.org/abs/1406.1078), gate order r, z, n.

PyTorch's and cuDNN's form, where the reset gate acts after the product with U:

    r, z = σ(W x_t + b + U h_{t-1} + b')         n = tanh(W x_t + b + r ⊙ (U h_{t-1} + b'))
    h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}
"""

from functools import partial
from typing import overload

from torch import Tensor
from torch.nn.functional import linear

from fastlm.dispatch import Op, at_once
from fastlm.ops import recurrent


@overload
def gru(input: Tensor, hx: Tensor, params: list[Tensor], has_biases: bool, num_layers: int, dropout: float,
        train: bool, bidirectional: bool, batch_first: bool) -> tuple[Tensor, Tensor]: ...


@overload
def gru(data: Tensor, batch_sizes: Tensor, hx: Tensor, params: list[Tensor], has_biases: bool, num_layers: int,
        dropout: float, train: bool, bidirectional: bool) -> tuple[Tensor, Tensor]: ...


@at_once(lambda *args: op.at_once(*args) if args[0].dim() == 3 else None)
def gru(*args, **kwargs):
    """Run a network of GRU layers; the arguments and results are those of `torch.gru`.

    Args:
        input: [T, B, I], or [B, T, I] when `batch_first`.
        data, batch_sizes: a packed batch instead: [N, I] rows and [T] sequences alive at each step.
        hx: h0 [L·D, B, H] for L layers, D directions.
        params: for each layer and direction w_ih [3H, I], w_hh [3H, H], then b_ih and b_hh [3H] if `has_biases`.
        dropout: between layers, while `train`.

    Returns:
        output [T, B, D·H] (or [B, T, D·H], or [N, D·H]) and h_n [L·D, B, H].

    Raises:
        TypeError: arguments are missing or no tensors.
        RuntimeError: a shape, dtype, device or count does not fit the others.
    """
    return op(*recurrent.canonical("gru", 3, 1, args, kwargs))


def step(projected, states, w_hh, b_hh, w_hr=None):
    h, = states
    xr, xz, xn = projected.chunk(3, -1)
    hr, hz, hn = linear(h, w_hh, b_hh).chunk(3, -1)
    z = (xz + hz).sigmoid()
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return (n + z * (h - n),)


op = Op("gru", reference=partial(recurrent.reference, step), torch=partial(recurrent.stock, "gru"),
        fast=("native",), exports=False,
        samples=partial(recurrent.samples, 3, 1), cost=partial(recurrent.cost, 3), compiled=False)
