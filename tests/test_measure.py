"""The judge itself: a wrong kernel must be caught, a right one must pass, and the clocks must tell the truth."""

import functools
import time

import pytest
import torch

from fastlm import measure
from fastlm.dispatch import Implementation, Op, Sample


def samples(scale, dtype, device):
    yield Sample("numbers", (torch.randn(50, 20, device=device).to(dtype), 3.0))


def make(run):
    op = Op("scaled", reference=lambda x, s: x * s, torch=lambda x, s: x * s, samples=samples, cost=lambda x, s: (1, 1))
    op.implementations["blocked"] = Implementation(run)
    return op


def verdicts(run, dtype=torch.float32):
    op = make(run)
    return [e.ok for e in measure.errors(op, "blocked", next(samples("test", dtype, "cpu")).args)]


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, s):
        ctx.s = s
        return x * s

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.s + 1e-4), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_right_kernel_passes(dtype):
    assert verdicts(lambda x, s: (x * s).contiguous(), dtype) == [True, True]


def test_a_wrong_result_fails():
    assert verdicts(lambda x, s: x * (s + 1e-4)) == [False, False]


def test_a_wrong_gradient_alone_fails():
    assert verdicts(WrongGradient.apply) == [True, False]


def test_one_wrong_element_fails():
    assert verdicts(lambda x, s: (x * s).index_fill(0, torch.tensor([7]), 0.0))[0] is False


def test_lower_precision_inside_fails():
    assert verdicts(lambda x, s: (x.bfloat16() * s).float())[0] is False


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_fails(bad):
    def run(x, s):
        y = x * s
        return y.masked_fill(torch.zeros_like(y, dtype=torch.bool).index_fill(0, torch.tensor([0]), True), bad)
    assert verdicts(run)[0] is False


def test_infinities_of_the_reference_must_be_met():
    x = torch.tensor([[1.0, float("inf"), -float("inf")]])
    op = make(lambda x, s: x * s)
    assert measure.errors(op, "blocked", (x, 3.0))[0].ok
    op = make(lambda x, s: x.clamp(-1e30, 1e30) * s)
    assert not measure.errors(op, "blocked", (x, 3.0))[0].ok


def test_a_wrong_shape_or_dtype_is_an_error():
    with pytest.raises(AssertionError, match="result 0"):
        verdicts(lambda x, s: (x * s).double())
    with pytest.raises(AssertionError, match="result 0"):
        verdicts(lambda x, s: (x * s)[:, None])


def test_differentiate_leaves_the_callers_tensors_alone():
    x = torch.randn(4, 4)
    measure.differentiate(lambda x: x * 2, (x,))
    assert x.grad is None
    assert not x.requires_grad


def test_constants_get_no_gradient():
    a, b = torch.randn(3), torch.randn(3)
    assert len(measure.differentiate(lambda a, b: a * b, (a, b), constants=(1,))[2]) == 1


def test_timings_order_what_takes_longer():
    found = measure.timings({"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.02)}, seconds=0.05)
    assert found["short"].median < found["long"].median
    assert found["long"].low <= found["long"].median <= found["long"].high
    assert found["long"].low >= 0.02


def allocate(megabytes, keep):
    def call():
        scratch = torch.ones(megabytes << 18)
        return scratch if keep else None
    return call


def test_peak_memory_counts_scratch_but_not_results():
    scratch = measure.peak_memory(functools.partial(allocate, 200, False))
    result = measure.peak_memory(functools.partial(allocate, 200, True))
    assert 190 << 20 < scratch < 260 << 20
    assert result < 40 << 20


def test_floor_is_positive_and_grows_with_the_work():
    from fastlm.ops.softmax import op

    small, large = (measure.floor(op, (torch.randn(n, 512), -1)) for n in (64, 4096))
    assert 0 < small < large
