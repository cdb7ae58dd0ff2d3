"""Long short-term memory (Hochreiter & Schmidhuber 1997, with forget gates), gate order i, f, g, o.

    i, f, o = σ(W x_t + b + U h_{t-1} + b')      g = tanh(W x_t + b + U h_{t-1} + b')
    c_t = f ⊙ c_{t-1} + i ⊙ g                    h_t = P (o ⊙ tanh c_t)

P is the projection of Sak et al. 2014 (https://arxiv.org/abs/1402.1128), the identity where there is none.
"""

from functools import partial
from typing import overload

import torch
from torch import Tensor

from fastlm.dispatch import Op, at_once
from fastlm.ops import recurrent


@overload
def lstm(input: Tensor, hx: list[Tensor] | tuple[Tensor, Tensor], params: list[Tensor], has_biases: bool,
         num_layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool
         ) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def lstm(data: Tensor, batch_sizes: Tensor, hx: list[Tensor] | tuple[Tensor, Tensor], params: list[Tensor],
         has_biases: bool, num_layers: int, dropout: float, train: bool, bidirectional: bool
         ) -> tuple[Tensor, Tensor, Tensor]: ...


@at_once(lambda *args: op.at_once(*args) if args[0].dim() == 3 else None)
def lstm(*args, **kwargs):
    """Run a network of LSTM layers; the arguments and results are those of `torch.lstm`.

    Args:
        input: [T, B, I], or [B, T, I] when `batch_first`.
        data, batch_sizes: a packed batch instead: [N, I] rows and [T] sequences alive at each step.
        hx: (h0 [L·D, B, P], c0 [L·D, B, H]) for L layers, D directions; P = H without projection.
        params: for each layer and direction w_ih [4H, I], w_hh [4H, P], then b_ih and b_hh [4H] if `has_biases`,
            then w_hr [P, H] if the output is projected.
        dropout: between layers, while `train`.

    Returns:
        output [T, B, D·P] (or [B, T, D·P], or [N, D·P]), h_n and c_n, shaped as `hx`.

    Raises:
        TypeError: arguments are missing or no tensors.
        RuntimeError: a shape, dtype, device or count does not fit the others.
    """
    return op(*recurrent.canonical("lstm", 4, 2, args, kwargs))


def step(projected, states, w_hh, b_hh, w_hr=None):
    h, c = states
    i, f, g, o = (projected + torch.nn.functional.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h if w_hr is None else h @ w_hr.mT, c


op = Op("lstm", reference=partial(recurrent.reference, step), torch=partial(recurrent.stock, "lstm"),
        fast=("native",), exports=False,
        samples=partial(recurrent.samples, 4, 2), cost=partial(recurrent.cost, 4), compiled=False)
