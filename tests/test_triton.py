"""Compile every Triton kernel for three GPU generations, without a GPU, and bound its registers, spills, shared memory.

The launches come from the functions that the implementations use themselves, on meta tensors, so what is compiled is
what would run. `pytest tests/test_triton.py -s` prints the table.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastlm.ops import attention_triton, cross_entropy_triton, softmax_triton  # noqa: E402

GENERATIONS = (80, 90, 100)
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin"
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
          torch.int64: "i64", torch.bool: "i1", torch.int8: "i8"}


class Resources(NamedTuple):
    registers: int
    spills: int
    shared: int


def resources(plan, generation) -> Resources:
    """Compile a launch `(kernel, grid, arguments)` and return what a thread, and a block, of it needs.

    Registers a thread; bytes of spill stores and loads a thread; bytes of shared memory a block.
    """
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
    source = ASTSource(kernel, signature, constants, alignment)
    compiled = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)
    registers, spills = _ptxas(compiled.asm["ptx"], generation)
    return Resources(registers, spills, compiled.metadata.shared)


def _specialise(parameter, value):
    """Return (type, divisible by 16), as Triton's launcher specialises an argument."""
    if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return f"*{DTYPES[value.dtype]}", True
    if isinstance(value, float):
        return "fp32", False
    return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0


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


def tensor(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def check(label, plan, generation, spills=0):
    """Hold a launch to the limits of a GPU generation and to `spills` bytes a thread."""
    name = plan[0].fn.__name__
    found = resources(plan, generation)
    print(f"\n{name:24} {label:32} sm_{generation} {found.registers:4} registers {found.spills:5} B spilled "
          f"{found.shared / 1024:6.1f} KiB shared", end="")
    assert found.shared <= SHARED_MEMORY[generation]
    assert found.spills <= spills
    assert found.registers * 32 * plan[2]["num_warps"] <= 1 << 16, "the launch would fail for want of registers"


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(4096, 1024), (1024, 32000), (256, 131072)])
def test_softmax(rows, cols, dtype, generation):
    x = softmax_triton._view(tensor(rows, cols, dtype=dtype), -1)
    check(f"{rows}x{cols} {dtype}", softmax_triton.plan_forward(x, x), generation)
    check(f"{rows}x{cols} {dtype}", softmax_triton.plan_backward(x, x, x), generation)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_softmax_along_a_middle_dimension(generation):
    x = softmax_triton._view(tensor(64, 500, 64), 1)
    # ptxas spills two registers of its own accord, to run two blocks on a multiprocessor.
    check("64x500x64, dim 1", softmax_triton.plan_forward(x, x), generation, spills=8)
    check("64x500x64, dim 1", softmax_triton.plan_backward(x, x, x), generation)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(("classes", "dtype"), [(1000, torch.float16), (32000, torch.bfloat16),
                                                (131072, torch.float32)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(classes, dtype, smoothing, generation):
    logits, target, rows = tensor(512, classes, dtype=dtype), tensor(512, dtype=torch.int64), tensor(512)
    weight = tensor(classes, dtype=dtype) if smoothing else None
    label = f"{classes} {dtype} smoothing={smoothing}"
    check(label, cross_entropy_triton.plan_forward(logits, target, weight, rows, rows, rows, rows, -100, smoothing),
          generation)
    mean, none = (tensor(), tensor()), (rows, None)
    for dloss, total in (mean, none):
        plan = cross_entropy_triton.plan_backward(logits, target, weight, rows, rows, dloss, total, logits, -100,
                                                  smoothing)
        check(label, plan, generation)


def attention_plans(dim, dtype, causal, mask=None, value_dim=None):
    """Return the launches of a training step of attention, 2048 tokens long, 4 query heads to a key head."""
    q, k = tensor(2, 16, 2048, dim, dtype=dtype), tensor(2, 4, 2048, dim, dtype=dtype)
    v, o = (tensor(2, heads, 2048, value_dim or dim, dtype=dtype) for heads in (4, 16))
    lse = tensor(2, 16, 2048)
    inputs = (q, k, v, mask, o, lse, lse)
    dmask = None if mask is None or mask.dtype is torch.bool else tensor(2, 16, 2048, 2048)
    return (attention_triton.plan_forward(q, k, v, mask, o, lse, causal, 0.1),
            attention_triton.plan_delta(o, o, lse),
            attention_triton.plan_keys(*inputs, k, v, causal, 0.1),
            attention_triton.plan_queries(*inputs, q, dmask, causal, 0.1))


def check_attention(label, plans, generation, forward_spills):
    for plan in plans:
        forward = plan[0] is attention_triton.forward_kernel
        check(label, plan, generation, spills=forward_spills if forward else 160)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_attention(dim, generation):
    plans = attention_plans(dim, torch.float16, causal=True)
    check_attention(f"D={dim} float16 causal", plans, generation, 0)


@pytest.mark.parametrize(("dim", "generation"), zip([64, 128, 256], GENERATIONS, strict=True))
def test_attention_in_ieee_float32(dim, generation):
    check_attention(f"D={dim} float32", attention_plans(dim, torch.float32, causal=True), generation, 160)


@pytest.mark.parametrize("generation", [90])
@pytest.mark.parametrize("mask", [torch.bool, torch.float32])
def test_attention_with_a_mask(mask, generation):
    plans = attention_plans(64, torch.bfloat16, causal=False, mask=tensor(1, 16, 2048, 2048, dtype=mask))
    check_attention(f"D=64 bfloat16 {mask} mask", plans, generation, 160)


@pytest.mark.parametrize("generation", [90])
def test_attention_with_odd_head_sizes(generation):
    check_attention("D=80 Dv=48", attention_plans(80, torch.bfloat16, causal=False, value_dim=48), generation, 160)
