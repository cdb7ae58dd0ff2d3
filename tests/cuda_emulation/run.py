"""Run lstm, gru and rnn through an extension whose CUDA kernels are emulated, and hold them to the error rule.

Usage: python run.py EXTENSION [SAMPLE], in a process of its own: the extension takes the place of `fastlm._native`.
Prints a line `op format sample: ok` or `op format sample: ERROR` for each call, then the tiles that ran, each as
`tiles pass format rows sequences`.
"""

import contextlib
import importlib.util
import sys
from types import SimpleNamespace

import torch

spec = importlib.util.spec_from_file_location("fastlm._native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
sys.modules["fastlm._native"] = native

from fastlm import measure, ops  # noqa: E402
from fastlm.dispatch import Sample  # noqa: E402
from fastlm.ops import recurrent, recurrent_cuda  # noqa: E402

GATES_AND_STATES = {"lstm": (4, 2), "gru": (3, 1), "rnn": (1, 1)}
FEATURES = {"no bias", "packed", "packed bidirectional layers", "no sequences", "outliers", "not a number",
            "not contiguous", "relu plain", "relu packed bidirectional layers"}
HOPPER = 227 << 10
# Name -> shape, (multiprocessors, shared memory of a block): few multiprocessors make teams small and take turns.
SIZES = {
    "T1 B1 H1": (dict(steps=1, batch=1, hidden=1), (1, HOPPER)),
    "T3 B1 H33": (dict(steps=3, batch=1, hidden=33), (132, HOPPER)),
    "T7 B3 H7 both ways": (dict(steps=7, batch=3, hidden=7, bidirectional=True), (4, HOPPER)),
    "T2 B17 H33": (dict(steps=2, batch=17, hidden=33), (9, HOPPER)),
    "T3 B17 H64": (dict(steps=3, batch=17, hidden=64), (8, HOPPER)),
    "T3 B33 H70": (dict(steps=3, batch=33, hidden=70), (10, HOPPER)),
    # More sequences than a group takes, whose number changes from step to step, in both directions.
    "tall packed": (dict(lengths=(4,) * 3 + (3,) * 20 + (2,) * 12 + (1,) * 6, hidden=17, bidirectional=True),
                    (6, HOPPER)),
}
# The depth in several loads, and tiles that small layers do not take.
WIDE = {
    "lstm": {"T2 B9 H300": (dict(steps=2, batch=9, hidden=300), (20, HOPPER)),
             "T2 B33 H136": (dict(steps=2, batch=33, hidden=136), (9, HOPPER)),
             "T2 B1 H136": (dict(steps=2, batch=1, hidden=136), (9, HOPPER))},
    "gru": {},
    "rnn": {"T2 B1 H136": (dict(steps=2, batch=1, hidden=136), (3, HOPPER)),
            "T2 B1 H70": (dict(steps=2, batch=1, hidden=70), (3, HOPPER))},
}
FEW = {name: SIZES[name] for name in ("T2 B17 H33",)}

chip, launched, tiles = None, [], set()


def counted(name):
    kernel = getattr(native.cuda, name)

    def run(layer, chip, *rest):
        plan = native.cuda.rnn_plan(layer, name == "rnn_backward", chip)
        launched.append(name)
        tiles.add((name, layer[1], plan["m_tiles"], plan["n_tiles"]))
        kernel(layer, chip, *rest)
    return run


# Tensors say that they are on a GPU, and the GPU is what `chip` says.
torch.Tensor.is_cuda = property(lambda self: True)
torch.cuda.get_device_properties = lambda device: SimpleNamespace(
    major=9, multi_processor_count=chip[0], shared_memory_per_block_optin=chip[1])
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=0)
for kernel in ("rnn_forward", "rnn_backward"):
    setattr(native.cuda, kernel, counted(kernel))


def cases(op):
    """Yield (format, chip, sample): features in float32, sizes in the formats."""
    for sample in op.samples("test", torch.float32, "cpu"):
        if sample.name in FEATURES:
            yield "float32", (7, HOPPER), sample
    for form, sizes in (("float64", SIZES), ("bfloat16", SIZES | WIDE[op.name]), ("float16", FEW), ("float32", FEW),
                        ("tf32", FEW)):
        dtype = torch.float32 if form == "tf32" else getattr(torch, form)
        for name, (shape, chip) in sizes.items():
            args = recurrent.make_args(*GATES_AND_STATES[op.name], dtype, "cpu", **shape)
            yield form, chip, Sample(name, (*args, "tanh") if op.name == "rnn" else args)


def same_as_fake(args):
    """Tell whether the compiler's stand-in for the LSTM's forward pass has its shapes, dtypes and strides."""
    layers = sys.modules["fastlm.ops.lstm_native"]._layers.cuda
    data, batch_sizes, hx, params, *_ = args
    tensors = [data, batch_sizes, *hx, *params]
    for needs in ([True] * len(tensors), [False] * len(tensors)):
        found, fake = (run(tensors, needs) for run in (layers.forward, layers.fake))
        if [(t.shape, t.dtype, t.stride()) for t in found] != [(t.shape, t.dtype, t.stride()) for t in fake]:
            return False
    return True


def wrong(op, form, args):
    """Return the errors that break the rule: for TF32 stock is in float32, so the bound grows as epsilon does."""
    torch.set_float32_matmul_precision("high" if form == "tf32" else "highest")
    slack = 2 ** 13 if form == "tf32" else 1
    return [error for error in measure.errors(op, "native", args) if not error.ours <= slack * error.bound]


torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is filled with NaN
for op in ops.ALL:
    if op.name in GATES_AND_STATES:
        for form, chip, sample in cases(op):  # noqa: B007 get_device_properties reads chip
            if sys.argv[2:] not in ([], [sample.name]):
                continue
            launched.clear()
            recurrent_cuda.chip_of.cache_clear()
            recurrent_cuda.misfit.cache_clear()
            found = wrong(op, form, sample.args)
            assert set(launched) == ({"rnn_forward", "rnn_backward"} if sample.args[2][0].numel() else set()), launched
            print(f"{op.name} {form} {sample.name}:", found or "ok", flush=True)
            if op.name == "lstm" and sample.name in SIZES:
                assert same_as_fake(sample.args), sample.name
for name, number, m, n in sorted(tiles):
    print(f"tiles {name} {number} {m} {n}")
