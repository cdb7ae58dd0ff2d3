"""fastlm.autograd on a pair of kernels small enough to check by hand: every way PyTorch has to differentiate it."""

import contextlib
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from fastlm import autograd
from fastlm.autograd import Differentiable, autocast

ran = []  # what the kernels did: the only way to see a gradient that nobody asked for


def forward(tensors, needs, power, flip):
    """y = sign · (w ⊙ x^power + b) and z = Σ x, with b optional; saves x^(power-1)."""
    x, w, b = tensors
    ran.append(("forward", tuple(needs)))
    sign = -1 if flip else 1
    y = sign * (w * x**power + (0 if b is None else b))
    saved = [x ** (power - 1)] if any(needs) else []
    return [y, x.sum(-1), *saved]


def fake(tensors, needs, power, flip):
    x = tensors[0]
    return [x.new_empty(x.shape), x.new_empty(x.shape[:-1]), *([x.new_empty(x.shape)] if any(needs) else [])]


def backward(grads, saved, tensors, needs, power, flip):
    (dy, dz), (lower,), (x, w, _) = grads, saved, tensors
    ran.append(("backward", tuple(needs)))
    dy = -dy if flip else dy
    dx = (dy * w * power * lower + dz.unsqueeze(-1)) if needs[0] else None
    dw = (dy * lower * x).sum_to_size(w.shape) if needs[1] else None
    db = dy.sum_to_size(w.shape) if needs[2] else None
    return [dx, dw, db]


def reference(tensors, power, flip):
    x, w, b = tensors
    y = w * x**power + (0 if b is None else b)
    return (-y if flip else y), x.sum(-1)


toy = Differentiable("test_toy", statics="int power, bool flip", outputs=2, forward=forward, fake=fake,
                     backward=backward, reference=reference)


def exponential_backward(grads, saved, tensors, needs):
    """The gradient of y = exp(x) + w, z = Σ y wants the result y itself; nothing else is saved."""
    (dy, dz), (y, _), (_, w) = grads, saved, tensors
    total = dy + dz.unsqueeze(-1)
    return [total * (y - w) if needs[0] else None, total.sum_to_size(w.shape) if needs[1] else None]


def exponential_reference(tensors):
    y = tensors[0].exp() + tensors[1]
    return y, y.sum(-1)


exponential = Differentiable(
    "test_exponential", outputs=2, forward=lambda tensors, needs: list(exponential_reference(tensors)),
    fake=lambda tensors, needs: [t.new_empty(t.shape) for t in exponential_reference(tensors)],
    backward=exponential_backward, reference=exponential_reference, reads=2)


def call(x, w, b=None, power=3, flip=True):
    return tuple(toy([x, w, b], power, flip))


def plain(x, w, b=None, power=3, flip=True):
    return tuple(reference([x, w, b], power, flip))


def inputs(*shape, dtype=torch.float64, bias=True, grad=True):
    shape = shape or (2, 3)
    tensors = [torch.rand(shape, dtype=dtype) + 0.5, torch.randn(shape[-1], dtype=dtype)]
    tensors += [torch.randn(shape[-1], dtype=dtype)] if bias else []
    return [t.requires_grad_(grad) for t in tensors]


def scalar(fn):
    return lambda *args: sum(r.square().sum() for r in fn(*args))


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def fresh():
    ran.clear()
    torch._dynamo.reset()


# --- eager -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3), (3,), (0, 3), (4, 1, 2)])
def test_first_order(shape, bias):
    args = inputs(*shape, bias=bias)
    same(call(*args), plain(*args))
    same(torch.autograd.grad(scalar(call)(*args), args), torch.autograd.grad(scalar(plain)(*args), args))
    assert ran[-1][0] == "backward"


def test_results_have_gradients_and_saved_tensors_are_not_returned():
    results = call(*inputs())
    assert len(results) == 2
    assert all(r.requires_grad for r in results)


def test_without_gradients_nothing_is_saved():
    args = inputs()
    with torch.no_grad():
        results = call(*args)
    assert not any(r.requires_grad for r in results)
    call(*inputs(grad=False))
    with torch.inference_mode():
        call(*args)
    assert ran == [("forward", (False, False, False))] * 3


@pytest.mark.parametrize("frozen", range(3))
def test_frozen_inputs_cost_no_gradient(frozen):
    args = inputs()
    args[frozen].requires_grad_(False)
    wanted = [a for a in args if a.requires_grad]
    same(torch.autograd.grad(scalar(call)(*args), wanted), torch.autograd.grad(scalar(plain)(*args), wanted))
    needs = tuple(i != frozen for i in range(3))
    assert ran == [("forward", needs), ("backward", needs)]


