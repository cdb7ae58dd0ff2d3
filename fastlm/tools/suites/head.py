"""The language model's head: linear_cross_entropy, cross_entropy, distillation and quantized_linear at models' sizes.

And `linear` on the CPU: the layers of a model that generates, token by token, and of one that trains.

Time is compared with the best of eager PyTorch and, for linear_cross_entropy, its own chunked function.
"""

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from fastlm import measure
from fastlm.tools.suites import OPS, Case, Goal, Subject, op_subject, quantized

CHUNKED = {"accurate": "aspect_ratio", "balanced": "aspect_ratio", "compact": "aspect_ratio:2"}  # policy -> chunks

# (tokens, hidden, classes), dtype -> our time over stock's and our memory over eager's that are to be reached
CPU_LINEAR = {((1024, 512, 50257), torch.float32): (0.75, 0.3), ((1024, 512, 50257), torch.bfloat16): (0.75, 0.3),
              ((2048, 1024, 128256), torch.bfloat16): (0.9, 0.3), ((700, 650, 10000), torch.float32): (0.75, 0.3)}
GPU_LINEAR = {((8192, 4096, 128256), torch.bfloat16): (1.05, 0.25)}
CPU_ROWS = ((1024, 50257), (512, 131072))
GPU_ROWS = ((8192, 32000), (8192, 131072))
GENERATION = ((1, 4096, 4096), (4, 4096, 4096), (16, 4096, 4096), (1, 512, 50257))  # rows, in, out
TRAINING = ((4096, 512, 2048), (4096, 2048, 512))


def cases(device: str, dtypes: Sequence[torch.dtype] | None = None) -> Iterator[Case]:
    gpu = torch.device(device).type == "cuda"
    for ((n, h, v), dtype), (time, memory) in (GPU_LINEAR if gpu else CPU_LINEAR).items():
        if (dtypes is None or dtype in dtypes) and not (dtype.itemsize < 4 and v > 100000 and _emulates_bf16(device)):
            # A float32 gradient of a 16-bit W is what float32 accumulation costs, and does not count.
            allowance = 4 * v * h if dtype.itemsize < 4 else 0
            goal = Goal(ratio=1 / time, memory=memory, share=0.8 if gpu else None, allowance=allowance)
            build = functools.partial(_linear, n, h, v, dtype, device)
            yield _case("linear_cross_entropy", f"{n}x{h}x{v}", dtype, build, {"training": goal})
    for dtype in dtypes or ((torch.bfloat16, torch.float32) if gpu else (torch.float32, torch.bfloat16)):
        goals = dict(training=Goal(share=0.8)) if gpu else dict.fromkeys(("forward", "training"), Goal(ratio=0.95))
        for n, v in GPU_ROWS if gpu else CPU_ROWS:
            yield _case("cross_entropy", f"{n}x{v}", dtype, functools.partial(_rows, n, v, dtype, device), goals)
    dtype = torch.bfloat16 if gpu else torch.float32
    if dtypes is None or dtype in dtypes:
        goal = Goal(share=0.65) if gpu else Goal(ratio=1 / 0.7, memory=0.25)
        yield _case("distillation", "1024x512x50257, teacher 1024", dtype,
                    functools.partial(_distillation, dtype, device), {"training": goal})
    if not gpu:
        for dtype in dtypes or (torch.float32, torch.bfloat16):
            for sizes, mode in (*((s, "forward") for s in GENERATION), *((s, "training") for s in TRAINING)):
                yield _case("linear", "x".join(map(str, sizes)), dtype, functools.partial(_layer, *sizes, dtype),
                            {mode: Goal(ratio=0.95)})
    yield from quantized.cases(device, dtypes)


def _emulates_bf16(device):
    """Tell whether 16-bit products are slow here: of the largest head stock takes half a minute a call."""
    return device == "cpu" and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _case(name, case, dtype, build, goals):
    return Case("head", name, case, dtype, build, goals=goals, fast=OPS[name].fast)


def _linear(n, h, v, dtype, device) -> Subject:
    torch.manual_seed(0)
    x, weight = torch.randn(n, h, device=device).to(dtype), (torch.randn(v, h, device=device) / h**0.5).to(dtype)
    target = torch.randint(v, (n,), device=device)
    args = (x, weight, target, None, None, "mean", -100, 0.0, None, 0.0, 0.0, False, "")
    op = OPS["linear_cross_entropy"]
    # Three products of N, H and V, and one pass over the logits that the cost counts as one product.
    subject = op_subject(op, args, training_floor=lambda: 3 * measure.floor(op, args))
    if hasattr(F, "linear_cross_entropy"):
        subject.baselines |= {f"torch chunked, {policy}": _chunked(policy) for policy in _policies(dtype, device)}
    return subject


def _policies(dtype, device):
    """On a CPU the first is the fastest, at three times eager's time, and 16-bit products take seconds."""
    return CHUNKED if device != "cpu" else [*CHUNKED][: dtype.itemsize > 2]


def _chunked(policy):
    def run(x, weight, target, *rest):
        options = torch.nn.LinearCrossEntropyOptions(acc_policy=policy, chunking_method=CHUNKED[policy])
        return F.linear_cross_entropy(x, weight, target, options=options)
    return run


def _rows(n, v, dtype, device) -> Subject:
    torch.manual_seed(0)
    x = torch.randn(n, v, device=device).to(dtype)
    args = (x, torch.randint(v, (n,), device=device), None, -100, "mean", 0.0)
    op = OPS["cross_entropy"]
    return op_subject(op, args, training_floor=lambda: 3 * measure.floor(op, args))


def _layer(rows, inputs, outputs, dtype) -> Subject:
    torch.manual_seed(0)
    args = tuple(torch.randn(shape).to(dtype) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
    return op_subject(OPS["linear"], args, reads=args[1].nbytes if rows == 1 else None)


def _distillation(dtype, device) -> Subject:
    torch.manual_seed(0)
    op = OPS["distillation"]
    args = next(op.samples("bench", dtype, device)).args
    student = 2 * args[0].numel() * args[1].shape[0]
    return op_subject(op, args, training_floor=lambda: measure.floor(op, args) + 2 * student / measure.peaks(
        device, dtype)[0])
