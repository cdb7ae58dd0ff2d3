"""What linear needs beyond the matrix of test_ops: bad input, vectors of weights, autocast, the module."""

import sys

import pytest
import torch
import torch.nn.functional as F
from parity import hold, leaf, pair

import fastlm
from fastlm.ops import ALL, linear

OP = next(op for op in ALL if op.name == "linear")
native = pytest.mark.skipif(OP.implementations["native"].run is None, reason="the C++ extension is missing")


@pytest.mark.parametrize(("shapes", "message"), [
    (((3, 4), (5, 6), None), "input has 4 features, weight takes 6"),
    (((3, 4), (5, 4), (4,)), r"bias has shape \[4\], expected \[5\]"),
    (((3, 4), (4,), (1,)), r"bias has shape \[1\], expected \[\]"),
    (((), (5, 4), None), "expected"),
    (((3, 4), (2, 5, 4), None), "expected"),
])
def test_bad_shapes_are_named(shapes, message):
    with pytest.raises(RuntimeError, match=f"linear: .*{message}"):
        linear(*(None if shape is None else torch.randn(shape) for shape in shapes))


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="linear: weight must be a Tensor, got list"):
        linear(torch.randn(2, 3), [[1.0] * 3])


def test_other_devices_are_named():
    with pytest.raises(RuntimeError, match="linear: weight is on meta, input is on cpu"):
        linear(torch.randn(2, 3), torch.randn(4, 3, device="meta"))


@native
def test_other_dtypes_are_refused_by_name():
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    for args in ((x.double(), weight.double()), (x, weight.double()), (x, weight.bfloat16()), (x, weight[0])):
        with pytest.raises(fastlm.dispatch.CannotRun, match="native: "), fastlm.backend("native"):
            linear(*args)


def test_a_vector_of_weights(device):
    x, weight = torch.randn(2, 5, 3, device=device), torch.randn(3, device=device)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))


@native
def test_autocast_lowers_it():
    x, weight = torch.randn(300, 300), torch.randn(300, 300)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype is torch.bfloat16
        assert fastlm.explain(linear, x, weight)[0].declined["native"] == "autocast lowers it"


@native
def test_second_order():
    args = [torch.randn(shape, dtype=torch.float32, requires_grad=True) for shape in ((7, 9), (5, 9), (5,))]
    found = []
    for name in ("native", "torch"):
        with fastlm.backend(name):
            first = torch.autograd.grad(linear(*args).pow(3).sum(), args, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in first), args))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["as it is", "vector", "three dimensions", "no bias", "x in strides",
                                  "weight in strides", "bias in strides", "no rows", "a subclass", "negated",
                                  "gradients"])
def test_few_rows_at_once(case, dtype, monkeypatch):
    """The one call of C++ that makes tokens: the numbers of the long way, for every layout that it may meet."""
    class Mine(torch.Tensor):
        pass

    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((2, 257), (1030, 257), (1030,)))
    x = {"vector": x[0], "three dimensions": x[:, None], "no rows": x[:0], "x in strides": x.repeat(1, 2)[:, ::2],
         "a subclass": x.as_subclass(Mine), "negated": torch._neg_view(x),
         "gradients": x.clone().requires_grad_()}.get(case, x)
    weight = weight.t().contiguous().t() if case == "weight in strides" else weight
    bias = {"no bias": None, "bias in strides": bias.repeat(2)[::2]}.get(case, bias)
    expected = OP.implementations["native"].run(x, weight, bias)
    met, module = [], sys.modules["fastlm.ops.linear_native"]
    real = module._native.linear_at_once
    monkeypatch.setattr(module._native, "linear_at_once", lambda *args: met.append(real(*args)) or met[-1])
    monkeypatch.setattr(module._native, "cpu", module.products.CPUS[0])
    found = linear(x, weight, bias)
    taken = case in ("as it is", "vector", "three dimensions", "no bias")
    assert ([m is not None for m in met] or [False]) == [taken]
    assert type(found) is type(expected)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, **({} if case == "gradients" else {"rtol": 0, "atol": 0}))
    assert found.requires_grad == (case == "gradients")


@native
def test_few_rows_under_autocast_and_in_a_graph(monkeypatch):
    """What autocast lowers is torch's at once too; an operator of ours costs a compiled graph more than it saves."""
    monkeypatch.setattr(sys.modules["fastlm.ops.linear_native"]._native, "cpu", "zen5")
    x, weight = torch.randn(2, 512), torch.randn(512, 512)

    def layer(x):
        return linear(x, weight)

    assert layer(x).dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert fastlm.explain(layer, x)[0].ran == "native"
    compiled = torch.compile(layer, backend="eager")
    assert fastlm.explain(compiled, x)[0].ran == "torch"
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


@native
@pytest.mark.parametrize(("rows", "inputs", "outputs", "dtype", "trains", "ran"), [
    (600, 640, 700, torch.bfloat16, True, "native"), (600, 640, 700, torch.bfloat16, False, "native"),
    (256, 640, 700, torch.bfloat16, True, "torch"), (600, 640, 500, torch.bfloat16, True, "torch"),
    (600, 640, 700, torch.float32, True, "torch"), (4, 1024, 1024, torch.float32, False, "native"),
    (3, 1024, 1024, torch.float32, False, "torch"), (4, 128, 128, torch.bfloat16, False, "native"),
    (4, 128, 128, torch.bfloat16, True, "torch"), (5, 128, 128, torch.bfloat16, False, "torch"),
])
def test_what_runs_with_amx(rows, inputs, outputs, dtype, trains, ran, monkeypatch):
    extension = sys.modules["fastlm.ops.linear_native"]._native
    for name, value in (("cpu", "intel"), ("amx", True), ("tiles", extension.tiles)):
        monkeypatch.setattr(extension, name, value)
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype).requires_grad_(trains)
    if min(rows, inputs, outputs) >= 512 and not extension.tiles:
        ran = "torch"
    assert fastlm.explain(linear, x, weight)[0].ran == ran
    found, expected = linear(x, weight), x.double() @ weight.detach().double().t()
    bound = 2 * torch.finfo(dtype).eps * expected.abs().max() + 1e-3
    assert (found.double() - expected).abs().max() <= bound


@native
@pytest.mark.parametrize("change", ["features", "bias", "dtype", "device"])
def test_few_rows_at_once_refuse_what_does_not_fit(change):
    x, weight, bias = torch.randn(2, 257), torch.randn(300, 257), torch.randn(300)
    x = {"features": x[:, :-1].contiguous(), "dtype": x.double(), "device": x.to("meta")}.get(change, x)
    with pytest.raises(RuntimeError):
        linear(x, weight, bias[:1] if change == "bias" else bias)


@pytest.mark.parametrize("bias", [True, False])
def test_module(bias, device):
    theirs, ours = pair("Linear", 6, 4, bias, device=device)
    hold(theirs, ours, lambda module, x: module(x), [leaf(2, 3, 6, device=device, dtype=torch.float32)])
    assert repr(ours) == repr(theirs)