def test_only_one_result_is_used():
    args = inputs()
    for i in range(2):
        found = torch.autograd.grad(call(*args)[i].sum(), args, allow_unused=True, materialize_grads=True)
        same(found, torch.autograd.grad(plain(*args)[i].sum(), args, allow_unused=True, materialize_grads=True))


def test_gradcheck():
    args = inputs()
    assert gradcheck(call, args)
    assert gradcheck(lambda x, w: call(x, w, None, 2, False), args[:2])


def test_gradgradcheck():
    args = inputs()
    assert gradgradcheck(call, args)
    args[1].requires_grad_(False)
    assert gradgradcheck(call, args)


def test_third_order():
    args = inputs()

    def third(fn):
        total = scalar(fn)(*args)
        for _ in range(2):
            grads = torch.autograd.grad(total, args, create_graph=True)
            total = sum(g.square().sum() for g in grads)
        return torch.autograd.grad(total, args)

    same(third(call), third(plain))


def test_backward_twice():
    args = inputs()
    total = scalar(call)(*args)
    same(torch.autograd.grad(total, args, retain_graph=True), torch.autograd.grad(total, args))


both = threading.Barrier(2)


def spending_backward(grads, saved, tensors, needs, spent):
    """The gradient of y = x², in the memory of what was saved where nothing will read that again."""
    with contextlib.suppress(threading.BrokenBarrierError):
        both.wait(0.2)  # for another thread
    if not spent:
        return [saved[0] * grads[0]]
    saved[0].data.mul_(grads[0])  # as C++ writes: without a trace in the tensor's version
    return [saved[0]]


spending = Differentiable(
    "test_spending", outputs=1, forward=lambda tensors, needs: [tensors[0] ** 2] + [2 * tensors[0]] * needs[0],
    fake=lambda tensors, needs: [torch.empty_like(tensors[0])] * (1 + needs[0]), backward=spending_backward,
    reference=lambda tensors: [tensors[0] ** 2], spends=True)


@pytest.mark.parametrize("retains", [(False, False), (True, False), (True, True)])
def test_backward_in_two_threads_is_right_or_an_error(retains):
    both.reset()
    x = torch.randn(5, requires_grad=True)
    (y,), found = spending([x]), {}

    def run(i):
        try:
            (found[i],) = torch.autograd.grad(y, x, torch.full((5,), 3.0), retain_graph=retains[i])
        except RuntimeError as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    right = [isinstance(f, torch.Tensor) and torch.equal(f, 6 * x) for f in found.values()]
    assert all(ok or isinstance(f, RuntimeError) for ok, f in zip(right, found.values(), strict=True)), found
    assert sum(right) >= 1 + all(retains)


def test_backward_that_waited_for_one_that_spends_is_an_error(monkeypatch):
    """Though what was saved is still there: autograd lets go of it when the first has returned."""
    class Turn:
        def __init__(self):
            self.lock = threading.Lock()

        def __enter__(self):
            self.lock.acquire()

        def __exit__(self, *exc):
            self.lock.release()
            time.sleep(0.3)

    monkeypatch.setattr(autograd, "threading", SimpleNamespace(Lock=Turn))
    test_backward_in_two_threads_is_right_or_an_error((False, False))


