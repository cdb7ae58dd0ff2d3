"""Run lstm, gru and rnn through an extension whose CUDA kernels are emulated, and hold them to the error rule.

Usage: python run.py EXTENSION [SAMPLE], in a process of its own: the extension takes the place of `fastlm._native`.
Samples that take tens of seconds are left out unless FASTLM_DEEP is set.
Prints a line `op exchange format sample: ok` or `op exchange format sample: ERROR` for each call, then the tiles that
ran, each as `tiles pass exchange format rows sequences warps abreast`.
"""

import contextlib
import functools
import importlib.util
import os
import sys
from types import SimpleNamespace

import torch

spec = importlib.util.spec_from_file_location("fastlm._native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
sys.modules["fastlm._native"] = native

import fastlm  # noqa: E402
from fastlm import measure, ops  # noqa: E402
from fastlm.dispatch import Sample  # noqa: E402
from fastlm.ops import recurrent, recurrent_cuda  # noqa: E402

GATES_AND_STATES = {"lstm": (4, 2), "gru": (3, 1), "rnn": (1, 1)}
FEATURES = {"no bias", "packed", "packed bidirectional layers", "no sequences", "outliers", "not a number",
            "not contiguous", "relu plain", "relu packed bidirectional layers"}
# Multiprocessors, shared memory of a block, blocks of a cluster, clusters of a plane: few multiprocessors make teams
# small and take turns.
HOPPER = {count: (count, 227 << 10, 16, count // 9) for count in (1, 3, 4, 6, 7, 8, 9, 10, 20, 40, 70, 132)}
SIZES = {
    "T1 B1 H1": (dict(steps=1, batch=1, hidden=1), HOPPER[1]),
    "T3 B1 H33": (dict(steps=3, batch=1, hidden=33), HOPPER[132]),
    "T7 B3 H7 both ways": (dict(steps=7, batch=3, hidden=7, bidirectional=True), HOPPER[4]),
    "T2 B17 H33": (dict(steps=2, batch=17, hidden=33), HOPPER[9]),
    "T3 B17 H64": (dict(steps=3, batch=17, hidden=64), HOPPER[8]),
    "T3 B33 H70": (dict(steps=3, batch=33, hidden=70), HOPPER[10]),
    # More sequences than a group takes, whose number changes from step to step, in both directions.
    "tall packed": (dict(lengths=(4,) * 3 + (3,) * 20 + (2,) * 12 + (1,) * 6, hidden=17, bidirectional=True),
                    HOPPER[6]),
}
# The depth in several loads, or not held in registers, and tiles that small layers do not take.
WIDE = {
    "lstm": {"T2 B9 H300": (dict(steps=2, batch=9, hidden=300), HOPPER[20]),
             "T2 B33 H136": (dict(steps=2, batch=33, hidden=136), HOPPER[9]),
             "T2 B1 H136": (dict(steps=2, batch=1, hidden=136), HOPPER[9]),
             "T2 B9 H33": (dict(steps=2, batch=9, hidden=33), HOPPER[9]),
             "T3 B33 H7": (dict(steps=3, batch=33, hidden=7), HOPPER[3]),
             "T3 B17 H33": (dict(steps=3, batch=17, hidden=33), HOPPER[4]),
             "T2 B1 H1030": (dict(steps=2, batch=1, inputs=1, hidden=1030), HOPPER[70])},
    "gru": {},
    "rnn": {"T2 B1 H136": (dict(steps=2, batch=1, hidden=136), HOPPER[6]),
            "T2 B1 H70": (dict(steps=2, batch=1, hidden=70), HOPPER[3]),
            "T3 B33 H7": (dict(steps=3, batch=33, hidden=7), HOPPER[1])},
}
FEW = {name: SIZES[name] for name in ("T2 B17 H33",)}
# 256 units and more, groups that are not full, two turns.
CLUSTERS = {name: SIZES[name] for name in
            ("T1 B1 H1", "T7 B3 H7 both ways", "T2 B17 H33", "T3 B33 H70", "tall packed")} | {
    "T5 B3 H256": (dict(steps=5, batch=3, hidden=256), HOPPER[132]),
    "T2 B17 H250": (dict(steps=2, batch=17, hidden=250), HOPPER[20]),
    "T3 B3 H290": (dict(steps=3, batch=3, hidden=290), HOPPER[132]),
    "T3 B9 H290 both ways": (dict(steps=3, batch=9, hidden=290, bidirectional=True), HOPPER[20]),
}
# Planes, in one cluster and in several, whose last one is not full; groups in turn.
PLANES = {
    "T1 B1 H1": (dict(steps=1, batch=1, hidden=1), HOPPER[20]),
    "T7 B3 H7": (dict(steps=7, batch=3, hidden=7), HOPPER[40]),
    "T3 B17 H70": (dict(steps=3, batch=17, hidden=70), HOPPER[40]),
    "T2 B9 H300": (dict(steps=2, batch=9, hidden=300), HOPPER[132]),
    "T3 B33 H97": (dict(steps=3, batch=33, hidden=97), HOPPER[40]),
    "T2 B3 H90": (dict(steps=2, batch=3, hidden=90), HOPPER[9]),
    "T3 B11 H90": (dict(steps=3, batch=11, hidden=90), HOPPER[9]),
    "tall packed": (dict(SIZES["tall packed"][0], bidirectional=False), HOPPER[40]),
}
ONE = {"T1 B1 H1": PLANES["T1 B1 H1"]}
SLOW = {("grid", "T2 B1 H1030"), ("cluster", "T3 B9 H290 both ways"), ("plane", "T2 B9 H300"), ("plane", "T3 B33 H97")}
NOT_NUMBERS = {"NaN of all bits": dict(steps=3, batch=9),
               "NaN of all bits, packed": dict(lengths=(3, 3, 2, 2, 2, 1), bidirectional=True)}

WAYS = {number: name for name, number in recurrent_cuda.EXCHANGES.items()}
KINDS = ("m_tiles", "n_tiles", "warps", "abreast")
chip, launched, tiles = None, [], set()


def counted(name):
    kernel = getattr(native.cuda, name)

    def run(layer, chip, *rest):
        plan = native.cuda.rnn_plan(layer, name == "rnn_backward", chip)
        launched.append(name)
        tiles.add((name, WAYS[plan["exchange"]], layer[1], *(plan[key] for key in KINDS)))
        kernel(layer, chip, *rest)
    return run


# Tensors say that they are on a GPU, and the GPU is what `chip` says.
torch.Tensor.is_cuda = property(lambda self: True)
torch.cuda.get_device_properties = lambda device: SimpleNamespace(
    major=9, multi_processor_count=chip[0], shared_memory_per_block_optin=chip[1])
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=0)
assert native.cuda.largest_cluster(227 << 10) == 16
assert native.cuda.planes(227 << 10, 0) == 1
native.cuda.largest_cluster = lambda shared: chip[2]
native.cuda.planes = lambda shared, stream: chip[3]
for kernel in ("rnn_forward", "rnn_backward"):
    setattr(native.cuda, kernel, counted(kernel))


def cases(op):
    """Yield (exchange, format, chip, sample): features in float32, sizes in the formats."""
    for sample in op.samples("test", torch.float32, "cpu"):
        if sample.name in FEATURES:
            yield "grid", "float32", HOPPER[7], sample
    for exchange, form, sizes in (
            ("grid", "float64", SIZES), ("grid", "bfloat16", SIZES | WIDE[op.name]), ("grid", "float16", FEW),
            ("grid", "float32", FEW), ("grid", "tf32", FEW), ("cheapest", "float32", FEW),
            ("cheapest", "bfloat16", FEW), ("cluster", "bfloat16", CLUSTERS), ("cluster", "float16", FEW),
            ("plane", "bfloat16", PLANES), ("plane", "float16", ONE)):
        if exchange in ("cluster", "plane") and op.name == "rnn":
            continue
        dtype = torch.float32 if form == "tf32" else getattr(torch, form)
        for name, (shape, chip) in sizes.items():
            if (exchange, name) in SLOW and not os.environ.get("FASTLM_DEEP"):
                continue
            args = recurrent.make_args(*GATES_AND_STATES[op.name], dtype, "cpu", **shape)
            yield exchange, form, chip, Sample(name, (*args, "tanh") if op.name == "rnn" else args)
        if exchange == "grid" or (exchange in ("cluster", "plane") and form == "bfloat16"):  # as in empty places
            for name, shape in NOT_NUMBERS.items():
                if exchange == "plane" and "bidirectional" in shape:
                    continue
                args = recurrent.make_args(*GATES_AND_STATES[op.name], dtype, "cpu", hidden=9, **shape)
                for tensor in (args[0], *args[2]):
                    set_all_bits(tensor)
                yield exchange, form, HOPPER[20], Sample(name, (*args, "tanh") if op.name == "rnn" else args)


def set_all_bits(tensor):
    """Make a number in the middle of the tensor a NaN of all bits."""
    bits = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])
    bits.view(-1)[tensor.numel() // 2] = -1
    assert tensor.isnan().sum() == 1


def spreads(op, args):
    """Tell whether NaN of all bits in the gradients of the results reach the same gradients as in stock."""
    with fastlm.backend("torch"):
        _, upstream, _ = measure.differentiate(op, args)
    for gradient in upstream:
        set_all_bits(gradient)
    reached = []
    for name in ("native", "torch"):
        with fastlm.backend(name):
            reached.append([g.isnan() for g in measure.differentiate(op, args, upstream)[2]])
    return all(ours.equal(stock) for ours, stock in zip(*reached, strict=True))


def layers_of(op):
    """Return the CudaLayers that an op runs."""
    layers = sys.modules[f"fastlm.ops.{op.name}_native"]._layers
    return [each.cuda for each in (layers.values() if isinstance(layers, dict) else [layers])]


def same_as_fake(args):
    """Tell whether the compiler's stand-in for the LSTM's forward pass has its shapes, dtypes and strides."""
    layers = sys.modules["fastlm.ops.lstm_native"]._layers.cuda
    data, batch_sizes, hx, params, *_ = args
    tensors = [data, batch_sizes, *hx, *params]
    for needs in ([True] * len(tensors), [False] * len(tensors)):
        found, fake = (run(tensors, needs, "grid") for run in (layers.forward, layers.fake))
        if [(t.shape, t.dtype, t.stride()) for t in found] != [(t.shape, t.dtype, t.stride()) for t in fake]:
            return False
    return True


def wrong(op, form, args):
    """Return the errors that break the rule: for TF32 stock is in float32, so the bound grows as epsilon does."""
    torch.set_float32_matmul_precision("high" if form == "tf32" else "highest")
    slack = 2 ** 13 if form == "tf32" else 1
    return [error for error in measure.errors(op, "native", args) if not error.ours <= slack * error.bound]


torch.backends.mkldnn.set_flags(False)  # its bfloat16 products read past a row's end on some CPUs: NaN
torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is filled with NaN
for op in ops.ALL:
    if op.name in GATES_AND_STATES:
        for exchange, form, chip, sample in cases(op):  # noqa: B007 get_device_properties reads chip
            if sys.argv[2:] not in ([], [sample.name]):
                continue
            launched.clear()
            recurrent_cuda.chip_of.cache_clear()
            recurrent_cuda.misfit.cache_clear()
            for layers in layers_of(op):
                layers.run = functools.partial(type(layers).run, layers, exchange=exchange)
            found = wrong(op, form, sample.args)
            assert set(launched) == ({"rnn_forward", "rnn_backward"} if sample.args[2][0].numel() else set()), launched
            print(f"{op.name} {exchange} {form} {sample.name}:", found or "ok", flush=True)
            if sample.name in NOT_NUMBERS:
                numbers = recurrent.make_args(*GATES_AND_STATES[op.name], sample.args[0].dtype, "cpu", hidden=9,
                                              **NOT_NUMBERS[sample.name])
                assert spreads(op, (*numbers, "tanh") if op.name == "rnn" else numbers), sample.name
            if op.name == "lstm" and sample.name in SIZES:
                assert same_as_fake(sample.args), sample.name
if not sys.argv[2:]:
    for cluster, blocks, teams, size in ((False, 5, 2, 300), (True, 3, 2, 300), (True, 16, 1, 4096)):
        memory, taken = torch.zeros(teams * 4 * (size + 15) + 16, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
        at = -(-memory.data_ptr() // 16) * 16
        native.cuda.exchange_alone(cluster, blocks, teams, size, 4, at, taken.data_ptr(), 0)
        print("exchanged", cluster, flush=True)
for found in sorted(tiles):
    print("tiles", *found)
