"""lstm, gru and rnn on a CPU: functions of 16 bits, memory, and which kernels run where."""

import itertools
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastlm
from fastlm.ops import cpu, recurrent, recurrent_rules
from fastlm.ops.tensors import FLOATS
from tests.cases.test_recurrent import CELLS, OPS, make, native

MAGNITUDES = [*(10.0 ** k for k in range(-30, 31)), *(k / 8 for k in range(1, 80)), float("inf")]


def one_step(values, bias_of, states=1):
    """Return input, states and weights of a layer in bfloat16 whose gates see nothing but `bias_of(values)`."""
    bias, size = bias_of(values), len(values)
    weights = torch.zeros(len(bias), 1), torch.zeros(len(bias), size), bias, torch.zeros(len(bias))
    hx = [torch.zeros(1, 1, size, dtype=torch.bfloat16) for _ in range(states)]
    return torch.zeros(1, 1, 1, dtype=torch.bfloat16), hx, [w.bfloat16().requires_grad_() for w in weights]


@native
def test_tanh_and_sigmoid_of_bfloat16():
    """As exact as 16 bits show, near zero too."""
    x = torch.tensor([*(s * m for m in MAGNITUDES for s in (1, -1)), 0.0, float("nan")]).bfloat16()
    wide_open = torch.full((3 * len(x),), 100.0)
    with fastlm.backend("native"):
        data, hx, params = one_step(x, lambda x: x)
        tanh = fastlm.ops.rnn(data, hx[0], params, True, 1, 0.0, True, False, False)[0].flatten()
        data, hx, params = one_step(x, lambda x: torch.cat([x, wide_open]), states=2)
        sigmoid = fastlm.ops.lstm(data, hx, params, True, 1, 0.0, True, False, False)[2].flatten()
    torch.testing.assert_close(tanh.double(), x.double().tanh(), rtol=2 ** -8, atol=0, equal_nan=True)
    torch.testing.assert_close(sigmoid.double(), x.double().sigmoid(), rtol=2 ** -8, atol=1e-37, equal_nan=True)


@native
def test_nothing_flows_back_through_a_full_cell():
    """1 - tanh² is 0 there: what is left of it would be added up over the steps."""
    data, (h0, c0), params = one_step(torch.zeros(40), lambda x: torch.full((4 * len(x),), 100.0), states=2)
    c0 = c0.fill_(20).requires_grad_()
    with fastlm.backend("native"):
        fastlm.ops.lstm(data, (h0, c0), params, True, 1, 0.0, True, False, False)[0].sum().backward()
    assert c0.grad.abs().max() < 1e-6


TRAINING = """
import resource, statistics, torch, fastlm
layer, x = fastlm.nn.LSTM(512, 512).bfloat16(), torch.randn(128, 32, 512).bfloat16().requires_grad_()
counts = []
for _ in range(14):
    with fastlm.backend("native", "torch"):
        torch.autograd.grad(layer(x)[0].sum(), [x, *layer.parameters()])
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(statistics.median(after - before for before, after in zip(counts[5:], counts[6:])))
"""
INFERENCE = """
import ctypes, torch, fastlm
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in "arena ordblks smblks hblks hblkhd usm fsm uord ford cost".split()]
mallinfo = ctypes.CDLL(None).mallinfo
mallinfo.restype = Info
with fastlm.backend("native", "torch"):
    fastlm.nn.LSTM(1024, 1024).requires_grad_(False)(torch.randn(32, 64, 1024))
before = mallinfo().hblks
block = torch.empty(20 << 20, dtype=torch.uint8)
print(mallinfo().hblks - before)
"""


def printed(program):
    """Return the number that a program prints where nobody has told malloc anything."""
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    return float(subprocess.check_output([sys.executable, "-c", program], env=clean))


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ,
                           reason="other allocators have their own ways")


@native
@glibc
def test_steps_of_training_need_no_new_pages():
    """Once malloc has what a few steps took. Where it keeps nothing, 16,000 are new at each step."""
    if not sys.modules["fastlm._native"].pairs:
        pytest.skip("computes in float32 here, in larger blocks")
    assert printed(TRAINING) < 200


@native
@glibc
def test_malloc_keeps_what_a_large_layer_frees():
    """In inference too: a block larger than any of the layer's comes from its heap, not from the system each time."""
    assert printed(INFERENCE) == 0


