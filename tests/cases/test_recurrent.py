"""What lstm, gru and rnn need beyond the matrix of test_ops: arguments, dropout, threads, compilers."""

import functools
import sys
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm import measure, ops
from fastlm.ops import ALL, recurrent, recurrent_kernels
from tests.parity import absent, keep_error_rule

CELLS = {"lstm": (4, 2), "gru": (3, 1), "rnn": (1, 1)}
OPS = {op.name: op for op in ALL}
RUNS = [name for name in CELLS if OPS[name].implementations["native"].run is not None]
native = pytest.mark.skipif(not RUNS, reason="the C++ extension is missing")
each_cell = pytest.mark.parametrize("name", CELLS)


def make(name, dtype=torch.float32, **options):
    args = recurrent.make_args(*CELLS[name], dtype, "cpu", **options)
    return (*args, "tanh") if name == "rnn" else args


def public(name, args):
    """Return the positional arguments of the public function for the op's canonical ones."""
    data, batch_sizes, hx, params, *options = args[:10]
    state = list(hx) if name == "lstm" else hx[0]
    if batch_sizes is None:
        return [data, state, params, *options]
    return [data, batch_sizes, state, params, *options[:-1]]


STOCK = {"lstm": torch.lstm, "gru": torch.gru, "rnn": torch.rnn_tanh}


# --- arguments -------------------------------------------------------------------------------------------------


@each_cell
@pytest.mark.parametrize("options", [{}, {"lengths": (4, 2, 1), "bidirectional": True}, {"batch_first": True}])
def test_public_function_is_stock_s(name, options):
    args = public(name, make(name, **options))
    for a, b in zip(getattr(ops, name)(*args), STOCK[name](*args), strict=True):
        torch.testing.assert_close(a, b)


@each_cell
def test_keywords(name):
    args = make(name, lengths=(3, 1))
    positional = public(name, args)
    keywords = dict(zip(recurrent.PACKED, positional, strict=True))
    for a, b in zip(getattr(ops, name)(**keywords), getattr(ops, name)(*positional), strict=True):
        assert torch.equal(a, b)


def test_relu():
    args = public("rnn", make("rnn"))
    torch.testing.assert_close(ops.rnn(*args, nonlinearity="relu"), torch.rnn_relu(*args))
    with pytest.raises(ValueError, match="nonlinearity must be 'tanh' or 'relu', got 'gelu'"):
        ops.rnn(*args, nonlinearity="gelu")


def spoil(args, index, value):
    args = list(args)
    args[index] = value
    return args


