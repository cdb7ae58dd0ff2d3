"""Run lstm, gru and rnn through an extension that multiplies pairs, emulated or not, and hold them to the error rule.

Usage: python run.py EXTENSION [SAMPLE...], in a process of its own: the extension takes the place of `fastlm._native`.
Prints a line `op precision sample: DIGEST ok` or `op precision sample: DIGEST ERRORS` for each call, where precision is
bfloat16 for inputs of that type, and high or medium for float32 inputs under `torch.set_float32_matmul_precision`.
Calls whose results and gradients are the same, bit by bit, have the same digest.
"""

import hashlib
import importlib.util
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

spec = importlib.util.spec_from_file_location("fastlm._native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
sys.modules["fastlm._native"] = native

import fastlm  # noqa: E402
from fastlm import measure, ops  # noqa: E402
from fastlm.dispatch import Sample  # noqa: E402
from fastlm.ops import recurrent  # noqa: E402

GATES_AND_STATES = {"lstm": (4, 2), "gru": (3, 1), "rnn": (1, 1)}
SIZES = {f"T{t} B{b} H{h}": {"steps": t, "batch": b, "hidden": h}
         for t, b, h in ((3, 2, 1), (2, 16, 32), (3, 17, 31), (2, 33, 65), (2, 50, 48))}
SIZES["tall packed"] = {"lengths": (4,) * 3 + (3,) * 20 + (2,) * 12 + (1,) * 6, "hidden": 17, "bidirectional": True}


class Reduced(TorchDispatchMode):
    """Multiply matrices of numbers that are a sum of so many of bfloat16, the rest of each cut off."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm"):
            args = (*args[:-2], *map(self.cut, args[-2:]))
        return func(*args, **(kwargs or {}))

    def cut(self, x):
        left = x
        for _ in range(self.parts):
            left = left - left.bfloat16().to(x.dtype)
        return x - left


def check(op, precision, args):
    """Return a digest of the call's results and those that break the error rule of DESIGN.md.

    Below the highest precision the rule's yardstick is the reference at that precision, and one unit of rounding there
    is added: the errors of few numbers are drawn by chance.
    """
    reference = op.implementations["reference"].run
    if precision == "bfloat16":
        args, unit = measure.cast(args, torch.bfloat16), 0.0
        ours = differentiate("native", op, args)
        stock = differentiate("torch", op, args, ours[1])
    else:
        parts, unit = {"high": (2, 2**-16), "medium": (1, 2**-8)}[precision]
        torch.set_float32_matmul_precision(precision)
        ours = differentiate("native", op, args)
        torch.set_float32_matmul_precision("highest")
        with Reduced(parts):
            stock = measure.differentiate(reference, args, ours[1])
    exact = measure.differentiate(reference, measure.cast(args, torch.float64), measure.cast(ours[1], torch.float64))
    ours, stock, exact = (found[0] + found[2] for found in (ours, stock, exact))
    wrong = []
    for error, x in zip(measure.compare(range(len(ours)), ours, stock, exact), exact, strict=True):
        finite = x[x.isfinite()].abs()
        bound = error.bound + unit * (finite.max().item() if finite.numel() else 0.0)
        if not error.ours <= bound:
            wrong.append(error)
    digest = hashlib.sha256(b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in ours)).hexdigest()
    return digest[:12], wrong


def differentiate(name, op, args, upstream=None):
    with fastlm.backend(name):
        return measure.differentiate(op, args, upstream)


def samples(op):
    yield from op.samples("test", torch.float32, "cpu")
    for name, shape in SIZES.items():
        args = recurrent.make_args(*GATES_AND_STATES[op.name], torch.float32, "cpu", **shape)
        yield Sample(name, (*args, "tanh") if op.name == "rnn" else args)


assert native.pairs
native.amx = True  # torch's products may be made by it
torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is filled with NaN
for op in ops.ALL:
    if op.name not in GATES_AND_STATES:
        continue
    torch.manual_seed(0)
    for i, sample in enumerate(samples(op)):
        if (sys.argv[2:] and sample.name not in sys.argv[2:]) or op.implementations["native"].cannot(*sample.args):
            continue
        for precision in ("bfloat16", "high", "medium"):
            torch.manual_seed(i)
            digest, wrong = check(op, precision, sample.args)
            print(f"{op.name} {precision} {sample.name}: {digest}", wrong or "ok")