@native
def test_stock_runs_where_it_was_measured_to_win():
    """Whatever the instruction set, a refusal is a reason and the default call agrees with stock."""
    small, large = make("lstm", hidden=8), make("gru", steps=40, hidden=8)
    import fastlm._native as extension
    refusal = OPS["lstm"].implementations["native"].loses(*small)
    taken = OPS["gru"].implementations["native"].loses(*large)
    if extension.cpu in cpu.MEASURED:
        assert "below 256 hidden units" in refusal
        assert taken is None
    else:
        assert refusal == taken == f"not yet measured on this CPU ({extension.cpu})"


AVX512 = {"cpu": "intel", "pairs": None, "bf16_arithmetic": False, "fp16_arithmetic": False}
COOPER_LAKE = AVX512 | {"pairs": "avx512_bf16", "bf16_arithmetic": True}
ZEN_5 = COOPER_LAKE | {"cpu": "zen5"}
AVX2 = AVX512 | {"cpu": "avx2"}
SAPPHIRE_RAPIDS = {"cpu": "intel", "pairs": "amx", "bf16_arithmetic": True, "fp16_arithmetic": True}


@pytest.mark.parametrize(("dtype", "cpu", "precision", "expected"), [
    (torch.float32, AVX512, "medium", None),
    (torch.float32, SAPPHIRE_RAPIDS, "highest", None),
    (torch.float32, SAPPHIRE_RAPIDS, "high", None),
    (torch.bfloat16, SAPPHIRE_RAPIDS, "highest", None),
    (torch.bfloat16, AVX512, "highest", None),
    (torch.bfloat16, COOPER_LAKE, "highest", "not yet measured with avx512_bf16 in bfloat16"),
    (torch.bfloat16, ZEN_5, "highest", None),
    (torch.bfloat16, ZEN_5 | {"pairs": None}, "highest", "not yet measured on a CPU with bfloat16 arithmetic"),
    (torch.float16, COOPER_LAKE, "highest", None),
    (torch.float16, AVX2, "highest", None),
    (torch.float16, SAPPHIRE_RAPIDS, "highest", "not yet measured on a CPU with float16 arithmetic"),
])
def test_reasons_on_cpus_with_16_bit_arithmetic(dtype, cpu, precision, expected):
    args = recurrent.make_args(*CELLS["gru"], dtype, "cpu", steps=64, batch=4, hidden=32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert recurrent_rules.losses(SimpleNamespace(**cpu), "gru", *args) == expected
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("cell", "dtype", "sizes", "wins"), [
    ("lstm", torch.float32, dict(steps=64, batch=4, hidden=512), False),
    ("lstm", torch.float32, dict(steps=4, batch=4, hidden=512), True),
    ("lstm", torch.float32, dict(steps=1, batch=1, hidden=512), True),
    ("lstm", torch.bfloat16, dict(steps=1, batch=1, hidden=512), False),
    ("lstm", torch.bfloat16, dict(steps=64, batch=4, hidden=512), True),
    ("gru", torch.float32, dict(steps=64, batch=4, hidden=512), True),
])
def test_what_runs_with_avx2(cell, dtype, sizes, wins):
    """oneDNN takes the LSTM in float32, but for few rows; what stock does step by step is ours."""
    with torch.no_grad():
        args = recurrent.make_args(*CELLS[cell], dtype, "meta", **sizes)
        assert (recurrent_rules.losses(SimpleNamespace(**AVX2), cell, *args) is None) == wins


@pytest.mark.parametrize(("cell", "steps", "hidden", "wins"), [
    ("lstm", 16, 256, True), ("lstm", 16, 128, False), ("lstm", 8, 512, False), ("gru", 16, 64, True),
    ("gru", 8, 512, False), ("tanh", 16, 128, True), ("tanh", 16, 64, False), ("relu", 64, 512, False)])
def test_rounded_float32_with_amx(cell, steps, hidden, wins):
    args = recurrent.make_args(*CELLS.get(cell, (1, 1)), torch.float32, "meta", steps=steps, batch=16, hidden=hidden)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert (recurrent_rules.losses(SimpleNamespace(**SAPPHIRE_RAPIDS), cell, *args) is None) == wins
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("cell", "steps", "wins"), [("gru", 4, True), ("gru", 2, False), ("tanh", 4, True)])
def test_few_steps_with_amx(cell, steps, wins):
    args = recurrent.make_args(*CELLS.get(cell, (1, 1)), torch.bfloat16, "meta", steps=steps, batch=16, hidden=256)
    assert (recurrent_rules.losses(SimpleNamespace(**SAPPHIRE_RAPIDS), cell, *args) is None) == wins


@pytest.mark.parametrize(("steps", "batch", "hidden", "wins"), [
    (128, 32, 512, True), (128, 64, 512, True), (128, 128, 512, False), (8, 32, 256, False), (4, 32, 512, True),
    (1, 1, 256, True), (1, 2, 512, False), (16, 1, 128, False), (32, 64, 64, False), (32, 64, 128, True)])