BAD = {
    "hx for another batch": (lambda a: spoil(a, 1, [h[:, :2] for h in a[1]]),
                             r"lstm: hx\[0\] has shape \[1, 2, 8\], expected \[1, 3, 8\]"),
    "one state": (lambda a: spoil(a, 1, a[1][:1]), "hx has 1 tensors, expected 2"),
    "dtype": (lambda a: spoil(a, 0, a[0].double()), "hx.0. has dtype torch.float32, input has torch.float64"),
    "integers": (lambda a: spoil(a, 0, a[0].long()), "input must be floating point"),
    "input size": (lambda a: spoil(a, 0, a[0][..., :5]), r"params\[0\] has shape \[32, 6\], expected \[32, 5\]"),
    "two dimensions": (lambda a: spoil(a, 0, a[0][0]), "expected 3 dimensions"),
    "a weight missing": (lambda a: spoil(a, 2, a[2][:3]), "params has 3 tensors, expected 4 for each of 1"),
    "a bias too long": (lambda a: spoil(a, 2, [*a[2][:3], a[2][3].repeat(2)]), r"params\[3\] has shape"),
    "no steps": (lambda a: spoil(a, 0, a[0][:0]), "at least one time step"),
    "dropout": (lambda a: spoil(a, 5, 1.5), "dropout is 1.5, expected a probability"),
    "meta": (lambda a: spoil(a, 0, a[0].to("meta")), "hx.0. is on cpu, input is on meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    change, message = BAD[case]
    with pytest.raises(RuntimeError, match=message):
        ops.lstm(*change(public("lstm", make("lstm"))))


@pytest.mark.parametrize(("sizes", "message"), [
    ([1, 3, 1], "never rise"), ([3, 2, 0], "positive"), ([3, 1], "sum to 4"), ([], "non-empty")])
def test_bad_batch_sizes(sizes, message):
    args = public("gru", make("gru", lengths=(3, 1, 1)))
    with pytest.raises(RuntimeError, match=message):
        ops.gru(*spoil(args, 1, torch.tensor(sizes, dtype=torch.int64)))


@pytest.mark.parametrize("name", ["torch", "native"])
def test_batch_sizes_that_lie_apart(name):
    if reason := absent(OPS["gru"], name, "cpu"):
        pytest.skip(reason)
    args = public("gru", make("gru", lengths=(3, 1, 1)))
    apart = torch.stack([args[1], torch.full_like(args[1], 7)], 1)[:, 0]
    with fastlm.backend(name):
        for found, expected in zip(ops.gru(*spoil(args, 1, apart)), ops.gru(*args), strict=True):
            assert torch.equal(found, expected)


def test_wrong_number_of_arguments():
    args = public("gru", make("gru"))
    with pytest.raises(TypeError, match="gru: expected the arguments"):
        ops.gru(*args[:-1])
    with pytest.raises(TypeError, match="gru: expected the arguments"):
        ops.gru(*args, bach_first=True)
    with pytest.raises(TypeError, match=r"params\[0\] must be a Tensor, got str"):
        ops.gru(*spoil(args, 2, ["w", *args[2][1:]]))


def _layer(args, batch_sizes):
    """Call the operator of one layer of GRU."""
    tensors = [args[0], batch_sizes, *args[2], *args[3]]
    return torch.ops.fastlm.gru_layer.default(tensors, [0] * len(tensors) + [-1], False)


@native
def test_kernels_check_batch_sizes_again():
    """Compiled callers reach the kernel without the public function's look at the values."""
    args = make("gru", lengths=(3, 1, 1))
    with pytest.raises(RuntimeError, match="never rise"):
        OPS["gru"].implementations["native"].run(args[0], torch.tensor([1, 3, 1]), *args[2:])
    with pytest.raises(RuntimeError, match="hx is for 3 sequences, batch_sizes for 2"):
        OPS["gru"].implementations["native"].run(args[0], torch.tensor([2, 2, 1]), *args[2:])
    with pytest.raises(RuntimeError, match="batch_sizes must be contiguous, got stride 2"):
        _layer(args, torch.tensor([3, 1, 1, 1, 1, 1])[::2])
    _layer(args, torch.tensor([3, 1, 1]))


# --- numbers beyond the error rule -----------------------------------------------------------------------------


@native
@each_cell
def test_dropout_is_stock_s(name):
    args = make(name, layers=3, dropout=0.5, bidirectional=True, hidden=16)
    results = []
    for implementation in ("native", "torch", "reference"):
        torch.manual_seed(3)
        results.append(OPS[name].implementations[implementation].run(*args))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


@native
@each_cell
@pytest.mark.parametrize("options", [
    {"hidden": 3}, {"lengths": (2, 1), "bidirectional": True}, {"batch": 1, "bias": False}])
def test_second_order(name, options):
    args = make(name, torch.float64, steps=3, inputs=1, **({"batch": 2, "hidden": 2} | options))
    leaves = measure.floating(args)

    def call(*inputs):
        table = {id(a): b for a, b in zip(leaves, inputs, strict=True)}
        with fastlm.backend("native"):
            return OPS[name](*torch.utils._pytree.tree_map(lambda x: table.get(id(x), x), args))

    inputs = [x.detach().requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@native
@each_cell
def test_func_grad(name):
    args = make(name, torch.float64, lengths=(3, 2))

    def loss(x, w, implementation):
        return OPS[name].implementations[implementation].run(
            x, *args[1:3], [w, *args[3][1:]], *args[4:])[0].square().sum()

    found, exact = (torch.func.grad(loss, (0, 1))(args[0], args[3][0], i) for i in ("native", "reference"))
    torch.testing.assert_close(found, exact)


@native
@each_cell
def test_checkpointed(name):
    args = make(name, layers=2, dropout=0.4)
    x = args[0].requires_grad_()
    run = OPS[name].implementations["native"].run
    found = []
    for wrapped in (run, lambda *a: checkpoint(run, *a, use_reentrant=False)):
        torch.manual_seed(5)
        found.append(torch.autograd.grad(wrapped(*args)[0].sum(), x)[0])
    assert torch.equal(*found)


@native
@each_cell
def test_two_graphs_and_retained_ones(name):
    """A second call must not touch what the first keeps for its backward, nor a backward what it may read again."""
    first, second = (make(name, hidden=20, batch=b) for b in (4, 1))
    run = OPS[name].implementations["native"].run
    x = first[0].requires_grad_()
    out = run(*first)[0].sum()
    again = torch.autograd.grad(run(*first)[0].sum(), x)[0]
    second[0].requires_grad_()
    run(*second)[0].sum().backward()
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(out, x, retain_graph=True)[0], again)


@native
@each_cell
def test_backward_mapped_over_upstream_gradients(name):
    """All maps read what was saved once: none may write its gradients there."""
    args = make(name, hidden=20, batch=3)
    x = args[0].requires_grad_()
    run = OPS[name].implementations["native"].run
    y = run(*args)[0]
    upstream = torch.randn(3, *y.shape)
    found = torch.func.vmap(lambda g: torch.autograd.grad(y, x, g)[0])(upstream)
    torch.testing.assert_close(found, torch.stack([torch.autograd.grad(run(*args)[0], x, g)[0] for g in upstream]))


@native
@each_cell
@pytest.mark.parametrize("compiled", [False, True])
def test_last_states_may_be_changed_in_place(name, compiled):
    """As where an episode ends and its state begins anew: backward does not read them."""
    def changed(*args):
        y, *states = OPS[name](*args)
        for state in states:
            state[:, 0] = 0
        return y.sum() + sum(state.square().sum() for state in states)

    def left(*args):
        y, *states = OPS[name](*args)
        return y.sum() + sum(state[:, 1:].square().sum() for state in states)
    args = make(name, hidden=20, batch=3)
    grads = []
    with fastlm.backend("native"):
        for fn in (torch.compile(changed, backend="aot_eager") if compiled else changed, left):
            x = args[0].detach().requires_grad_()
            grads.append(torch.autograd.grad(fn(x, *args[1:]), x)[0])
    torch.testing.assert_close(*grads)


@native
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_gradients_summed_over_many_steps(name):
    """Gradients of weights and biases are sums over all steps: float32 must not lose more digits than stock does."""
    def errors(draw):
        torch.manual_seed(draw)
        return measure.errors(OPS[name], "native", make(name, steps=1500, batch=2, hidden=16, inputs=4))
    keep_error_rule(errors)


@native
@each_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [
    dict(batch=3), dict(batch=1), dict(lengths=(7, 5, 5, 1), bidirectional=True), dict(batch=2, bidirectional=True),
    dict(batch=3, proj=5)], ids=["plain", "one sequence", "packed", "both ways", "projected"])
def test_blocks_of_time(options, dtype, name, monkeypatch):
    """Gates that are more than a cache holds are made, used and given back block by block: here step by step."""
    if "proj" in options and name != "lstm":
        pytest.skip("LSTM alone projects")
    monkeypatch.setattr(recurrent_kernels, "BLOCK_BYTES", 1)

    def errors(draw):
        torch.manual_seed(draw)
        return measure.errors(OPS[name], "native", make(name, dtype, steps=7, hidden=19, inputs=6, **options))
    keep_error_rule(errors)


@native
@each_cell
def test_deterministic_and_inputs_untouched(name):
    args = make(name, hidden=70, batch=5, lengths=(9, 9, 4, 2, 1), bidirectional=True)
    before = [x.clone() for x in measure.floating(args)]
    run = OPS[name].implementations["native"].run
    runs = [measure.differentiate(run, args) for _ in range(3)]
    for results, _, grads in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results + grads, runs[0][0] + runs[0][2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(measure.floating(args), before, strict=True))


@native
@each_cell
@pytest.mark.parametrize("batch", [1, 6])
def test_python_threads_and_thread_counts(name, batch):
    """Several Python threads share the weights while the number of OpenMP threads changes between calls."""
    args = make(name, hidden=150, batch=batch, steps=12)
    exact = measure.differentiate(OPS[name].implementations["torch"].run, args)
    found, count = [None] * 4, torch.get_num_threads()

    def work(i):
        torch.set_num_threads(1 + i % 3)
        for _ in range(3):
            found[i] = measure.differentiate(OPS[name].implementations["native"].run, args, exact[1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(found))]
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        torch.set_num_threads(count)
    for results, _, grads in found:
        for a, b in zip(results + grads, exact[0] + exact[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@native
@each_cell
@pytest.mark.parametrize("options", [{}, {"lengths": (4, 2)}, {"lengths": (4, 4)}, {"lengths": (4,)},
                                     {"lengths": (4, 2), "proj": 3}, {"lengths": (4, 4), "proj": 3}], ids=str)
def test_autocast_dtype(name, options):
    if "proj" in options and name != "lstm":
        pytest.skip("only LSTMs are projected")
    args = make(name, **options)
    with torch.autocast("cpu", torch.bfloat16):
        stock, ours, reduced = (OPS[name].implementations[i].run(*args) for i in ("torch", "native", "reference"))
    assert [t.dtype for t in ours] == [t.dtype for t in stock]
    for a, b in zip(ours, reduced, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.03, atol=0.03)


# --- compilers -------------------------------------------------------------------------------------------------


@each_cell
@pytest.mark.parametrize("implementation", ["native", "torch"])
@pytest.mark.parametrize("options", [{"layers": 2, "bidirectional": True}, {"lengths": (4, 2, 1)}])
def test_compiled_whole(name, implementation, options):
    if implementation == "native" and not RUNS:
        pytest.skip("the C++ extension is missing")
    torch._dynamo.reset()
    args = public(name, make(name, **options))

    def call(*args):
        return getattr(ops, name)(*args)

    with fastlm.backend(implementation):
        eager = measure.differentiate(call, args)
        compiled = measure.differentiate(torch.compile(call, fullgraph=True), args, eager[1])
    for a, b in zip(compiled[0] + compiled[2], eager[0] + eager[2], strict=True):
        torch.testing.assert_close(a, b)


@native
@pytest.mark.parametrize("cell", ["lstm", "gru", "tanh", "relu"])
@pytest.mark.parametrize("options", [{}, {"lengths": (3, 2)}, {"bias": False}])
def test_opcheck(cell, options):
    name = cell if cell in CELLS else "rnn"
    data, batch_sizes, hx, params, *_ = make(name, **options)
    tensors = [data, batch_sizes, *hx, *params, *[None] * (5 - len(params))]
    slots = [-1 if t is None else int(t.is_floating_point()) for t in tensors]
    present = [t for t in tensors if t is not None]
    forward = getattr(torch.ops.fastlm, f"{cell}_layer").default
    torch.library.opcheck(forward, (present, slots, True))
    results = forward(present, slots, True)
    grads = [torch.ones_like(r) for r in results[:1 + len(hx)]]
    torch.library.opcheck(getattr(torch.ops.fastlm, f"{cell}_layer_backward").default,
                          (grads, [results[0], *results[1 + len(hx):]], present, slots, True))
    backward = getattr(torch.ops.fastlm, f"{cell}_layer_backward").default
    with pytest.raises(RuntimeError, match=r"is not what forward has saved|shape"):
        backward(grads, [results[0][:-1], *results[1 + len(hx):]], present, slots, True)
    if len(results) > 1 + len(hx):
        with pytest.raises(RuntimeError, match=r"is not what forward has saved|shape"):
            backward(grads, list(results), present, slots, True)


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=native)])
@pytest.mark.parametrize(("cell", "options"), [("LSTM", {}), ("LSTM", {"proj_size": 3}), ("GRU", {}), ("RNN", {})])
def test_autocast_dtype_is_stocks_compiled_or_not(cell, options, backend):
    ours, stock = (getattr(namespace, cell)(6, 5, **options) for namespace in (fastlm.nn, torch.nn))
    x = torch.randn(20, 3, 6)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16), fastlm.backend(backend):
        expected = [t.dtype for t in torch.utils._pytree.tree_leaves(stock(x))]
        assert [t.dtype for t in torch.utils._pytree.tree_leaves(ours(x))] == expected
        assert [t.dtype for t in torch.utils._pytree.tree_leaves(compiled(x))] == expected


