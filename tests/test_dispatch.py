"""backend() and explain(): which implementation runs, why the others do not, and what the compiler makes of it."""

import importlib.util
import re
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm.dispatch import NAMES, Call, CannotRun, Implementation, Op


def toy(name="toy", **fast):
    """Make an op whose implementations give different numbers: reference x + 1, torch x + 2, then x + 3, x + 4 …"""
    op = Op(name, reference=lambda x: x + 1, torch=lambda x: x + 2, samples=lambda *_: iter(()), cost=lambda x: (0, 0))
    op.implementations = {**fast, **op.implementations}
    op.default = (*fast, "torch")
    return op


def refuses(x):
    return "too short" if x.shape[0] < 3 else None


def slower(x):
    return "slower than torch below 100" if x.shape[0] < 100 else None


TRITON = Implementation(lambda x: x + 3, cannot=refuses)
NATIVE = Implementation(lambda x: x + 4, loses=slower)
X = torch.zeros(5)


def value(op, x=X):
    return op(x)[0].item()


def test_default_order_is_the_tuple_as_written():
    assert value(toy(triton=TRITON, native=Implementation(lambda x: x + 4))) == 3
    assert value(toy(native=Implementation(lambda x: x + 4), triton=TRITON)) == 4
    assert value(toy(native=NATIVE, triton=TRITON)) == 3
    assert value(toy(native=NATIVE)) == 2
    assert value(toy()) == 2


def test_choose_reports_each_reason_once():
    op = toy(triton=TRITON, native=NATIVE)
    ran, declined = op.choose((torch.zeros(2),))
    assert ran == "torch"
    assert declined == {"triton": "too short", "native": "slower than torch below 100"}
    assert op.choose((torch.zeros(200),)) == ("triton", {})


def test_backend_is_an_order():
    op = toy(triton=TRITON, native=NATIVE)
    with fastlm.backend("native", "triton"):
        assert value(op) == 4
    with fastlm.backend("triton", "native"):
        assert value(op) == 3
        assert op.choose((torch.zeros(2),)) == ("native", {"triton": "too short"})
    with fastlm.backend("reference"):
        assert value(op) == 1
    with fastlm.backend("torch"):
        assert value(op) == 2
    assert value(op) == 3


def test_backend_overrides_a_measured_reason_but_never_a_hard_one():
    op = toy(triton=TRITON, native=NATIVE)
    with fastlm.backend("native"):
        assert value(op) == 4
    with fastlm.backend("triton"), pytest.raises(RuntimeError, match=r"toy.*triton.*too short"):
        op(torch.zeros(2))


def test_named_backend_never_falls_back():
    op = toy(triton=TRITON, native=Implementation(lambda x: x + 4, cannot=lambda x: "no compiler"))
    with fastlm.backend("triton", "native"), pytest.raises(RuntimeError) as caught:
        op(torch.zeros(2))
    assert "triton: too short" in str(caught.value)
    assert "native: no compiler" in str(caught.value)
    with fastlm.backend("triton", "torch"):
        assert value(op, torch.zeros(2)) == 2


def test_op_without_the_named_implementation_keeps_its_default():
    op = toy(triton=TRITON)
    with fastlm.backend("native"):
        assert value(op) == 3
        assert value(op, torch.zeros(2)) == 2


def test_explain_says_that_an_op_lacks_the_named_implementation():
    layer, x = fastlm.nn.LSTM(3, 4), torch.randn(5, 2, 3)
    with fastlm.backend("triton"):
        (call,) = fastlm.explain(layer, x)
    assert call.declined["triton"] == "lstm has no such implementation"


def test_nested_backends():
    op = toy(triton=TRITON, native=NATIVE)
    with fastlm.backend("torch"):
        with fastlm.backend("native"):
            assert value(op) == 4
            with fastlm.backend("reference"):
                assert value(op) == 1
            assert value(op) == 4
        assert value(op) == 2
    assert value(op) == 3


def test_backend_ends_with_an_exception():
    op = toy(triton=TRITON)
    with pytest.raises(ZeroDivisionError), fastlm.backend("reference"):
        1 / 0  # noqa: B018
    assert value(op) == 3