def test_inference_with_amx(steps, batch, hidden, wins):
    with torch.no_grad():
        args = recurrent.make_args(*CELLS["lstm"], torch.bfloat16, "meta", steps=steps, batch=batch, hidden=hidden)
        assert (recurrent_rules.losses(SimpleNamespace(**SAPPHIRE_RAPIDS), "lstm", *args) is None) == wins


@pytest.mark.parametrize(("steps", "batch", "hidden", "wins"), [
    (4, 64, 256, True), (2, 64, 256, False), (16, 16, 128, True), (64, 64, 128, False), (64, 16, 64, True),
    (16, 16, 64, False), (64, 1, 32, False)])
def test_training_with_amx(steps, batch, hidden, wins):
    args = recurrent.make_args(*CELLS["lstm"], torch.bfloat16, "meta", steps=steps, batch=batch, hidden=hidden)
    for param in args[3]:
        param.requires_grad_()
    assert (recurrent_rules.losses(SimpleNamespace(**SAPPHIRE_RAPIDS), "lstm", *args) is None) == wins


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("cpu", [AVX2, AVX512, COOPER_LAKE, ZEN_5, SAPPHIRE_RAPIDS])
def test_layers_that_run_stock_at_once_are_those_that_losses_name(cpu, precision, monkeypatch):
    """Layers look at sizes alone; the kernels' own rule must say the same on every CPU."""
    monkeypatch.setattr(recurrent_rules, "exact_float32", lambda: precision == "highest")
    at_once = 0
    kinds = ("LSTM", "lstm"), ("GRU", "gru"), ("RNN", "tanh")
    for (kind, cell), hidden, dtype in itertools.product(kinds, (8, 255, 256), FLOATS):
        layer = getattr(fastlm.nn, kind)(4, hidden, dtype=dtype)
        for steps, batch, trains in itertools.product((1, 2, 15, 16, 127, 128), (1, 8, 64), (True, False)):
            x = torch.empty(steps, batch, 4, dtype=dtype)
            state = [torch.empty(1, batch, hidden, dtype=dtype)] * (2 if kind == "LSTM" else 1)
            with torch.set_grad_enabled(trains):
                if layer._runs_stock(x, state, layer._flat_weights, steps):
                    at_once += 1
                    args = x, None, state, layer._flat_weights, *layer._settings[1:], layer.batch_first
                    assert recurrent_rules.losses(SimpleNamespace(**cpu), cell, *args), (kind, steps, hidden, trains)
    assert at_once > 50


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("cpu", [AVX2, AVX512, COOPER_LAKE, ZEN_5, SAPPHIRE_RAPIDS])
@pytest.mark.parametrize(("kind", "cell"), [("LSTM", "lstm"), ("GRU", "gru"), ("RNN", "tanh")])
def test_cells_that_run_stock_at_once_are_those_that_losses_name(kind, cell, cpu, dtype, monkeypatch):
    """Of a step without gradients; the others ask the rule itself, or go where it is asked."""
    module, known = getattr(fastlm.nn, f"{kind}Cell")(4, 4), set()
    monkeypatch.setattr(fastlm.nn.recurrent, "_wide_step_is_stocks", lambda *size: False)
    for hidden, batch in itertools.product((8, 63, 64, 255, 256, 1024), (1, 32, 33, 64, 65, 256)):
        module.hidden_size = hidden
        state = torch.empty(1, batch, hidden, dtype=dtype, device="meta")
        known.add(found := module._step_is_stocks(state[0], dtype))
        if found:
            assert recurrent_rules.losses(SimpleNamespace(**cpu), cell, state, None, (state,), (), True, 1, 0.0, False,
                                          False, False), (hidden, batch)
    assert True in known


@native
@pytest.mark.parametrize("name", CELLS)
def test_kernels_make_at_once_no_step_that_losses_leave_to_stock(name, monkeypatch):
    """Of many sequences: `explain` would name stock."""
    op, most = OPS[name], recurrent.MOST_ROWS.get(name, recurrent.MOST_ROWS["tanh"])
    monkeypatch.setattr(sys.modules["fastlm._native"], "cpu", "intel")
    for batch in (most, most + 1):
        data, _, hx, params, *options = make(name, steps=1, batch=batch, hidden=64)
        with torch.no_grad():
            found = op.at_once(data, hx, params, *options)
            stays = op.implementations["native"].loses(data, None, hx, params, *options)
        assert (found is None) == (stays is not None) == (batch > most)
