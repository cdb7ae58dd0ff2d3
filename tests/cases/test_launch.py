"""Launches of Triton kernels are kept for calls like the first: all that its tensors decide, but not the tensors."""

from types import SimpleNamespace

import pytest
import torch

from fastlm.ops import triton_kernels
from fastlm.ops.triton_kernels import launch


class Kernel:
    """Counts how often Triton looks at the arguments, and notes those of each launch by position."""

    arg_names = ("x", "row", "y", "scale", "view")

    def __init__(self):
        self.looks, self.seen = 0, []

    def __getitem__(self, grid):
        def first(**arguments):
            self.looks += 1
            self.seen.append([arguments[name] for name in self.arg_names])
            return {(*grid, 1, 1)[:3]: self.again}
        return first

    def again(self, *arguments):
        self.seen.append(list(arguments))

    def addresses(self):
        """Return where the tensors of the last launch lay."""
        return [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in self.seen[-1]]


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(triton_kernels, "_launches", {})
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    return Kernel()


@pytest.fixture
def plan(kernel):
    def plan(x, y, options, scale):
        return kernel, (x.size(0),), dict(x=x, row=x.stride(0), y=y, scale=scale, view=options[0], num_warps=4)
    return plan


def matrix(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype)


def test_a_call_like_another_is_not_planned_again(kernel, plan):
    a, b, c = (matrix(3, 8) for _ in range(3))
    launch(plan, a, a, (None,), 2.0)  # one tensor twice says nothing about the next call
    launch(plan, a, b, (None,), 2.0)
    assert kernel.addresses() == [a.data_ptr(), 8, b.data_ptr(), 2.0, None]
    launch(plan, c, a, (None,), 2.0)
    assert kernel.addresses() == [c.data_ptr(), 8, a.data_ptr(), 2.0, None]
    launch(plan, c, a, (b,), 2.0)
    assert kernel.looks == 2
    launch(plan, b, c, (a,), 2.0)
    assert kernel.addresses() == [b.data_ptr(), 8, c.data_ptr(), 2.0, a.data_ptr()]
    assert kernel.looks == 2


def test_what_a_plan_may_depend_on(kernel, plan):
    a, b = matrix(3, 8), matrix(3, 8)
    launch(plan, a, b, (None,), 2.0)
    others = [
        (matrix(3, 9), b, (None,), 2.0), (matrix(8, 3).t(), b, (None,), 2.0), (a, b.double(), (None,), 2.0),
        (a, b, (b,), 2.0), (a, b, (None,), 3.0), (matrix(25)[1:].view(3, 8), b, (None,), 2.0)]
    for i, args in enumerate(others):
        launch(plan, *args)
        assert kernel.looks == i + 2
    torch.set_float32_matmul_precision("high")
    try:
        launch(plan, a, b, (None,), 2.0)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert kernel.looks == len(others) + 2
    for args in ((a, b, (None,), 2.0), *others):
        launch(plan, *args)
    assert kernel.looks == len(others) + 2


def test_descriptors_move_with_their_tensors(kernel):
    def plan(x, y):
        return kernel, (1,), dict(x=SimpleNamespace(base=x, shape=list(x.shape)), row=1, y=y, scale=1.0, view=None)

    a, b = matrix(4), matrix(4)
    launch(plan, a, b)
    launch(plan, b, a)
    descriptor, _, y, *_ = kernel.seen[-1]
    assert descriptor.base is b
    assert descriptor.shape == [4]
    assert y == a.data_ptr()


def test_no_program_to_run(kernel, plan):
    for _ in range(2):
        launch(plan, matrix(0, 8), matrix(3, 8), (None,), 2.0)
    assert not kernel.seen


def tensors_in(x):
    """Yield the tensors in nested containers and objects."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, dict):
        yield from tensors_in([*x.keys(), *x.values()])
    elif isinstance(x, list | tuple):
        for part in x:
            yield from tensors_in(part)
    elif isinstance(x, SimpleNamespace):
        yield from tensors_in(vars(x))


def test_no_tensor_is_kept(kernel, plan):
    def described(x, y):
        return kernel, (1,), dict(x=SimpleNamespace(base=x), row=1, y=y, scale=1.0, view=None)

    a, b = matrix(3, 8), matrix(3, 8)
    launch(plan, a, b, (b,), 2.0)
    launch(described, a, b)
    assert len(triton_kernels._launches) == 2
    assert not list(tensors_in(triton_kernels._launches))


def test_no_more_than_so_many_are_kept(kernel, plan, monkeypatch):
    monkeypatch.setattr(triton_kernels, "MOST", 4)
    for n in range(1, 20):
        launch(plan, matrix(n, 8), matrix(3, 8), (None,), 2.0)
        assert len(triton_kernels._launches) <= 4
