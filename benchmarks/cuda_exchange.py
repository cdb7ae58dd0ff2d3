"""The second experiment on a GPU: the ways in which blocks of a recurrent kernel exchange, against each other.

One LSTM or GRU layer, T = 512, input as wide as the hidden state: stock, the kernels in each way that they have
(`recurrent_cuda.EXCHANGES`), and what an exchange takes alone: the same bytes between as many blocks, no arithmetic.
Numbers come first: what breaks the error rule in 32 steps, results or gradients, has no time.
Prints a row for each shape and writes those that there are to FOLDER/cuda-exchange.json.
Usage: python benchmarks/cuda_exchange.py FOLDER [grid] [cluster] ...
"""

import functools
import itertools
import sys

import torch
from cudnn_rnn import Rows

from fastlm import measure, ops
from fastlm.ops import gru_native, lstm_native, recurrent
from fastlm.tools.suites.rnn_cuda import exchanges as alone

CELLS = {"lstm": (4, 2, lstm_native), "gru": (3, 1, gru_native)}
OPS = {op.name: op for op in ops.ALL}
STEPS, CHECKED = 512, 32


def broken(op, layers, run, args) -> str | None:
    """Return what breaks the error rule where `run` takes the place of `layers.run`, or why it cannot take the call."""
    layers.run = run
    try:
        wrong = [error for error in measure.errors(op, "native", args) if not error.ok]
    except RuntimeError as error:
        return str(error)
    finally:
        del layers.run
    return f"breaks the error rule: {wrong}" if wrong else None


def forward(run, args):
    with torch.no_grad():
        return run(*args)


def training(run, args):
    return measure.differentiate(run, args)


def main(folder: str, *exchanges: str) -> None:
    rows = Rows(folder, "cuda-exchange")
    for hidden, batch, (cell, (gates, states, module)) in itertools.product(
            (256, 512, 768, 1024), (1, 16, 64), CELLS.items()):
        def draw(steps, sizes=(gates, states), batch=batch, hidden=hidden):
            return recurrent.make_args(*sizes, torch.bfloat16, "cuda", steps=steps, batch=batch, inputs=hidden,
                                       hidden=hidden)

        op, layers = OPS[cell], module._layers.cuda
        row = {"cell": cell, "batch": batch, "hidden": hidden, "declined": {},
               "alone": {mode.__name__: alone(cell, torch.bfloat16, "cuda", batch, hidden, mode is training)
                         for mode in (forward, training)}}
        candidates = {"stock": op.implementations["torch"].run}
        for exchange in exchanges:
            run = functools.partial(layers.run, exchange=exchange)
            if reason := broken(op, layers, run, draw(CHECKED)):
                row["declined"][exchange] = reason
            else:
                candidates[exchange] = run
        args = draw(STEPS)
        for mode in (forward, training):
            times = measure.timings({name: functools.partial(mode, run, args) for name, run in candidates.items()},
                                    "cuda", 0.2)
            row[mode.__name__] = {name: time.median for name, time in times.items()}
        rows.add(row, f"{cell:5}B{batch:<3} H{hidden:<5}" + "  ".join(
            f"{mode.__name__} " + " ".join(f"{name} {seconds * 1e6 / STEPS:.2f}" for name, seconds in
                                           row[mode.__name__].items()) for mode in (forward, training))
            + " µs a step, alone " + " ".join(f"{name} {seconds * 1e6:.2f}" for of_mode in row["alone"].values()
                                              for name, seconds in of_mode.items()) + f"  {row['declined'] or ''}")


if __name__ == "__main__":
    main(*sys.argv[1:])
