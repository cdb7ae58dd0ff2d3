"""Recurrent layers on the CPU, held to what the engine set itself to reach: training, inference, streaming.

(T, B, H) are steps, sequences and hidden units; inputs are as wide as the hidden state.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import PackedSequence

import fastlm
from fastlm import measure
from fastlm.tools.suites import Case, Goal, Subject, first, module_subject, pair

SHAPES = ((128, 32, 256), (128, 32, 512), (32, 64, 1024), (512, 1, 512), (35, 20, 650))
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
MODES = {"training": "training", "forward": "inference"}

# dtype, mode -> cell -> ratio of every shape, geometric mean
REACH = {
    (torch.float32, "training"): {"LSTM": (1.1, 1.3), "GRU": (1.15, 2.1), "RNN": (1.1, 1.5)},
    (torch.bfloat16, "training"): {"LSTM": (1.8, 2.7), "GRU": (2.0, 4.8), "RNN": (1.3, 3.0)},
    (torch.float32, "forward"): {"LSTM": (1.05, 1.15), "GRU": (1.15, 1.5), "RNN": (1.1, 1.3)},
    (torch.bfloat16, "forward"): {"LSTM": (1.05, 1.25), "GRU": (1.5, 2.8), "RNN": (1.2, 2.0)},
}
SHARE = {torch.float32: 0.8, torch.bfloat16: 0.6}  # of the GEMM peak, training wide layers on many sequences
TOKENS = 8  # of a stream in one measurement, so that each finds its own weights in the caches
STREAMING = {"LSTM": (5.0, 8.0), "GRU": (1.15, 2.0)}


def cases(device: str, dtypes: Sequence[torch.dtype] | None = None) -> Iterator[Case]:
    wanted = dtypes or (torch.float32, torch.bfloat16)
    if torch.float32 in wanted:
        yield from _streams()
    for dtype, cell, shape in itertools.product(wanted, GATES, SHAPES):
        if dtype in SHARE:
            goals = {mode: _goal(cell, dtype, mode, *shape) for mode in MODES}
            yield _case(cell, "T{} B{} H{}".format(*shape), dtype, _layer, cell, dtype, *shape, goals=goals)
    if torch.float32 in wanted:
        yield from _float32_cases()


def _streams():
    f32 = torch.float32
    for cell, hidden in itertools.product(STREAMING, (256, 512, 1024)):
        every, mean = STREAMING[cell]
        goal = Goal(every, means={f"{cell} float32 streaming": mean})
        yield _case(cell, f"streaming, H{hidden}", f32, _stream, cell, hidden, goals={"forward": goal})
    for hidden in (256, 512, 1024):
        yield _case("LSTM", f"streaming, H{hidden}, where malloc keeps what was freed", f32, _stream, "LSTM", hidden,
                    goals={"forward": Goal()}, fresh=False)
    for hidden in (256, 512, 1024):
        yield _case("LSTM", f"streaming, H{hidden}, stock without oneDNN", f32, _stream, "LSTM", hidden, False,
                    goals={"forward": Goal(1.1)})


def _float32_cases():
    f32 = torch.float32
    for cell in ("LSTM", "GRU"):
        yield _case(cell, "packed, lengths 10 to 128, B32 H512", f32, _packed, cell,
                    goals={mode: Goal(1.3) for mode in MODES})
    for cell, ratio in (("LSTM", 1.1), ("GRU", 1.5)):
        yield _case(cell, "2 layers, both ways, dropout 0.2, T128 B32 H256", f32, _deep, cell,
                    goals={"training": Goal(ratio, memory=1.0)})
    yield _case("LSTM", "projected to 256, T128 B32 H512", f32, _projected, 512, 256,
                goals={"forward": Goal(1.3), "training": Goal(1.3, memory=1.0)})


def _case(cell, case, dtype, build, *args, goals, fresh=True):
    return Case("rnn-cpu", cell, case, dtype, functools.partial(build, *args), tuple(goals), goals, ("native",),
                fresh=fresh)


def _goal(cell, dtype, mode, steps, batch, hidden):
    every, mean = REACH[dtype, mode][cell]
    group = f"{cell} {str(dtype)[6:]} {MODES[mode]}"
    means = {group: mean}
    if (cell, dtype, mode) == ("GRU", torch.float32, "training") and batch > 1:
        means[f"{group}, B > 1"] = 1.6
    train = mode == "training"
    wide = train and hidden >= 512 and batch >= 32
    return Goal(every, memory=1.0 if train else None, share=SHARE[dtype] if wide else None, means=means)


def _layer(cell, dtype, steps, batch, hidden) -> Subject:
    stock, ours = pair(cell, hidden, hidden, dtype=dtype)
    work = 4 * GATES[cell] * hidden * hidden * steps * batch
    return module_subject(stock, ours, first, torch.randn(steps, batch, hidden).to(dtype),
                          floor=lambda: work / measure.peaks("cpu", dtype)[0], products=True,
                          warm=_warm(cell, dtype))


def _stream(cell, hidden, onednn=True) -> Subject:
    """Tokens one by one, state in and out, as generation calls it: the modules themselves, no parameters passed."""
    stock, ours = pair(cell, hidden, hidden)
    x, h = torch.randn(1, 1, hidden), torch.randn(1, 1, hidden)
    state = (h, torch.randn(1, 1, hidden)) if cell == "LSTM" else h
    checked = module_subject(stock, ours, lambda module, x: module(x, measure.cast(state, x.dtype)), x)

    def run(module):
        def tokens(x):
            now = state
            for _ in range(TOKENS):
                y, now = module(x, now)
            return y
        return tokens

    def run_stock(x):
        with torch.backends.mkldnn.flags(enabled=onednn):
            return run(stock)(x)
    return Subject((x,), run(ours), {"torch": run_stock}, checked.errors,
                   reads=TOKENS * sum(p.numel() * p.element_size() for p in stock.parameters()))


def _packed(cell) -> Subject:
    stock, ours = pair(cell, 512, 512)
    lengths = torch.linspace(128, 10, 32).long()
    batch_sizes = (lengths[None] > torch.arange(128)[:, None]).sum(1)
    return module_subject(stock, ours, lambda module, x: module(PackedSequence(x, batch_sizes))[0].data,
                          torch.randn(int(batch_sizes.sum()), 512))


def _deep(cell) -> Subject:
    stock, ours = pair(cell, 256, 256, 2, bidirectional=True, dropout=0.2)
    return module_subject(stock, ours, first, torch.randn(128, 32, 256), warm=_warm(cell, torch.float32))


def _projected(hidden, projection) -> Subject:
    stock, ours = pair("LSTM", hidden, hidden, proj_size=projection)
    return module_subject(stock, ours, first, torch.randn(128, 32, hidden), warm=_warm("LSTM", torch.float32))


def _warm(cell, dtype):
    def warm(which):
        module = pair(cell, 8, 8, dtype=dtype)[which == "ours"]
        with fastlm.backend("native", "torch"):  # the small one would run stock
            module(torch.randn(2, 2, 8).to(dtype))[0].sum().backward()
    return warm