def test_what_hooks_keep_is_not_spent():
    x, kept = torch.randn(5, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        (y,) = spending([x])
    before = [t.clone() for t in kept]
    for retain in (True, True, False):
        assert torch.equal(torch.autograd.grad(y, x, torch.full((5,), 3.0), retain_graph=retain)[0], 6 * x)
    assert all(map(torch.equal, kept, before))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_makes_again_is_spent(reentrant, monkeypatch):
    seen = []
    monkeypatch.setattr(spending, "run_backward", lambda grads, saved, *rest, spent: seen.append(spent) or saved)
    x = torch.randn(5, requires_grad=True)
    checkpoint(lambda x: spending([x])[0], x, use_reentrant=reentrant).sum().backward()
    assert seen == [True]


def test_input_changed_in_place_before_backward_is_an_error():
    args = inputs()
    total = scalar(call)(*args)
    with torch.no_grad():
        args[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_same_tensor_twice():
    x = (torch.rand(3, dtype=torch.float64) + 0.5).requires_grad_()
    same(torch.autograd.grad(scalar(call)(x, x, x), x), torch.autograd.grad(scalar(plain)(x, x, x), x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    args = inputs()
    total = scalar(lambda *a: checkpoint(call, *a, use_reentrant=reentrant))(*args)
    same(torch.autograd.grad(total, args) if not reentrant else _backward(total, args),
         torch.autograd.grad(scalar(plain)(*args), args))
    assert [kind for kind, _ in ran] == ["forward", "forward", "backward"]


def _backward(total, args):
    total.backward()
    return tuple(a.grad for a in args)


# --- functorch and forward mode --------------------------------------------------------------------------------


def test_func_grad():
    args = inputs(grad=False)
    same(torch.func.grad(scalar(call), (0, 1, 2))(*args), torch.func.grad(scalar(plain), (0, 1, 2))(*args))
    assert ran[-1][0] == "backward"


def test_func_grad_without_bias_and_of_some():
    args = inputs(grad=False, bias=False)
    same(torch.func.grad(scalar(call), 1)(*args), torch.func.grad(scalar(plain), 1)(*args))


def test_func_vjp():
    args = inputs(grad=False)
    results, pull = torch.func.vjp(call, *args)
    expected, expected_pull = torch.func.vjp(plain, *args)
    same(results, expected)
    same(pull(results), expected_pull(results))


def test_func_second_order():
    args = inputs(grad=False)

    def second(fn):
        inner = torch.func.grad(scalar(fn), (0, 1))
        return torch.func.grad(lambda *a: sum(g.square().sum() for g in inner(*a)), (0, 1, 2))(*args)

    same(second(call), second(plain))


def test_vmap():
    x, w, b = inputs(4, 2, 3, grad=False)
    for dims in ((0, None, None), (1, None, None)):
        same(torch.vmap(call, dims)(x, w, b), torch.vmap(plain, dims)(x, w, b))
    stacked = torch.stack([w, w + 1, w - 1, w * 2])
    same(torch.vmap(call, (0, 0, None))(x, stacked, b), torch.vmap(plain, (0, 0, None))(x, stacked, b))


def test_vmap_of_grad_and_grad_of_vmap():
    x, w, b = inputs(4, 2, 3, grad=False)

    def per_sample(fn):
        return torch.vmap(torch.func.grad(scalar(fn), (0, 1)), (0, None, None))(x, w, b)

    def total(fn):
        return torch.func.grad(lambda w: scalar(torch.vmap(fn, (0, None, None)))(x, w, b))(w)

    same(per_sample(call), per_sample(plain))
    same(total(call), total(plain))


def test_vmap_of_grad_of_one_result():
    x, w, b = inputs(4, 2, 3, grad=False)
    for i in range(2):
        found, expected = (torch.vmap(torch.func.grad(lambda x, fn=fn: fn(x, w, b)[i].square().sum()))(x)  # noqa: B023
                           for fn in (call, plain))
        same(found, expected)


def test_vmap_with_autograd_outside():
    x, w, b = inputs(4, 2, 3)

    def grads(fn):
        return torch.autograd.grad(scalar(torch.vmap(fn, (0, None, None)))(x, w, b), (x, w, b))

    same(grads(call), grads(plain))


def test_forward_mode_is_an_error_not_a_zero():
    args = inputs(grad=False)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"forward mode|jvp|forward AD|Forward"):
        torch.func.jvp(call, tuple(args), tuple(torch.ones_like(a) for a in args))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(args[0], torch.ones_like(args[0]))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"forward mode|jvp|forward AD|Forward"):
            call(dual, *args[1:])


# --- the compiler and export -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("bias", [True, False])
def test_compiled_whole(backend, bias):
    args = inputs(bias=bias)
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    same(compiled(*args), plain(*args))
    same(torch.autograd.grad(scalar(compiled)(*args), args), torch.autograd.grad(scalar(plain)(*args), args))
    with torch.no_grad():
        same(compiled(*args), plain(*args))


@pytest.mark.parametrize("frozen", range(3))
def test_compiled_frozen(frozen):
    args = inputs()
    args[frozen].requires_grad_(False)
    wanted = [a for a in args if a.requires_grad]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    same(torch.autograd.grad(scalar(compiled)(*args), wanted), torch.autograd.grad(scalar(plain)(*args), wanted))
    assert ran[-1] == ("backward", tuple(i != frozen for i in range(3)))


def test_compiled_intermediates_and_one_result():
    """Inputs that are no leaves of the graph, and a result whose gradient is never asked for."""
    args = inputs()

    def fn(x, w, b):
        return call(x.exp(), w * 2, b + 1)[0].sin()

    def expected(x, w, b):
        return plain(x.exp(), w * 2, b + 1)[0].sin()

    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
    same(torch.autograd.grad(compiled(*args).sum(), args), torch.autograd.grad(expected(*args).sum(), args))


def test_double_backward_through_compiled_code_is_an_error():
    args = inputs()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    grads = torch.autograd.grad(scalar(compiled)(*args), args, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(sum(g.square().sum() for g in grads), args)


def test_dynamic_shapes_compile_once():
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph

    compiled = torch.compile(call, backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=count),
                             fullgraph=True, dynamic=True)
    for rows in (2, 3, 7):
        args = inputs(rows, 3)
        same(torch.autograd.grad(scalar(compiled)(*args), args), torch.autograd.grad(scalar(plain)(*args), args))
    assert len(graphs) == 1 or len(graphs) == 2, len(graphs)  # a forward graph, and a backward one


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))

    def forward(self, x):
        return call(x, self.w, self.b)