# --- a GPU -----------------------------------------------------------------------------------------------------

SMALL = {
    "one sequence": dict(steps=4, batch=1, hidden=33),
    "odd, both ways": dict(steps=5, batch=19, hidden=75, bidirectional=True),
    "packed": dict(lengths=(6,) * 5 + (3,) * 9 + (1,) * 4, hidden=40, bidirectional=True),
}


@native
@each_cell
@pytest.mark.parametrize("sample", SMALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exchange", ["grid", "cluster", "plane"])
def test_exchange(name, sample, dtype, exchange, device, poisoned, monkeypatch):
    """Whichever way blocks exchange, results and gradients keep the error rule, and every call makes the same ones."""
    if device == "cpu":
        pytest.skip("needs a GPU; tests/test_cuda_sources.py runs an emulation")
    op, module = OPS[name], sys.modules[f"fastlm.ops.{name}_native"]
    layers = (module._layers["tanh"] if name == "rnn" else module._layers).cuda
    shape = SMALL[sample] | ({"bidirectional": False} if exchange == "plane" else {})  # which is of one direction
    args = recurrent.make_args(*CELLS[name], dtype, device, **shape)
    whole = (*args, "tanh") if name == "rnn" else args
    if reason := op.implementations["native"].cannot(*whole):
        pytest.skip(reason)
    if exchange != "grid":
        if name == "rnn":
            pytest.skip("LSTM and GRU alone")
        if torch.cuda.get_device_capability(device) < (9, 0):
            pytest.skip("the GPU has no clusters")

    monkeypatch.setattr(layers, "run", functools.partial(layers.run, exchange=exchange))
    runs = [measure.differentiate(op.implementations["native"].run, whole) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0] + runs[0][2], runs[1][0] + runs[1][2], strict=True))
    for error in measure.errors(op, "native", whole):
        assert error.ok, error
