"""What linear needs beyond the matrix of test_ops: bad input, vectors of weights, autocast, the module."""

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


@pytest.mark.parametrize("bias", [True, False])
def test_module(bias, device):
    theirs, ours = pair("Linear", 6, 4, bias, device=device)
    hold(theirs, ours, lambda module, x: module(x), [leaf(2, 3, 6, device=device, dtype=torch.float32)])
    assert repr(ours) == repr(theirs)
