"""Compile every Triton kernel for three GPU generations, without a GPU, and bound its registers, spills, shared memory.

The launches come from the functions that the implementations use themselves, on meta tensors, so what is compiled is
what would run. `pytest tests/test_triton.py -s` prints the table.
"""

import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction  # noqa: E402
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: E402

from fastlm.ops import (  # noqa: E402
    activation_triton,
    attention_hopper_launch_triton,
    attention_launch_triton,
    cross_entropy_triton,
    distillation_triton,
    dropout_triton,
    exchange_kernels_triton,
    head_kernels_triton,
    linear_cross_entropy_triton,
    norm_triton,
    quantized_linear_triton,
    rotary_triton,
    softmax_triton,
    triton_kernels,
)
from fastlm.ops.attention_common import Options  # noqa: E402
from fastlm.ops.loss_kernels import Logits, Targets  # noqa: E402

GENERATIONS = (80, 90, 100)
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin"
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
          torch.int32: "i32", torch.int64: "i64", torch.bool: "u1", torch.int8: "i8", torch.uint8: "u8"}


class Resources(NamedTuple):
    registers: int
    spills: int
    shared: int


def compile_launch(plan, generation):
    """Compile a launch `(kernel, grid, arguments)` as Triton's launcher would on a GPU of that generation."""
    kernel, _, arguments = plan
    options = {name: value for name, value in arguments.items() if name not in kernel.arg_names}
    signature, constants, alignment = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        kind, aligned = _specialise(parameter, arguments[parameter.name])
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = arguments[parameter.name]
        elif aligned:
            alignment[(i,)] = [["tt.divisibility", 16]]
    kind = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = kind(kernel, signature, constants, alignment)
    return triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)


def resources(plan, generation) -> Resources:
    """Return registers a thread, bytes of spill stores or loads a thread, and bytes of shared memory a block."""
    compiled = compile_launch(plan, generation)
    registers, spills = _ptxas(compiled.asm["ptx"], generation)
    return Resources(registers, spills, compiled.metadata.shared)


