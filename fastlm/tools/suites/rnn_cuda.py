"""Recurrent layers on an NVIDIA GPU against torch.nn's, which are cuDNN's: forward and training.

Inputs are as wide as the hidden state. A row's share is of a floor that any kernel with the weights on the chip has.
"""

import functools
import importlib.util
import itertools
from collections.abc import Iterator, Sequence

import torch

from fastlm import measure
from fastlm.tools.suites import Case, Goal, Subject, first, module_errors, module_subject, pair

MORE = {"2 layers": dict(num_layers=2), "both directions": dict(bidirectional=True)}  # whose rows have no goals
STEPS, CHECKED = 512, 64  # of which so many are compared with float64, where cuDNN is slow
HIDDEN, BATCH = (256, 512, 650, 768, 1024), (1, 16, 64)
FLASHRNN = (1024, 16, 768)  # steps, sequences, hidden units of the figure in FlashRNN's paper
GATES = {"LSTM": 4, "GRU": 3}
MODES = ("forward", "training")
MEAN = {("LSTM", torch.bfloat16): 2.0, ("GRU", torch.bfloat16): 2.0, ("GRU", torch.float16): 2.0}
SHARE = 0.5


def cases(device: str, dtypes: Sequence[torch.dtype] | None = None) -> Iterator[Case]:
    wanted = dtypes or (torch.bfloat16, torch.float16)
    for dtype, cell, hidden, batch in itertools.product(wanted, GATES, HIDDEN, BATCH):
        yield _case(cell, dtype, device, STEPS, batch, hidden)
    for dtype, cell, hidden, more in itertools.product(wanted, GATES, (256, 768), MORE):
        yield _case(cell, dtype, device, STEPS, 16, hidden, more=more)
    if torch.bfloat16 in wanted and importlib.util.find_spec("flashrnn"):
        yield _case("LSTM", torch.bfloat16, device, *FLASHRNN, against="FlashRNN")


def _case(cell, dtype, device, steps, batch, hidden, against="", more=""):
    goals = {} if more else {mode: _goal(cell, dtype, mode, batch, hidden, against) for mode in MODES}
    case = f"T{steps} B{batch} H{hidden}" + (f" {more}" if more else f" against {against}" if against else "")
    build = functools.partial(_layer, cell, dtype, device, steps, batch, hidden, against, MORE.get(more, {}))
    return Case("rnn-cuda", cell, case, dtype, build, MODES, goals, ("native",))


def _goal(cell, dtype, mode, batch, hidden, against):
    if against:
        return Goal(1.0)
    mean = MEAN.get((cell, dtype))
    if mean:
        return Goal(share=SHARE, means={f"{cell} {str(dtype)[6:]} {mode}": mean})
    friendly = hidden % 128 == 0 and batch % 8 == 0  # where cuDNN's own persistent kernel runs
    return Goal(1.0 if friendly else None, share=SHARE)


def _layer(cell, dtype, device, steps, batch, hidden, against, options) -> Subject:
    if torch.device(device).type != "cuda":
        raise ValueError("rnn-cuda: needs an NVIDIA GPU (--device cuda), there is none here" if not
                         torch.cuda.is_available() else "rnn-cuda: measures a GPU: --device cuda")
    stock, ours = pair(cell, hidden, hidden, device=device, dtype=dtype, **options)
    x = torch.randn(steps, batch, hidden, device=device).to(dtype)
    floors = {} if options else {
        name: functools.partial(floor, cell, dtype, device, steps, batch, hidden, mode)
        for name, mode in zip(("floor", "training_floor"), MODES, strict=True)}
    subject = module_subject(stock, ours, first, x, **floors)
    few = (x[:CHECKED], subject.args[1])
    subject.errors = lambda ran: module_errors(few, subject.ours, subject.baselines["torch"])
    if against:
        subject.baselines[against] = _flashrnn
    return subject


def floor(cell: str, dtype: torch.dtype, device: str, steps: int, batch: int, hidden: int, mode: str) -> float:
    """Return seconds: weights read once, at each step an exchange between blocks, and the products that do not recur.

    The exchange is the faster of two that this GPU was measured at, with nothing else to do: `exchanges`. That of a
    plane, which reads less from L2 than a grid, is not measured: where one is taken, backward, it may be below.
    """
    gates = GATES[cell]
    flops, copy = measure.peaks(device, dtype)
    weights = gates * hidden * hidden
    read, products = weights * dtype.itemsize / copy, 2 * weights * steps * batch / flops
    seconds = read + products + steps * min(exchanges(cell, dtype, device, batch, hidden, False).values())
    if mode == "forward":
        return seconds
    return seconds + read + 3 * products + steps * min(exchanges(cell, dtype, device, batch, hidden, True).values())


def exchanges(cell: str, dtype: torch.dtype, device: str, batch: int, hidden: int, backward: bool) -> dict[str, float]:
    """Return the seconds of a step's exchange alone: of h, backward of the gates' gradients or their products."""
    from fastlm.ops import lstm_native, recurrent_cuda

    native = lstm_native._layers.native
    if reason := recurrent_cuda.missing(native):
        raise RuntimeError(f"rnn-cuda: nothing to measure the floor with: {reason}")
    layer = recurrent_cuda.CELLS[cell.lower()], recurrent_cuda.NUMBERS[dtype], batch, hidden, 1
    return recurrent_cuda.exchange_alone(native, layer, backward, device)


def _flashrnn(x, params):
    """Run FlashRNN's fused kernel with one head and our input projection."""
    from flashrnn import flashrnn

    w_ih, w_hh, b_ih, b_hh = params
    hidden = w_hh.shape[1]
    projected = torch.nn.functional.linear(x, w_ih).transpose(0, 1).reshape(*x.shape[1::-1], 4, 1, hidden)
    states, _ = flashrnn(projected, w_hh.view(4, 1, hidden, hidden), (b_ih + b_hh).view(4, 1, hidden),
                         function="lstm", backend="cuda_fused")
    return states[0]