@pytest.mark.parametrize("strict", [False, True])
def test_export_then_train(strict):
    model, x = Toy(), torch.rand(2, 3, dtype=torch.float64) + 0.5
    exported = torch.export.export(model, (x,), strict=strict).module()
    same(exported(x), model(x))
    exported.load_state_dict(model.state_dict())
    scalar(exported)(x).backward()
    expected = torch.autograd.grad(scalar(plain)(x, model.w, model.b), (model.w, model.b))
    same((exported.w.grad, exported.b.grad), expected)


def test_exported_inputs_get_gradients_too():
    """Frozen when exported, trained later: nothing guards an exported graph, so it must be right or refuse."""
    model, x = Toy().requires_grad_(False), torch.rand(2, 3, dtype=torch.float64) + 0.5
    exported = torch.export.export(model, (x,)).module()
    wanted = x.clone().requires_grad_()
    expected = torch.autograd.grad(scalar(plain)(wanted, model.w, model.b), wanted)
    same(torch.autograd.grad(scalar(exported)(wanted), wanted), expected)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
    same(exported(x), plain(x, model.w, model.b))
    with pytest.raises(RuntimeError, match=r"test_toy.*export it with gradients enabled"):
        scalar(exported)(wanted).backward()


@pytest.mark.parametrize("slots", [[0, 0, 0], [1, 1, 1], [1, 0, -1], [0, 0, -1]])
def test_opcheck(slots):
    """Both operators keep torch.library's contract: schema, fake tensors, autograd registration, AOT dispatch."""
    tensors = inputs(grad=False, bias=slots[-1] != -1)
    torch.library.opcheck(torch.ops.fastlm.test_toy.default, (tensors, slots, 3, True))
    results = toy.forward_op(tensors, slots, 3, True)
    grads, saved = [torch.randn_like(r) for r in results[:2]], results[2:]
    if saved:
        torch.library.opcheck(torch.ops.fastlm.test_toy_backward.default, (grads, saved, tensors, slots, 3, True))


def test_fake_and_meta_tensors():
    with torch._subclasses.fake_tensor.FakeTensorMode():
        x, w = torch.empty(2, 3), torch.empty(3)
        assert [tuple(r.shape) for r in call(x, w)] == [(2, 3), (2,)]
        assert [tuple(r.shape) for r in call(x.requires_grad_(), w)] == [(2, 3), (2,)]
    x, w = torch.empty(2, 3, device="meta", requires_grad=True), torch.empty(3, device="meta")
    y, z = call(x, w)
    assert y.is_meta
    assert y.shape == (2, 3)
    (y.sum() + z.sum()).backward()
    assert x.grad.shape == x.shape
    assert ran == []


def test_backward_that_reads_the_results():
    """Every road again, for a backward that wants the results in place of copies of them."""
    args = inputs(bias=False)

    def call(*args):
        return tuple(exponential(args))

    def plain(*args):
        return tuple(exponential_reference(args))

    assert gradcheck(call, args)
    assert gradgradcheck(call, args)
    expected = torch.autograd.grad(scalar(plain)(*args), args)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for fn in (call, compiled, lambda *a: checkpoint(call, *a, use_reentrant=False)):
        same(torch.autograd.grad(scalar(fn)(*args), args), expected)
    same(torch.func.grad(scalar(call), (0, 1))(*args), expected)
    detached = [a.detach() for a in args]
    grads = [torch.vmap(torch.func.grad(scalar(fn)), (0, None))(*detached) for fn in (call, plain)]
    same(*grads)
    with torch.no_grad():
        results = call(*args)
        torch.library.opcheck(torch.ops.fastlm.test_exponential.default, (detached, [1, 1]))
        torch.library.opcheck(torch.ops.fastlm.test_exponential_backward.default, (
            [torch.randn_like(r) for r in results], list(results), detached, [1, 0]))


# --- autocast --------------------------------------------------------------------------------------------------


def test_autocast_casts_what_stock_casts():
    tensors = [torch.zeros(2), torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float16),
               torch.zeros(2, dtype=torch.int64), None]
    assert autocast("cpu", *tensors) == tuple(tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = autocast("cpu", *tensors)
    assert [t if t is None else t.dtype for t in found] == [
        torch.bfloat16, torch.float64, torch.bfloat16, torch.int64, None]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert autocast("cpu", *tensors) == tuple(tensors)


def test_gradient_flows_through_autocast():
    x = torch.randn(3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, = autocast("cpu", x)
    y.sum().backward()
    assert x.grad.dtype is torch.float32