def _specialise(parameter, value):
    """Return (type, divisible by 16), as Triton's launcher specialises an argument."""
    special = not parameter.do_not_specialize
    if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return f"*{DTYPES[value.dtype]}", True
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{DTYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>", False
    if isinstance(value, float):
        return "fp32", False
    return "i32" if -(2**31) <= value < 2**31 else "i64", special and value % 16 == 0


def _ptxas(ptx, generation):
    name = "ptxas-blackwell" if generation >= 100 else "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        target = re.search(r"\.target (\w+)", ptx).group(1)
        report = subprocess.run([PTXAS / name, "-v", f"-arch={target}", path, "-o", f"{folder}/kernel.cubin"],
                                capture_output=True, text=True, check=True).stderr
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups()
    return int(re.search(r"Used (\d+) registers", report).group(1)), max(int(stores), int(loads))


class Case(NamedTuple):
    """A launch to compile for a GPU generation, and the bytes that a thread of it may spill."""

    label: str
    plan: tuple
    generation: int
    spills: int = 0
    deep: bool = False


def tensor(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def softmax_cases(generation):
    with (mock.patch.object(triton_kernels, "generation", lambda device: generation),
          mock.patch.object(exchange_kernels_triton, "launch")):
        yield from cases_of_softmax(generation)


def cases_of_softmax(generation):
    mask = tensor(256, 1, 1, 2048, dtype=torch.bool).expand(256, 16, 128, 2048)
    for label, shape, dtype, dim, mask, log in (  # noqa: B020
            ("4096x1024 float32", (4096, 1024), torch.float32, -1, None, False),
            ("4096x1024 bfloat16 log", (4096, 1024), torch.bfloat16, -1, None, True),
            ("1024x32000 float32", (1024, 32000), torch.float32, -1, None, False),
            ("1024x32000 bfloat16", (1024, 32000), torch.bfloat16, -1, None, False),
            ("256x131072 bfloat16", (256, 131072), torch.bfloat16, -1, None, False),
            ("256x131072 float16 log", (256, 131072), torch.float16, -1, None, True),
            ("8x131072 float32", (8, 131072), torch.float32, -1, None, False),
            ("64x500x64 dim 1", (64, 500, 64), torch.float32, 1, None, False),
            ("256x16x128x2048 masked bfloat16", (256, 16, 128, 2048), torch.bfloat16, -1, mask, False)):
        x = tensor(*shape, dtype=dtype)
        for args in softmax_triton.launches((x, x, mask), dim, softmax_triton.FORWARD_TILE, 2):
            # ptxas spills two registers of its own accord, to run two blocks on a multiprocessor.
            yield Case(label, softmax_triton.plan_forward(*args, 0.125, log), generation, spills=8)
        for args in softmax_triton.launches((x, x, x), dim, softmax_triton.BACKWARD_TILE, 1):
            yield Case(label, softmax_triton.plan_backward(*args, 0.125, log), generation)
    if generation >= 90:
        yield Case("words", exchange_kernels_triton.plan_zero(tensor(256, 16, dtype=torch.int64)), generation)


def norm_cases(generation):
    with mock.patch.object(triton_kernels, "generation", lambda device: generation):
        yield from cases_of_norms(generation)


def cases_of_norms(generation):
    for shape, dtype in (((4096, 512), torch.bfloat16), ((4096, 4096), torch.float32), ((4096, 8192), torch.bfloat16),
                         ((4096, 16384), torch.bfloat16), ((4096, 16384), torch.float32),
                         ((1024, 32768), torch.bfloat16), ((64, 131072), torch.bfloat16)):
        x, rows = tensor(*shape, dtype=dtype), tensor(shape[0])
        weight, total = tensor(shape[1], dtype=dtype), tensor(shape[1], dtype=dtype)
        label = "x".join(map(str, shape)) + f" {str(dtype)[6:]}"
        for kind, residual, bias, mean in (("rms", None, None, None), ("add rms", x, None, None),
                                           ("add layer", x, weight, rows)):
            yield Case(f"{label} {kind}", norm_triton.plan_forward(x, residual, weight, bias, x, residual, mean, rows,
                                                                   1e-5), generation)
            split = norm_triton.split_rows(x, mean)
            parts = tensor(split.teams, shape[1])
            words = tensor(shape[0], split.parts, dtype=torch.int64) if split.parts > 1 else None
            plan = norm_triton.plan_backward(x, residual, x, weight, mean, rows, x, parts,
                                             None if bias is None else parts, words, split)
            # Registers are bounded, so that all programs run at once: a few are spilled for it, more by older ones.
            spills = 80 if split.tile.width > 8192 else 56 if generation == 80 else 32
            yield Case(f"{label} {kind}", plan, generation, spills=spills)
        yield Case(label, norm_triton.plan_sum(parts, parts, total, total), generation)


def streaming_cases(generation):
    """Yield what reads and writes once: gated units, rotary embedding, dropout."""
    for kind in ("silu", "gelu", "gelu_tanh"):
        x = tensor(4096, 8192, dtype=torch.bfloat16)
        half = tensor(4096, 16384, dtype=torch.bfloat16)[:, :8192]
        for label, gate in ((kind, x), (f"{kind} halves", half)):
            yield Case(label, activation_triton.plan_forward(gate, gate, x, kind), generation)
            yield Case(label, activation_triton.plan_backward(x, gate, gate, x, x, kind), generation)
    for interleaved in (False, True):
        x = tensor(4, 2048, 32, 128, dtype=torch.bfloat16).transpose(1, 2)
        angles = tensor(1, 2048, 1, 64).expand(-1, -1, 2, -1)
        for inverse in (False, True):
            yield Case(f"interleaved {interleaved} inverse {inverse}",
                       rotary_triton.plan(x, angles, angles, x, interleaved, inverse), generation)
    x, seed = tensor(4096, 4096, dtype=torch.bfloat16), tensor(1, dtype=torch.int64)
    for residual in (x, None):
        yield Case(f"residual {residual is not None}", dropout_triton.plan(x, residual, seed, x, 0.1), generation)


def cross_entropy_cases(generation):
    target, rows, scalar = tensor(512, dtype=torch.int64), tensor(512), tensor()
    for classes, dtype, smoothing in ((1000, torch.float16, 0.1), (32000, torch.bfloat16, 0.0),
                                      (131072, torch.float32, 0.0), (131072, torch.bfloat16, 0.1)):
        logits = tensor(512, classes, dtype=dtype)
        weight = tensor(classes, dtype=dtype) if smoothing else None
        label, options = f"512x{classes} {dtype} {smoothing}", (-100, smoothing)
        inputs = (logits, target, weight, None if weight is None else scalar)
        # ptxas spills a register of its own accord, to fill a multiprocessor with blocks of 32 registers a thread.
        yield Case(label, cross_entropy_triton.plan_forward(*inputs, *[rows] * 4, *options), generation, spills=4)
        for kind, dloss, total in (("mean", scalar, scalar), ("none", rows, None)):
            plan = cross_entropy_triton.plan_backward(*inputs, rows, rows, dloss, total, logits, *options)
            yield Case(f"{label} {kind}", plan, generation)


def quantized_linear_cases(generation):
    for mode, dtype, group_size in (("int8", torch.float32, 64), ("int8", torch.bfloat16, 64),
                                    ("int8_dynamic", torch.bfloat16, 64), ("int4", torch.float32, 128),
                                    *(("int4", torch.bfloat16, group_size) for group_size in (32, 64, 128))):
        int4, dynamic = mode == "int4", mode == "int8_dynamic"
        values = tensor(16, 4096, dtype=dtype)
        x = tensor(16, 4096, dtype=torch.int8) if dynamic else values
        for rows, outputs in itertools.product((1, 16), (32768, 4096) if group_size == 64 else (4096,)):
            weight = tensor(outputs, 4096 // (1 + int4), dtype=torch.uint8 if int4 else torch.int8)
            scale = tensor(outputs, 4096 // group_size) if int4 else tensor(outputs)
            plan = quantized_linear_triton.plan(
                x[:rows], quantized_linear_triton.in_words(x[:rows], weight), scale,
                tensor(rows, 1) if dynamic else None, tensor(outputs), tensor(rows, outputs, dtype=dtype), mode,
                group_size)
            yield Case(f"{rows} {mode} {dtype} groups of {group_size}, {outputs} outputs", plan, generation)
        if dynamic:
            yield Case("round", quantized_linear_triton.plan_round(values, x, tensor(16, 1)), generation)
            sums = tensor(256, 4096, dtype=torch.int32)
            plan = quantized_linear_triton.plan_scales(sums, tensor(256, 1), scale, tensor(4096), values)
            yield Case("scales", plan, generation)
        elif dtype is torch.bfloat16:
            wide = tensor(4096, 4096, dtype=dtype)
            yield Case(f"{mode} groups of {group_size}",
                       quantized_linear_triton.plan_widen(weight, scale, wide, mode, group_size), generation)


def linear_cross_entropy_cases(generation):
    rows, classes = 512, 128256
    for dtype, capped, even in ((torch.bfloat16, 0.0, 0.0), (torch.float32, 0.0, 0.0), (torch.bfloat16, 30.0, 1e-6)):
        z = tensor(rows, classes, dtype=dtype)
        bias = tensor(classes) if capped else None
        logits = Logits(z, bias, capped)
        targets = Targets(tensor(rows, dtype=torch.int64), 0, tensor(classes) if even else None, None, 1.0, even)
        label = f"{rows}x{classes} {dtype} {capped} {even}"
        read = linear_cross_entropy_triton.plan_read(logits, targets, tensor(rows, 6), bool(capped))
        yield Case(label, read, generation, spills=8)
        yield Case(label, linear_cross_entropy_triton.plan_gradient(logits, targets, tensor(rows, 5), z), generation,
                   spills=8)


def distillation_cases(generation):
    rows, classes = 512, 128256
    for kind, dtype, hard in (("forward_kl", torch.bfloat16, 0.0), ("forward_kl", torch.float32, 0.5),
                              ("reverse_kl", torch.bfloat16, 0.0), ("jsd", torch.bfloat16, 0.5)):
        z, each = tensor(rows, classes, dtype=dtype), tensor(rows)
        logits = Logits(z, tensor(classes) if hard else None, 0.0, 0.5)
        target = tensor(rows, dtype=torch.int64) if hard else None
        plan = distillation_triton.plan(logits, logits, target, kind, 0.5, 1.0, hard, each, each, z)
        yield Case(f"{rows}x{classes} {dtype} {kind} {hard}", plan, generation, spills=4)
    for dtype in (torch.bfloat16, torch.float32):
        gradient, out = tensor(classes, 512, dtype=dtype), tensor(classes, 512, dtype=torch.bfloat16)
        plan = head_kernels_triton.plan_scale(gradient, tensor(), out, dtype is torch.bfloat16)
        yield Case(f"{dtype}", plan, generation)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_rows_of_any_width_are_read_in_whole_vectors(generation):
    """Rows of GPT-2's 50257 classes begin at multiples of 64 numbers; 16 bytes are read at once all the same."""
    student, teacher = (Logits(z, None, 0.0, 1.0) for z in tensor(2, 64, 50304, dtype=torch.bfloat16)[..., :50257])
    each = tensor(64)
    targets = Targets(tensor(64, dtype=torch.int64))
    for plan in (distillation_triton.plan(student, teacher, None, "forward_kl", 1.0, 1.0, 0.0, each, each, teacher.z),
                 linear_cross_entropy_triton.plan_read(student, targets, tensor(64, 6), False),
                 linear_cross_entropy_triton.plan_gradient(student, targets, tensor(64, 5), student.z)):
        ptx = compile_launch(plan, generation).asm["ptx"]
        assert re.search(r"ld\.global\.v4\.b32", ptx)
        assert "read" in plan[0].fn.__name__ or re.search(r"st\.global\.v4\.b32", ptx)


def attention_cases(generation):
    with mock.patch.object(attention_launch_triton, "generation", lambda device: generation):
        yield from cases_of_attention(generation)


def cases_of_attention(generation):
    other = generation != 90  # one stands for all where only loads and comparisons are added
    masks = {kind: tensor(1, 16, 2048, 2048, dtype=kind) for kind in (torch.bool, torch.float32)}
    for dim in (64, 128, 256):
        yield from attention(generation, f"D={dim} float16 causal", dim, torch.float16, is_causal=True,
                             deep=dim > 128 and other)
        yield from attention(generation, f"D={dim} float32 causal", dim, torch.float32, is_causal=True,
                             deep=dim > 64 or other)
    for kind, mask in masks.items():
        yield from attention(generation, f"D=64 bfloat16 {kind} mask", 64, torch.bfloat16, mask=mask, deep=other)
        yield from attention(generation, f"D=128 bfloat16 {kind} mask", 128, torch.bfloat16, mask=mask, deep=True)
    yield from attention(generation, "D=80 Dv=48 bfloat16", 80, torch.bfloat16, value_dim=48, deep=other)
    ids = tensor(2, 2048, dtype=torch.int32)
    features = {"softcap, window": dict(softcap=30.0, left=256, right=0, sinks=tensor(16)),
                "dropout": dict(dropout_p=0.1, draws=tensor(2, 16, 2048, dtype=torch.int64)),
                "alibi": dict(slopes=tensor(1, 16), is_causal=True),
                "documents": dict(query_ids=ids, key_ids=ids, lengths=tensor(2, dtype=torch.int64), is_causal=True)}
    for dim, (name, given) in itertools.product((64, 128), features.items()):
        yield from attention(generation, f"D={dim} bfloat16 {name}", dim, torch.bfloat16, **given,
                             deep=other or (dim, name) not in ((64, "softcap, window"), (128, "dropout")))
    for rows in (64, 128):
        plan = attention_launch_triton.plan_ranges(ids, ids, tensor(2, 2048 // rows, 4, dtype=torch.int32), 1, rows)
        yield Case(f"documents in tiles of {rows}", plan, generation)
    yield from decoding(generation, other)


def hopper_cases(generation):
    """Yield the passes that only Hopper has, of 2048 tokens, 4 query heads to a key head."""
    windows = ({}, dict(is_causal=True), dict(left=256, right=0), dict(left=256))
    for dim, dtype, given in itertools.product((64, 128), (torch.bfloat16, torch.float16), windows):
        q, k = (tensor(2, heads, 2048, dim, dtype=dtype) for heads in (16, 4))
        call = attention_launch_triton.Call(q, k, k, *[None] * 7, Options(scale=0.1, **given))
        alibi = call._replace(slopes=tensor(1, 16))
        dropout = call._replace(draws=tensor(2, 16, 2048, dtype=torch.int64),
                                options=call.options._replace(dropout_p=0.1))
        for label, call in (("", call), ("alibi ", alibi), ("dropout ", dropout)):  # noqa: B020
            plan = attention_hopper_launch_triton.plan(call, q, tensor(*q.shape[:3]), (tensor(2, 16), tensor(2, 4)))
            yield Case(f"Hopper D={dim} {dtype} {label}{given}", plan, generation,
                       112 if label and "left" in given else 32, dtype is torch.float16 or bool(label and given))
    backward = itertools.product((64, 128), (torch.bfloat16, torch.float16), ("", "causal", "alibi", "dropout", "mask"))
    for dim, dtype, feature in backward:
        q, k = (tensor(2, heads, 2048, dim, dtype=dtype) for heads in (16, 4))
        lengths, sums, delta, total = tensor(2, 16), tensor(3, 2, 16, 2048), tensor(2, 16, 2048), tensor(*q.shape)
        options = Options(scale=0.1, is_causal=feature == "causal", dropout_p=0.1 * (feature == "dropout"))
        call = attention_launch_triton.Call(
            q, k, k, tensor(1, 16, 2048, 2048, dtype=dtype) if feature == "mask" else None, None,
            tensor(1, 16) if feature == "alibi" else None, *[None] * 3,
            tensor(2, 16, 2048, dtype=torch.int64) if feature == "dropout" else None, options)
        plan = attention_hopper_launch_triton.plan_backward(call, sums, delta, q, total, k, k, (lengths, lengths))
        label = f"Hopper backward D={dim} {dtype} {feature}"
        yield Case(label, plan, generation, 800, dtype is torch.float16)
        if dtype is torch.bfloat16 and feature in ("", "alibi"):
            yield Case(label, attention_hopper_launch_triton.plan_prepare(call, q, delta, delta, q, sums, delta, total),
                       generation)
            yield Case(label, attention_hopper_launch_triton.plan_unfold(total, q, 0.1), generation)
            yield Case(label, attention_hopper_launch_triton.plan_longest(q, lengths), generation)


def decoding(generation, deep):
    """Yield the launches of a step of generation from pages: two queries of 16 heads, keys split."""
    pool = tensor(512, 16, 4, 128, dtype=torch.bfloat16).transpose(1, 2)
    q, lse = tensor(1, 16, 16, 128, dtype=torch.bfloat16), tensor(1, 16, 16)
    call = attention_launch_triton.Call(
        q, pool, pool, *[None] * 3, tensor(8, dtype=torch.int32), *[None] * 3, Options(scale=0.1, right=0),
        cu_q=tensor(9, dtype=torch.int32), table=tensor(8, 64, dtype=torch.int32), max_q=2, max_k=1024)
    parts, sums = tensor(4, *q.shape), tensor(4, *lse.shape)
    yield Case("pages", attention_launch_triton.plan_forward(call, parts, sums, lse, 4), generation, deep=deep)
    yield Case("parts", attention_launch_triton.plan_combine(parts, sums, q, lse, 4), generation, deep=deep)


def attention(generation, label, dim, dtype, value_dim=None, deep=False, **given):
    """Yield the launches of a training step of attention, 2048 tokens long, 4 query heads to a key head."""
    q, k, v = (tensor(2, heads, 2048, d, dtype=dtype) for heads, d in ((16, dim), (4, dim), (4, value_dim or dim)))
    fields = attention_launch_triton.Call._fields
    options = Options(scale=0.1, **{name: given.pop(name) for name in list(given) if name not in fields})
    call = attention_launch_triton.Call(q, k, v, **dict.fromkeys(fields[3:10]) | given, options=options)
    out, lse = tensor(*q.shape[:3], v.size(3), dtype=dtype), tensor(*q.shape[:3])
    ranges = None if call.query_ids is None else tensor(2, 64, 4, dtype=torch.int32)
    yield Case(label, attention_launch_triton.plan_forward(call, out, lse, lse, 1, ranges), generation, deep=deep)
    places = None if call.slopes is None else tensor(2048)
    given = None if dtype is torch.float32 else out
    plans = [attention_launch_triton.plan_delta(out, lse, lse, lse, lse, out, options.dropout_p),
             attention_launch_triton.plan_keys(call, lse, lse, out, k, v, ranges, places),
             attention_launch_triton.plan_queries(call, given, lse, lse, lse, lse, out, q, ranges)]
    if call.mask is not None and call.mask.is_floating_point():
        parts = attention_launch_triton.parts_of_mask(call)
        plans.append(attention_launch_triton.plan_mask(call, lse, lse, out, parts))
    for plan in plans:
        yield Case(label, plan, generation, 160, deep)


KINDS = (softmax_cases, norm_cases, streaming_cases, cross_entropy_cases, linear_cross_entropy_cases,
         distillation_cases, quantized_linear_cases, attention_cases)
CASES = [*(case for generation in GENERATIONS for kind in KINDS for case in kind(generation)), *hopper_cases(90)]


def title(index):
    case = CASES[index]
    name = case.plan[2].get("KIND", case.plan[0].fn.__name__)
    return f"{case.plan[0].fn.__module__.split('.')[-1]}-{name}-{case.label}-sm_{case.generation}"


def compile_case(index) -> Resources:
    return resources(CASES[index].plan, CASES[index].generation)


@pytest.fixture(scope="module")
def compiled(request):
    """Compile the selected cases in processes of their own: LLVM and ptxas take a core each."""
    deep = request.config.getoption("--deep")
    wanted = [item.callspec.params["index"] for item in request.session.items
              if getattr(item, "function", None) is test_resources]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count(), 8), context) as pool:
        futures = {i: pool.submit(compile_case, i) for i in wanted if deep or not CASES[i].deep}
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.mark.parametrize("index", range(len(CASES)), ids=title)
def test_resources(index, compiled):
    """A launch compiles, fits a multiprocessor of its generation, and keeps its values in registers."""
    if index not in compiled:
        pytest.skip("compiled with --deep")
    case, found = CASES[index], compiled[index].result()
    print(f"\n{title(index):88} {found.registers:4} registers {found.spills:5} B spilled "
          f"{found.shared / 1024:6.1f} KiB shared", end="")
    assert found.shared <= SHARED_MEMORY[case.generation]
    assert found.spills <= case.spills
    assert found.registers * 32 * case.plan[2]["num_warps"] <= 1 << 16, "a block needs more registers than there are"


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_target_out_of_range_trips_an_assertion_on_the_device(generation):
    for case in cross_entropy_cases(generation):
        assert "__assertfail" in compile_launch(case.plan, generation).asm["ptx"]