@pytest.mark.parametrize("names", [("cuda",), ("torch", "Triton"), (), ("",)])
def test_unknown_names_are_refused(names):
    with pytest.raises(ValueError, match="reference, torch, triton, native, blocked"):
        fastlm.backend(*names)


def test_the_five_names():
    assert NAMES == ("reference", "torch", "triton", "native", "blocked")
    for op in fastlm.ops.ALL:
        assert set(op.implementations) <= set(NAMES)
        assert {"reference", "torch"} <= set(op.implementations)
        assert op.default[-1] == "torch"


def test_predicates_errors_propagate():
    def broken(x):
        raise KeyError("broken predicate")

    for implementation in (Implementation(None, cannot=broken), Implementation(None, loses=broken)):
        with pytest.raises(KeyError, match="broken predicate"):
            toy(native=implementation)(X)


def test_other_devices_get_stock_with_that_reason():
    op = toy(native=Implementation(lambda x: x + 4))
    calls = fastlm.explain(op, torch.zeros(5, device="meta"))
    assert calls[0].ran == "torch"
    assert "meta" in calls[0].declined["native"]
    with fastlm.backend("native"), pytest.raises(RuntimeError, match="meta"):
        op(torch.zeros(5, device="meta"))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested tensors")
def test_nested_and_sparse_tensors_get_stock():
    x, weight = torch.randn(512, 128), torch.randn(256, 128)
    sparse = weight.to_sparse_csr()
    calls = fastlm.explain(fastlm.ops.linear, x, sparse)
    assert calls[0].ran == "torch"
    assert "sparse_csr" in calls[0].declined["native"]
    torch.testing.assert_close(fastlm.ops.linear(x, sparse), F.linear(x, sparse))
    with fastlm.backend("native"), pytest.raises(CannotRun, match="sparse_csr"):
        fastlm.ops.linear(x, sparse)
    nested = torch.nested.nested_tensor([torch.randn(2, 128), torch.randn(3, 128)])
    for ours, stock in ((fastlm.nn.Linear(128, 5), nn.Linear(128, 5)), (fastlm.nn.LayerNorm(128), nn.LayerNorm(128))):
        stock.load_state_dict(ours.state_dict())
        for a, b in zip(ours(nested).unbind(), stock(nested).unbind(), strict=True):
            torch.testing.assert_close(a, b)
    attention = fastlm.nn.MultiheadAttention(128, 2, batch_first=True).eval()
    layer = fastlm.nn.TransformerEncoderLayer(128, 2, batch_first=True).eval()
    for call in (lambda: attention(nested, nested, nested, need_weights=False), lambda: layer(nested)):
        with torch.no_grad():
            explained, = fastlm.explain(call)
        assert (explained.op, explained.ran, explained.declined["native"]) == ("attention", "torch", "nested tensors")
        with torch.no_grad(), fastlm.backend("native"), pytest.raises(CannotRun, match="nested tensors"):
            call()


# --- explain ---------------------------------------------------------------------------------------------------


def test_explain_an_op():
    op = toy(triton=TRITON, native=NATIVE)
    calls = fastlm.explain(op, torch.zeros(2))
    assert calls == [Call("toy", "torch", {"triton": "too short", "native": "slower than torch below 100"})]
    lines = str(calls).splitlines()
    assert lines[0].split() == ["op", "ran", "declined"]
    assert lines[1].split(maxsplit=2) == ["toy", "torch", "triton: too short"]
    assert lines[2].strip() == "native: slower than torch below 100"


def test_explain_keeps_the_order_of_calls_and_passes_arguments():
    a, b = toy("a", triton=TRITON), toy("b")

    def fn(x, *, twice):
        b(a(x))
        if twice:
            a(x[:2])

    calls = fastlm.explain(fn, X, twice=True)
    assert [(c.op, c.ran) for c in calls] == [("a", "triton"), ("b", "torch"), ("a", "torch")]


def test_explain_without_ops():
    calls = fastlm.explain(torch.relu, X)
    assert calls == []
    assert "no fastlm op" in str(calls)


