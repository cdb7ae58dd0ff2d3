"""quantized_linear and QuantizedLinear beyond the matrix: the bounds that are documented, values at the edges, use."""

import copy
import io
import operator
import pickle

import pytest
import torch
from torch import nn

import fastlm
from fastlm import measure
from fastlm.nn import QuantizedLinear
from fastlm.ops import quantized_linear
from fastlm.ops.quantized_linear import GROUP_SIZES, MODES, dequantize_weight, error_bound, quantize_weight
from tests.parity import INTERPRETED, OPS, forced, skip_misinterpreted

FORMATS = [("int8", 64), ("int8_dynamic", 64), *(("int4", g) for g in GROUP_SIZES)]
formats = pytest.mark.parametrize(("mode", "group_size"), FORMATS)
modes = pytest.mark.parametrize("mode", MODES)


implementation = forced("quantized_linear", "native", "torch", "reference", "triton")


def layer(mode, inputs=48, outputs=10, **options):
    return QuantizedLinear.from_linear(nn.Linear(inputs, outputs, **options), mode, group_size=32)


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outlier", [1, 1000])
def test_error_stays_within_the_documented_bound(mode, group_size, dtype, outlier, implementation, device):
    if implementation == "triton":
        skip_misinterpreted(dtype)
    sizes = ((1, 512, 64), (7, 333, 31), (16, 64, 5), (17, 1101, 71), (40, 300, 20), (60, 131, 140), (515, 70, 9))
    for rows, inputs, outputs in sizes[:3] if implementation == "triton" else sizes:  # which is for few rows
        weight, x = torch.randn(outputs, inputs, device=device), torch.randn(rows, inputs, device=device)
        weight[0, 3] *= outlier
        x[0, 5] *= outlier
        weight[outputs // 2] = 0
        x = x.to(dtype)
        values, scale = quantize_weight(weight, mode=mode, group_size=group_size)
        y = quantized_linear(x, values, scale, mode=mode, group_size=group_size)
        bound = error_bound(x, values, scale, mode=mode, group_size=group_size)
        distance = (y.double() - x.double() @ weight.double().T).abs()
        assert y.dtype is dtype
        assert (distance <= bound).all(), (distance / bound).max()
        assert (distance > bound / 1000).any(), "a bound that nothing comes near proves nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [16, 40])
def test_long_sums_keep_their_digits(rows, dtype, implementation, device):
    """Numbers of one sign, whose sums grow and grow."""
    if implementation == "triton":
        pytest.skip("held to the rule on a GPU by the matrix of samples")
    weight, scale = quantize_weight(torch.rand(48, 11008), mode="int8")
    x = torch.rand(rows, 11008).to(dtype)
    found = measure.errors(OPS["quantized_linear"], implementation, (x, weight, scale, None, "int8", 64))
    assert all(error.ok for error in found), found


@pytest.mark.parametrize("inputs", [1, 63, 64, 200, 66000])
@pytest.mark.parametrize("size", [1e-38, 1, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row(dtype, size, inputs, implementation, device):
    """Which the C++ kernel takes as fixed-point numbers, unless one of them would leave the others too few digits."""
    if implementation != "native":
        pytest.skip("all rows are alike there")
    weight, scale = quantize_weight(torch.randn(69, inputs), mode="int8")
    weight[:, 0] = 0
    x, bias = torch.randn(1, inputs) * size, torch.randn(69) * size
    rows = [x, torch.cat([x[:, :1] * 1e6, x[:, 1:]], 1), x.sign() * size]
    if inputs > 1:  # a number in five has nothing to multiply
        rows.append(x * (torch.rand(1, inputs) < 0.8))
    for row in rows:
        args = row.to(dtype), weight, scale, bias, "int8", 64
        found = measure.errors(OPS["quantized_linear"], implementation, args)
        assert all(error.ok for error in found), found


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_of_one_row(sign, implementation, device):
    """The largest weight, and inputs whose lower bytes are all -128 as fixed-point numbers."""
    inputs, value = 70000, sign * float(0x3F7F7F80)
    weight = torch.full((5, inputs), 127, dtype=torch.int8, device=device)
    x = torch.full((1, inputs), value, device=device)
    y = quantized_linear(x, weight, torch.ones(5, device=device), mode="int8")
    torch.testing.assert_close(y.double(), y.new_full((1, 5), value).double() * 127 * inputs, rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_row_that_is_not_finite(value, implementation, device):
    weight, x = torch.randn(9, 300, device=device), torch.randn(1, 300, device=device)
    weight[:, 280] = 1
    x[0, 280] = value
    y = quantized_linear(x, *quantize_weight(weight, mode="int8"), mode="int8")
    torch.testing.assert_close(y, torch.full_like(y, value), equal_nan=True)


@pytest.mark.parametrize("apart", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_begins_at_any_address(dtype, apart, implementation, device):
    """As a view of a flat buffer, or of a file in memory, may: torch's own kernel dies there."""
    if implementation == "triton":
        skip_misinterpreted(dtype)
    x = torch.randn(2, 64, device=device).to(dtype)
    weight = torch.randint(-127, 128, (17, 64), device=device).to(torch.int8)

    def moved(t):
        return torch.cat([t.new_zeros(apart), t.flatten()])[apart:].view(t.shape)
    for args in ((x, weight), (moved(x), weight), (x, moved(weight))):
        found = quantized_linear(*args, torch.ones(17, device=device))
        torch.testing.assert_close(found, (x.float() @ weight.float().T).to(dtype), rtol=1e-2, atol=1e-2)


@formats
def test_each_weight_moves_by_half_a_scale_at_most(mode, group_size):
    weight = torch.randn(9, 100) * torch.logspace(-42, 4, 9, dtype=torch.float64)[:, None].float()
    values, scale = quantize_weight(weight, mode=mode, group_size=group_size)
    found = dequantize_weight(values, scale, 100, mode=mode, group_size=group_size, dtype=torch.float64)
    width = group_size if mode == "int4" else 100
    for start in range(0, 100, width):
        half = scale.view(9, -1)[:, start // width].double()[:, None] / 2
        moved = (found - weight.double())[:, start:start + width].abs()
        assert (moved <= half * (1 + 1e-5)).all()


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize(("mode", "byte", "value"), [
    ("int8", -128, -128), ("int8", 127, 127), ("int8_dynamic", -128, -128), ("int8_dynamic", 127, 127),
    ("int4", 0, -8), ("int4", 255, 7)])
def test_the_largest_integers(rows, mode, byte, value, implementation, device):
    if implementation == "triton":
        skip_misinterpreted(torch.bfloat16)
        rows = min(rows, 16)
    weight = torch.full((67, 128 if mode == "int4" else 256), byte, dtype=torch.uint8 if mode == "int4" else torch.int8)
    scale = torch.ones((67, 4) if mode == "int4" else 67)
    for sign in (1, -1):
        x = torch.full((rows, 256), sign * 127.0).bfloat16()
        y = quantized_linear(x.to(device), weight.to(device), scale.to(device), mode=mode)
        assert (y == torch.tensor(sign * 127.0 * 256 * value).bfloat16()).all()


def test_the_layout_of_int4():
    weight = torch.tensor([[7., -7, 3, 0, 1]])
    values, scale = quantize_weight(weight, mode="int4", group_size=32)
    assert values.tolist() == [[15 | 1 << 4, 11 | 8 << 4, 9 | 8 << 4]]
    assert scale.tolist() == [[1.0]]


@modes
def test_more_inputs_than_a_kernel_reads_at_once(mode, implementation, device):
    """A tile's sums go on from one part of the inputs to the next."""
    x, weight = torch.randn(7, 6001, device=device), torch.randn(5, 6001, device=device)
    packed = quantize_weight(weight, mode=mode)
    found = quantized_linear(x, *packed, mode=mode)
    with fastlm.backend("reference"):
        torch.testing.assert_close(found, quantized_linear(x, *packed, mode=mode), rtol=1e-3, atol=1e-2)


@modes
def test_rows_of_zeros_stay_zero(mode, implementation, device):
    values, scale = quantize_weight(torch.zeros(6, 40, device=device), mode=mode)
    assert (quantized_linear(torch.randn(3, 40, device=device), values, scale, mode=mode) == 0).all()
    values, scale = quantize_weight(torch.randn(6, 40, device=device), mode=mode)
    assert (quantized_linear(torch.zeros(3, 40, device=device), values, scale, mode=mode) == 0).all()


@modes
@pytest.mark.parametrize("rows", [3, 14])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spreads(mode, value, rows, implementation, device):
    weight = torch.randn(6, 40, device=device)
    weight[:, 7] = 1  # not rounded to 0, which times infinity is no number
    values, scale = quantize_weight(weight, mode=mode)
    x = torch.randn(rows, 40, device=device)
    clean = quantized_linear(x, values, scale, mode=mode)
    x[1, 7] = value
    y = quantized_linear(x, values, scale, mode=mode)
    assert not y[1].isfinite().any()
    assert y[1].isnan().all() if mode == "int8_dynamic" or value != value else y[1].isinf().all()
    torch.testing.assert_close(y[[0, *range(2, rows)]], clean[[0, *range(2, rows)]])
    weight = torch.randn(6, 40, device=device)
    weight[2, 3] = value
    y = quantized_linear(clean.new_ones(rows, 40), *quantize_weight(weight, mode=mode), mode=mode)
    assert y[:, 2].isnan().all()
    assert y[:, [0, 1, 3, 4, 5]].isfinite().all()


@modes
def test_the_module_has_the_gradient_of_its_own_weight(mode, implementation, device):
    ours = layer(mode).to(device)
    stock = nn.Linear(48, 10, device=device)
    with torch.no_grad():
        stock.weight.copy_(dequantize_weight(ours.weight, ours.scale, 48, mode=mode, group_size=32))
        stock.bias.copy_(ours.bias)
    x = torch.randn(2, 3, 48, device=device, requires_grad=True)
    upstream = torch.randn(2, 3, 10, device=device)
    found = torch.autograd.grad(ours(x), (x, ours.bias), upstream)
    expected = torch.autograd.grad(stock(x), (x, stock.bias), upstream)
    torch.testing.assert_close(found, expected)
    if mode != "int8_dynamic":
        torch.testing.assert_close(ours(x), stock(x))


@modes
def test_any_leading_shape(mode, implementation, device):
    ours = layer(mode).to(device)
    x = torch.randn(4, 3, 48, device=device)
    rows = ours(x.flatten(0, 1))
    assert torch.equal(ours(x), rows.view(4, 3, 10))
    torch.testing.assert_close(ours(x[0, 0]), rows[0])
    assert ours(x[:0]).shape == (0, 3, 10)


@modes
def test_copies_and_state_dicts_compute_the_same(mode, tmp_path):
    ours, x = layer(mode), torch.randn(5, 48)
    expected = ours(x)
    assert torch.equal(copy.deepcopy(ours)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), expected)
    state = ours.state_dict()
    assert {name: t.dtype for name, t in state.items()} == {
        "weight": torch.uint8 if mode == "int4" else torch.int8, "scale": torch.float32, "bias": torch.float32}
    other = QuantizedLinear(48, 10, mode=mode, group_size=32)
    other(x)  # what it computed before must not outlive the load
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        other.weight.data.zero_().add_(136 if mode == "int4" else 0)
    assert torch.equal(other(x), other.bias.expand(5, 10))
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "layer.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"), assign=True)
    assert torch.equal(other(x), expected)


@modes
def test_a_change_of_dtype_leaves_the_scales(mode):
    ours = layer(mode)
    scale = ours.scale.clone()
    lowered = ours.to(torch.bfloat16)
    assert torch.equal(lowered.scale, scale)
    assert lowered.bias.dtype is torch.bfloat16
    assert lowered(torch.randn(2, 48, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert QuantizedLinear(48, 10, mode=mode, device="meta").to_empty(device="cpu").weight.device.type == "cpu"


@modes
def test_autocast(mode, device):
    ours, x = layer(mode).to(device), torch.randn(3, 48, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = ours(x)
    assert torch.equal(y, ours(x.bfloat16()))
    assert y.dtype is torch.bfloat16


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs inside opaque operators only")
@modes
def test_compiled_and_exported(mode):
    ours, x = layer(mode), torch.randn(4, 48, requires_grad=True)
    torch._dynamo.reset()
    y = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, ours(x))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(ours(x).sum(), x))
    exported = torch.export.export(ours, (x.detach(),)).module()
    torch.testing.assert_close(exported(x.detach()), ours(x.detach()))


def test_second_order_and_functional_transforms():
    ours, x = layer("int8"), torch.randn(3, 48)
    w = dequantize_weight(ours.weight, ours.scale, 48)
    torch.testing.assert_close(torch.func.grad(lambda x: (ours(x) ** 2).sum())(x), 2 * (x @ w.T + ours.bias) @ w)
    torch.testing.assert_close(torch.func.vmap(ours)(x), ours(x))
    x.requires_grad_()
    (dx,) = torch.autograd.grad((ours(x) ** 2).sum(), x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(dx.sum(), x)[0], (2 * w.T @ w).sum(0).expand(3, 48))


@modes
def test_forward_mode(mode):
    ours, x = layer(mode), torch.randn(3, 48)
    value, tangent = torch.func.jvp(ours, (x,), (x,))
    torch.testing.assert_close(value, ours(x))
    torch.testing.assert_close(tangent, x @ dequantize_weight(ours.weight, ours.scale, 48, mode=mode, group_size=32).T)
    torch.testing.assert_close(torch.func.jacfwd(ours)(x), torch.func.jacrev(ours)(x))


@pytest.mark.parametrize(("change", "error", "message"), [
    (dict(input=torch.zeros(2, 9)), RuntimeError, "weight has shape"),
    (dict(input=torch.zeros(2, 8, dtype=torch.int32)), TypeError, "input must be a float32"),
    (dict(weight=torch.zeros(4, 8)), TypeError, "weight must be a int8"),
    (dict(scale=torch.zeros(4, dtype=torch.bfloat16)), TypeError, "scale must be a float32"),
    (dict(scale=torch.zeros(3)), RuntimeError, r"scale has shape \[3\], expected \[4\]"),
    (dict(bias=torch.zeros(5)), RuntimeError, r"bias has shape \[5\], expected \[4\]"),
    (dict(mode="int3"), ValueError, "mode must be one of"),
    (dict(mode="int4", group_size=48), ValueError, "group_size must be 32, 64 or 128"),
    (dict(input=None), TypeError, "input must be a"),
])
def test_bad_arguments(change, error, message):
    good = dict(input=torch.zeros(2, 8), weight=torch.zeros(4, 8, dtype=torch.int8), scale=torch.zeros(4))
    with pytest.raises(error, match=message):
        quantized_linear(**good | change)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(("mode", "group_size"), FORMATS)
@pytest.mark.parametrize("inputs", [256, 4100, 333])
def test_the_kernel_that_widens_a_weight(mode, group_size, inputs):
    from fastlm.ops.quantized_linear_triton import plan_widen
    from fastlm.ops.triton_kernels import launch

    packed = quantize_weight(torch.randn(3, inputs), mode=mode, group_size=group_size)
    wide = torch.full((3, inputs), torch.nan)
    launch(plan_widen, *packed, wide, mode, group_size)
    torch.testing.assert_close(wide, dequantize_weight(*packed, inputs, mode=mode, group_size=group_size))


def emulate(code, word):
    """Run the PTX of `quantized_linear_triton` on four bytes and return its four numbers of 16 bits."""
    dtype = torch.bfloat16 if "bf16x2" in code else torch.float16
    values = {"$2": word}

    def pair(bits):
        return torch.tensor([bits & 0xFFFF, bits >> 16], dtype=torch.int32).to(torch.int16).view(dtype)

    def get(name):
        return values[name] if name in values else int(name, 0)
    for line in code.replace("{ .reg .b32 t, u, one, less;", "").replace("}", "").split(";"):
        if not line.strip():
            continue
        name, operands = line.split(maxsplit=1)
        out, *operands = (part.strip() for part in operands.split(","))
        a, *more = map(get, operands)
        if name == "prmt.b32":
            pool, wanted = a.to_bytes(4, "little") + more[0].to_bytes(4, "little"), more[1]
            found = int.from_bytes(bytes(pool[wanted >> 4 * i & 7] for i in range(4)), "little")
        elif name == "lop3.b32":
            assert more[2] == 0xEA
            found = a & more[0] | more[1]
        elif name in ("fma.rn.bf16x2", "sub.f16x2"):
            numbers = pair(a) * pair(more[0]) + pair(more[1]) if "fma" in name else pair(a) - pair(more[0])
            halves = numbers.view(torch.int16).tolist()
            found = (halves[1] & 0xFFFF) << 16 | (halves[0] & 0xFFFF)
        elif name == "mov.b32":
            found = a
        else:
            found = {"and.b32": operator.and_, "shr.u32": operator.rshift, "xor.b32": operator.xor}[name](a, *more)
        values[out] = found
    return torch.cat([pair(values["$0"]), pair(values["$1"])]).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_machine_code_makes_numbers_of_bytes(dtype):
    pytest.importorskip("triton")
    from fastlm.ops.quantized_linear_triton import BYTES, HIGH, LOW

    for value in range(256):
        found = [value, 255 - value, 7 * value % 256, value ^ 0x80]
        word = int.from_bytes(bytes(found), "little")
        assert emulate(LOW[dtype], word) == [(b & 15) - 8 for b in found]
        assert emulate(HIGH[dtype], word) == [(b >> 4) - 8 for b in found]
        assert emulate(BYTES[dtype], word) == [b - 256 * (b > 127) for b in found]


def test_only_a_linear_layer_is_quantized():
    with pytest.raises(TypeError, match=r"must be an nn\.Linear, got Conv1d"):
        QuantizedLinear.from_linear(nn.Conv1d(2, 2, 1))


@pytest.mark.parametrize("mode", ["int8", "int8_dynamic", "int4"])
@pytest.mark.parametrize("features", [1, 255, 257])
def test_another_number_of_features_is_refused(mode, features):
    """Two numbers of int4 are in a byte: 255 would fit the weight of 256."""
    layer = fastlm.nn.QuantizedLinear.from_linear(torch.nn.Linear(256, 8), mode)
    with pytest.raises(RuntimeError, match="expected 256 features"):
        layer(torch.randn(3, features))


def test_sums_that_would_overflow_are_not_taken(monkeypatch):
    native = pytest.importorskip("fastlm.ops.quantized_linear_native")
    monkeypatch.setattr(native, "vnni", True)
    x = torch.zeros(1, 131073)
    assert native.cannot(x, None, None, None, "int8_dynamic", 64) == "more than 131072 inputs would overflow 32 bits"
    assert native.cannot(x[:, 1:], None, None, None, "int8_dynamic", 64) is None


@pytest.mark.parametrize("trains", [False, True])
def test_a_quantized_layer_has_a_bias_of_its_own(trains):
    linear = torch.nn.Linear(8, 3)
    linear.bias.requires_grad_(trains)
    made = fastlm.nn.QuantizedLinear.from_linear(linear)
    assert made.bias.requires_grad is trains
    made.bias.data.add_(1)
    torch.testing.assert_close(made.bias - 1, linear.bias)