def test_explain_a_module_and_a_training_step():
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), fastlm.nn.Softmax(-1))
    assert [c.op for c in fastlm.explain(model, X)] == ["softmax"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    before = model[0].weight.detach().clone()
    calls = fastlm.explain(step, X.requires_grad_(False) + 1)
    assert [c.op for c in calls] == ["softmax"]
    assert not torch.equal(before, model[0].weight), "explain runs the step itself, once"


def test_explain_sees_a_named_backend():
    op = toy(triton=TRITON, native=NATIVE)
    with fastlm.backend("native"):
        assert fastlm.explain(op, X) == [Call("toy", "native", {})]


def test_explain_is_over_after_an_exception():
    op = toy()

    def fn():
        op(X)
        raise KeyError("from fn")

    with pytest.raises(KeyError, match="from fn"):
        fastlm.explain(fn)
    assert fastlm.dispatch._calls is None
    assert len(fastlm.explain(op, X)) == 1


def test_explain_inside_explain():
    op = toy()
    inner = []

    def fn():
        op(X)
        inner.extend(fastlm.explain(op, X))
        op(X)

    assert len(fastlm.explain(fn)) == 2
    assert len(inner) == 1


@pytest.mark.parametrize("module", [False, True], ids=["function", "module"])
def test_explain_something_compiled(module):
    """A compiled function shows the same calls as the plain one, before and after it was first compiled."""
    torch._dynamo.reset()
    fn = torch.nn.Sequential(torch.nn.Softmax(-1), fastlm.nn.Softmax(-1)) if module else lambda x: fastlm.ops.softmax(
        torch.relu(x), -1)
    compilations = []
    compiled = torch.compile(fn, backend=lambda graph, inputs: compilations.append(graph) or graph)
    plain = list(fastlm.explain(fn, X))
    for times in range(2):
        calls = fastlm.explain(compiled, X)
        assert list(calls) == plain
        assert len(compilations) == times, "explain compiles nothing"
        assert "traced" in str(calls)
        compiled(X)
    assert "traced" not in str(fastlm.explain(fn, X))


# --- the compiler, threads and checkpoints ---------------------------------------------------------------------


def test_compiled_code_is_never_stale():
    """A compiled function follows the backend of each call, and compiles once for each."""
    torch._dynamo.reset()
    op = toy(triton=TRITON, native=NATIVE)
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph

    compiled = torch.compile(lambda x: op(x), backend=count, fullgraph=True)
    for _ in range(3):
        assert compiled(X)[0] == 3
        with fastlm.backend("native"):
            assert compiled(X)[0] == 4
        with fastlm.backend("reference"):
            assert compiled(X)[0] == 1
    assert len(compilations) == 3


def test_backend_inside_compiled_code():
    torch._dynamo.reset()
    op = toy(triton=TRITON, native=NATIVE)

    def fn(x):
        with fastlm.backend("native"):
            inner = op(x)
        return inner, op(x)

    inner, outer = torch.compile(fn, backend="eager", fullgraph=True)(X)
    assert (inner[0], outer[0]) == (4, 3)


def test_refusal_under_compile_is_an_error():
    torch._dynamo.reset()
    op = toy(triton=TRITON)
    compiled = torch.compile(lambda x: op(x), backend="eager")
    with fastlm.backend("triton"), pytest.raises(RuntimeError, match="too short"):
        compiled(torch.zeros(2))


class CallsInBackward(torch.autograd.Function):
    """Call an op in backward, as the recomputation of a checkpoint does."""

    @staticmethod
    def forward(ctx, x, op):
        ctx.op = op
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.op(torch.zeros_like(grad)), None


def test_another_thread_sees_the_backend():
    """Autograd runs a backward in threads of its own: the choice is global, not of one thread."""
    op, x = toy(triton=TRITON, native=NATIVE), X.clone().requires_grad_()
    out = CallsInBackward.apply(x, op).sum()
    with fastlm.backend("native"):
        thread = threading.Thread(target=out.backward)
        thread.start()
        thread.join()
    assert x.grad[0] == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_with_the_same_implementation(reentrant):
    x = torch.randn(5, requires_grad=True)

    def step():
        with fastlm.backend("reference"):
            out = checkpoint(lambda x: fastlm.ops.softmax(x, -1).square(), x, use_reentrant=reentrant)
            out.sum().backward()

    assert [(c.op, c.ran) for c in fastlm.explain(step)] == [("softmax", "reference")] * 2
    expected = torch.autograd.grad(torch.softmax(x, -1).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


class Wrapper(torch.Tensor):
    """A tensor around another, such as a sharded or a quantized one."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.namespace == "aten", f"{func} is not torch's"
        unwrapped = [arg.inner if isinstance(arg, cls) else arg for arg in args]
        return func(*unwrapped, **(kwargs or {}))


def test_tensors_made_of_others_run_stock():
    x, weight = torch.randn(3, 600), torch.randn(600, 600)
    call, = fastlm.explain(fastlm.ops.linear, x, Wrapper(weight))
    assert call.ran == "torch"
    torch.testing.assert_close(fastlm.ops.linear(x, Wrapper(weight)), torch.nn.functional.linear(x, weight))
    with fastlm.backend("native"), pytest.raises(fastlm.dispatch.CannotRun, match=r"Wrapper|extension"):
        fastlm.ops.linear(x, Wrapper(weight))
    ran, declined = toy(native=NATIVE).choose(([x, Wrapper(weight)],))  # anywhere in a list
    assert ran == "torch"
    assert "Wrapper is made of other tensors" in declined["native"]


@pytest.mark.parametrize(("missing", "reason"), [
    ("fastlm._native", "the C\\+\\+ extension is missing"), ("fastlm.ops.head", None), ("other", "no module")])
def test_a_fault_of_ours_is_no_missing_requirement(missing, reason, monkeypatch):
    """Such as a circular import, which would have stock run for ever."""
    def fail(name):
        raise ImportError(f"no module {missing}", name=missing)
    monkeypatch.setattr(fastlm.dispatch.importlib, "import_module", fail)
    if reason is None:
        with pytest.raises(ImportError, match="no module"):
            fastlm.dispatch._load("softmax", "native")
    else:
        made = fastlm.dispatch._load("softmax", "native")
        assert made.run is None
        assert re.match(reason, made.cannot())


def test_what_is_installed_is_loaded():
    """Blocked implementations need nothing; one extension serves all ops, and so does one Triton."""
    there = {"blocked": True, "native": importlib.util.find_spec("fastlm._native") is not None,
             "triton": fastlm.dispatch.triton_can_run() and importlib.util.find_spec("triton") is not None}
    for op in fastlm.ops.ALL:
        for name in op.fast:
            assert (op.implementations[name].run is not None) == there[name], (op.name, name)


# --- small calls -----------------------------------------------------------------------------------------------


def test_at_once_comes_before_checks_but_not_before_explain_backend_and_compiler():
    op = toy(triton=TRITON)

    @fastlm.dispatch.at_once(lambda x, *, sure=True: x + 9 if sure and x.shape[0] > 3 else None)
    def call(x, *, sure=True):
        """Add something."""
        if not isinstance(x, torch.Tensor):
            raise TypeError("toy: x must be a Tensor")
        return op(x)

    assert call.__doc__ == "Add something."
    assert value(call) == 9
    assert value(call, X[:3]) == 3, "the shortcut returned None"
    assert call(X, sure=False)[0] == 3
    with pytest.raises(TypeError, match="toy: x must be") as caught:
        call([1])
    assert caught.value.__context__ is None, "what the shortcut raised is nobody's concern"
    assert [c.ran for c in fastlm.explain(call, X)] == ["triton"]
    for name, expected in (("torch", 2), ("reference", 1)):
        with fastlm.backend(name):
            assert value(call) == expected
    torch._dynamo.reset()
    assert torch.compile(call, backend="eager", fullgraph=True)(X)[0] == 3


def test_torchs_newer_names_of_precision():
    """Once one is set, the older function raises; layers must not. In a process of its own: it cannot be undone."""
    code = """
import torch, fastlm
from fastlm.ops.tensors import matmul_precision
assert matmul_precision("cpu") == matmul_precision("cuda") == "highest"
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
torch.backends.cuda.matmul.fp32_precision = "tf32"
assert (matmul_precision("cpu"), matmul_precision("cuda")) == ("medium", "high")
x = torch.randn(40, 8, 256)
fastlm.nn.Linear(256, 256)(x), fastlm.nn.GRU(256, 256)(x), fastlm.nn.LSTM(256, 256)(x)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
