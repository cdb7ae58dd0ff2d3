"""RNN, GRU and LSTM beside torch.nn's: the same arguments, parameters, numbers, gradients and errors."""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from parity import CELLS, DTYPES, combinations, hold, leaf, pair, run, tensors
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fastlm

RECURRENT = [("num_layers", 2), ("num_layers", 3), ("bidirectional", True), ("batch_first", True), ("bias", False),
             ("dropout", 0.5), ("dropout", 1.0), ("proj_size", 3), ("nonlinearity", "relu"), ("hx", True),
             ("form", "unbatched"), ("form", "packed"), ("form", "unsorted"), ("eval", True)]
OWN = {"proj_size": "LSTM", "nonlinearity": "RNN"}  # options that only one cell has
LENGTHS = {"packed": [5, 3, 3, 1], "unsorted": [2, 5, 3, 4]}  # an order that is not its own inverse


@pytest.fixture(autouse=True)
def kernels():
    """Use our kernels wherever they can run, also where stock is known to be faster."""
    with fastlm.backend("native", "torch"):
        yield


@pytest.fixture(params=[True, False], ids=["kernels", "by default"])
def order(request, monkeypatch):
    """Run a test as all others are, and as a user calls, who gets the shortcuts."""
    if not request.param:
        monkeypatch.setattr(fastlm.dispatch, "_order", ())


def cases(most, without=()):
    """List (cell, options): no option, each alone, and up to `most` together."""
    chosen = [option for option in RECURRENT if option[0] not in without]
    return [pytest.param(cell, *case.values, id=f"{cell}-{case.id}") for cell in CELLS
            for case in combinations([(k, v) for k, v in chosen if OWN.get(k, cell) == cell], most)]


def recurrent_case(cell, options, device, dtype):
    """Return (stock, ours, call, leaves)."""
    options = dict(options)
    form, with_hx, eval_mode = (options.pop(k, None) for k in ("form", "hx", "eval"))
    theirs, ours = pair(cell, 4, 6, device=device, dtype=dtype, **options)
    theirs.train(not eval_mode), ours.train(not eval_mode)
    batch_first = options.get("batch_first", False)
    shape = (5, 4) if form == "unbatched" else (4, 5, 4) if batch_first else (5, 4, 4)
    leaves = [leaf(*shape, device=device, dtype=dtype)]
    if with_hx:
        rows = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
        batch = () if form == "unbatched" else (4,)
        leaves += [leaf(rows, *batch, options.get("proj_size", 6), device=device, dtype=dtype)]
        leaves += [leaf(rows, *batch, 6, device=device, dtype=dtype)] if cell == "LSTM" else []

    def call(module, x, *hx):
        if form in LENGTHS:
            x = pack_padded_sequence(x, LENGTHS[form], batch_first, enforce_sorted=form == "packed")
        return module(x, None if not hx else hx if cell == "LSTM" else hx[0])

    return theirs, ours, call, leaves


def skip_without_backward(options, device):
    if device == "cuda" and "eval" in options:
        pytest.skip("cuDNN has no backward in evaluation, so there is nothing to compare with")


@pytest.mark.parametrize(("cell", "options"), cases(2))
def test_recurrent(cell, options, device):
    if device == "cuda" and options.get("dropout") == 0.5:
        pytest.skip("cuDNN draws its dropout mask from a generator of its own")
    skip_without_backward(options, device)
    hold(*recurrent_case(cell, options, device, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("cell", "options"), cases(1, without=["dropout"]))
def test_recurrent_dtypes(cell, options, dtype, device):
    skip_without_backward(options, device)
    hold(*recurrent_case(cell, options, device, dtype))


@pytest.mark.parametrize(("cell", "options"), cases(1, without=["form", "hx", "eval"]))
def test_recurrent_parameters(cell, options):
    """The same seed gives the same parameters in the same order, and both print alike."""
    made = []
    for module in (nn, fastlm.nn):
        torch.manual_seed(5)
        made.append(getattr(module, cell)(4, 6, **{"num_layers": 2} | options))
    theirs, ours = made
    assert repr(theirs) == repr(ours)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(theirs.all_weights, ours.all_weights, strict=True):
        assert all(x is not y and torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert ours.flatten_parameters() is None
    for name in ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional",
                 "proj_size", *(["nonlinearity"] if cell == "RNN" else [])):
        assert getattr(ours, name) == getattr(theirs, name)


def test_recurrent_positional_arguments():
    for args in ((3, 4, 2, True, True, 0.5, True), (3, 4, 1, False)):
        assert repr(nn.GRU(*args)) == repr(fastlm.nn.GRU(*args))
        assert repr(nn.LSTM(*args)) == repr(fastlm.nn.LSTM(*args))
    args = (3, 4, 2, "relu", False, True, 0.5, True)
    assert repr(nn.RNN(*args)) == repr(fastlm.nn.RNN(*args))
    assert fastlm.nn.RNN(*args).mode == "RNN_RELU"
    args = (5, 6, 1, True, False, 0.0, False, 3)
    assert repr(nn.LSTM(*args)) == repr(fastlm.nn.LSTM(*args))


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_copies(cell, device):
    theirs, ours, call, leaves = recurrent_case(cell, {"num_layers": 2, "hx": True}, device, torch.float32)
    expected = run(ours, call, leaves)
    meta = getattr(fastlm.nn, cell)(4, 6, 2, device="meta")
    assert all(p.is_meta for p in meta.parameters())
    meta = meta.to_empty(device=device)
    meta.load_state_dict(theirs.state_dict())
    assigned = getattr(fastlm.nn, cell)(4, 6, 2, device="meta")
    assigned.load_state_dict(theirs.state_dict(), assign=True)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), meta):
        assert all(a is not b for a, b in zip(other.parameters(), ours.parameters(), strict=True))
        for a, b in zip(run(other, call, leaves), expected, strict=True):
            assert torch.equal(a, b)
    assert torch.equal(tensors(call(assigned, *leaves))[0], tensors(call(ours, *leaves))[0])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_recurrent_converted(cell, convert, device):
    theirs, ours, call, leaves = recurrent_case(cell, {"hx": True}, device, torch.float32)
    theirs, ours = getattr(theirs, convert)(), getattr(ours, convert)()
    leaves = [getattr(x.detach(), convert)().requires_grad_() for x in leaves]
    hold(theirs, ours, call, leaves)


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_frozen_weights(cell, device):
    """Frozen weights get no gradient, the rest keeps its own; a wholly frozen module still passes one to its input."""
    theirs, ours, call, leaves = recurrent_case(cell, {"num_layers": 2, "hx": True}, device, torch.float32)
    for prefix in ("weight_hh", "bias", "weight_ih_l1", ""):
        for module in (theirs, ours):
            for name, p in module.named_parameters():
                p.requires_grad_(not name.startswith(prefix))
        hold(theirs, ours, call, leaves)
    assert not any(r.requires_grad for r in tensors(call(ours, *[x.detach() for x in leaves])))


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_weights_are_read_anew(cell, device):
    """Changed in place, replaced, parametrised or given by functional_call: the weights of now are used."""
    theirs, ours, call, leaves = recurrent_case(cell, {}, device, torch.float32)
    hold(theirs, ours, call, leaves)
    for module in (theirs, ours):
        module.weight_hh_l0.data.mul_(0.5)
    hold(theirs, ours, call, leaves)
    new = nn.Parameter(torch.randn_like(ours.weight_ih_l0))
    theirs.weight_ih_l0 = ours.weight_ih_l0 = new
    hold(theirs, ours, call, leaves)
    zeros = {name: torch.zeros_like(p) for name, p in ours.named_parameters()}
    a, b = (torch.func.functional_call(m, zeros, (leaves[0],))[0] for m in (theirs, ours))
    assert torch.equal(a, b)
    nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    torch.testing.assert_close(ours(leaves[0])[0], theirs(leaves[0])[0])
    tensors(ours(leaves[0]))[0].sum().backward()
    assert ours.parametrizations.weight_hh_l0.original0.grad.abs().sum() > 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("hidden", [8, 256])
@pytest.mark.parametrize("chosen", ["all", "weight_ih"])
@pytest.mark.parametrize("name", [*CELLS, *(f"{cell}Cell" for cell in CELLS)])
def test_weights_that_are_made_of_others_are_made_once_a_call(name, chosen, hidden, training, order):
    """To make them may be random (a dropout of weights), have state (spectral_norm), or take long."""
    module, made = getattr(fastlm.nn, name)(4, hidden), []

    class Seen(nn.Module):
        def forward(self, weight):
            made.append(weight)
            return weight

    parts = [part for part, _ in module.named_parameters() if chosen == "all" or part.startswith(chosen)]
    for part in parts:
        nn.utils.parametrize.register_parametrization(module, part, Seen())
    inputs = [torch.randn(3, 4)]
    if not name.endswith("Cell"):
        inputs += [torch.randn(1, 2, 4), torch.randn(20, 2, 4), nn.utils.rnn.pack_sequence([torch.randn(3, 4)])]
    for x in inputs:
        made.clear()
        with torch.set_grad_enabled(training):
            module(x)
        assert len(made) == len(parts), type(x)


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}, {"dropout": 0.5}, {"batch": 3}],
                         ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_a_step_of_several_layers(cell, options, order):
    """Without gradients each layer is one call of C++."""
    batch = options.get("batch", 1)
    options = {key: value for key, value in options.items() if key != "batch"}
    theirs, ours = pair(cell, 5, 64, 3, **options)
    theirs.eval(), ours.eval()
    x = torch.randn(*((batch, 1) if options.get("batch_first") else (1, batch)), 5)
    hx = torch.randn(3, batch, 64)
    with torch.no_grad():
        for state in (None, (hx, -hx) if cell == "LSTM" else hx):
            torch.testing.assert_close(ours(x, state), theirs(x, state), rtol=1e-4, atol=1e-5)
            assert [call.ran for call in fastlm.explain(ours, x, state)] == ["native"]
        with pytest.raises(RuntimeError, match="hx"):
            ours(x, (hx[:2], -hx[:2]) if cell == "LSTM" else hx[:2])
        if "dropout" in options:
            assert not torch.equal(ours.train()(x)[0], ours.eval()(x)[0])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_one_graph_serves_all_sizes(cell, training):
    torch._dynamo.reset()
    module, graphs = getattr(fastlm.nn, cell)(4, 256), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, dynamic=True, fullgraph=True, backend=count)
    with torch.set_grad_enabled(training):
        for steps, batch in ((64, 8), (65, 9), (100, 17)):
            x = torch.randn(steps, batch, 4)
            torch.testing.assert_close(compiled(x)[0], module(x)[0])
    assert len(graphs) == 1


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_dropout_follows_the_seed(cell, device):
    _, ours, call, leaves = recurrent_case(cell, {"num_layers": 2, "dropout": 0.5}, device, torch.float32)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(tensors(call(ours, *leaves))[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


BAD_OPTIONS = [{"dropout": 1.5}, {"dropout": "x"}, {"dropout": True}, {"bias": 1}, {"batch_first": 0},
               {"hidden_size": 0}, {"input_size": 0}, {"input_size": 2.5}, {"hidden_size": "8"}, {"num_layers": 0},
               {"proj_size": 6}, {"proj_size": 9}, {"proj_size": -1}, {"nonlinearity": "gelu"}, {"unknown": 1}]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_recurrent_bad_options(cell, options):
    options = {"input_size": 4, "hidden_size": 6} | options
    with pytest.raises(Exception) as stock:
        getattr(nn, cell)(**options)
    with pytest.raises(stock.type):
        getattr(fastlm.nn, cell)(**options)


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_dropout_without_layers_warns(cell):
    with pytest.warns(UserWarning, match="num_layers") as record:
        getattr(fastlm.nn, cell)(3, 4, dropout=0.5)
    assert record[0].filename == __file__


def bad_inputs(cell):
    """Yield (what is wrong, the argument that the message must name, input, hx)."""
    x, h = torch.randn(5, 2, 4), torch.randn(1, 2, 6)
    state = (lambda h: (h, h)) if cell == "LSTM" else (lambda h: h)
    packed = pack_padded_sequence(x, [5, 3])
    yield "features", "input", torch.randn(5, 2, 3), None
    yield "dtype", "input", x.double(), None
    yield "four dimensions", "input", x[None], None
    yield "one dimension", "input", x[0, 0], None
    yield "batch of hx", "hx", x, state(torch.randn(1, 3, 6))
    yield "width of hx", "hx", x, state(torch.randn(1, 2, 5))
    yield "layers of hx", "hx", x, state(torch.randn(2, 2, 6))
    yield "kind of hx", "hx", x, h if cell == "LSTM" else (h, h)
    if cell == "LSTM":
        yield "three states", "hx", x, (h, h, h)
        yield "states in one tensor", "hx", x, torch.stack([h, h])
        yield "states of a layer in one tensor", "hx", x, torch.cat([h, h])
    yield "unbatched hx", "hx", x, state(h[:, 0])
    yield "batched hx", "hx", x[:, 0], state(h)
    yield "dtype of hx", "hx", x, state(h.double())
    yield "packed features", "input", pack_padded_sequence(torch.randn(5, 2, 3), [5, 3]), None
    yield "packed width of hx", "hx", packed, state(torch.randn(1, 2, 5))
    yield "packed batch of hx", "hx", packed, state(torch.randn(1, 3, 6))
    yield "packed dimensions", "data", PackedSequence(torch.randn(8, 2, 4), packed.batch_sizes), None


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_bad_inputs(cell, order):
    theirs, ours = pair(cell, 4, 6)
    for what, name, x, hx in bad_inputs(cell):
        with pytest.raises(Exception) as stock:
            theirs(x, hx)
        with pytest.raises(stock.type) as caught:
            ours(x, hx)
        assert cell.lower() in str(caught.value).lower(), what
        assert name in str(caught.value), what


@pytest.mark.parametrize("steps", [1, 4, 40, 200])
@pytest.mark.parametrize(("name", "shape"), [("weight_hh_l0", (3, 3)), ("weight_ih_l0", (20, 2)), ("bias_hh_l0", (1,))])
@pytest.mark.parametrize("cell", CELLS)
def test_weights_of_other_sizes_are_refused(cell, name, shape, steps, order):
    """Stock's LSTM hands them to oneDNN, which reads past their ends."""
    module = getattr(fastlm.nn, cell)(3, 5, 2, bidirectional=True)
    setattr(module, name, torch.nn.Parameter(torch.randn(shape)))
    with pytest.raises(RuntimeError, match="has shape"):
        module(torch.randn(steps, 3, 3))


# --- other roads of autograd -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_second_order(cell, device):
    _, ours, call, leaves = recurrent_case(cell, {"bidirectional": True, "hx": True}, device, torch.float64)
    assert torch.autograd.gradgradcheck(lambda *leaves: tensors(call(ours, *leaves)), leaves, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_each_sample(cell, device):
    """torch.func's vmap of grad through functional_call gives what a loop of stock's backwards gives."""
    theirs, ours, *_ = recurrent_case(cell, {"num_layers": 2}, device, torch.float64)
    batch = torch.randn(3, 5, 1, 4, device=device, dtype=torch.float64)

    def loss(params, x, module):
        return torch.func.functional_call(module, params, (x,))[0].square().sum()

    params = {name: p.detach() for name, p in ours.named_parameters()}
    found = torch.vmap(torch.func.grad(lambda p, x: loss(p, x, ours)), (None, 0))(params, batch)
    for i, x in enumerate(batch):
        stock = dict(theirs.named_parameters())
        expected = torch.autograd.grad(loss(stock, x, theirs), list(stock.values()))
        for name, gradient in zip(stock, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient)


@pytest.mark.parametrize("cell", CELLS)
def test_checkpoint_draws_the_same_dropout(cell, device):
    _, ours, call, leaves = recurrent_case(cell, {"num_layers": 2, "dropout": 0.5}, device, torch.float32)
    expected = run(ours, call, leaves)
    found = run(ours, lambda module, x: checkpoint(lambda x: call(module, x), x, use_reentrant=False), leaves)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_export_then_train(cell, device):
    _, ours, _, leaves = recurrent_case(cell, {"num_layers": 2}, device, torch.float32)
    exported = torch.export.export(ours, (leaves[0].detach(),)).module()
    found, expected = (run(module, lambda module, x: module(x), leaves) for module in (exported, ours))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# --- compile, threads, fork ------------------------------------------------------------------------------------


COMPILED = [("LSTM", {"num_layers": 2, "bidirectional": True, "hx": True, "batch_first": True}),
            ("LSTM", {"form": "unbatched"}), ("LSTM", {"form": "packed"}), ("LSTM", {"form": "packed", "hx": True}),
            ("LSTM", {"proj_size": 3}), ("GRU", {"form": "unsorted", "hx": True, "num_layers": 2}),
            ("GRU", {"form": "packed"}), ("RNN", {"hx": True}), ("RNN", {"form": "unsorted"})]


def same_compiled(cell, options, device, **settings):
    torch._dynamo.reset()
    _, ours, call, leaves = recurrent_case(cell, options, device, torch.float32)
    expected = run(ours, call, leaves)
    compiled = torch.compile(ours, fullgraph=True, **settings)
    for a, b in zip(run(compiled, call, leaves), expected, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(tensors(call(compiled, *leaves))[0], expected[0])


@pytest.mark.parametrize("implementation", ["native", "torch"])
@pytest.mark.parametrize(("cell", "options"), COMPILED, ids=str)
def test_recurrent_compiled(cell, options, implementation, device):
    """The whole graph, forward and backward, with packed sequences entering and leaving it."""
    with fastlm.backend(*dict.fromkeys((implementation, "torch"))):
        same_compiled(cell, options, device, backend="aot_eager")


def test_lstm_compiled_by_inductor(device):
    same_compiled("LSTM", {}, device)


@pytest.mark.parametrize("cell", CELLS)
def test_threads(cell, device):
    """Python threads that share a module get what serial calls get, also while the thread count changes."""
    _, ours, call, _ = recurrent_case(cell, {"num_layers": 2}, device, torch.float32)
    batches = [torch.randn(5, 4, 4, device=device, requires_grad=True) for _ in range(24)]
    expected = [run(ours, call, [x]) for x in batches]
    found, before = [None] * len(batches), torch.get_num_threads()

    def work(start):
        for i in range(start, len(batches), 4):
            x = batches[i].detach().clone().requires_grad_()
            results = tensors(call(ours, x))
            found[i] = [r.detach() for r in results] + list(torch.autograd.grad(results[0].sum(), x))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    try:
        for thread in threads:
            thread.start()
        for count in (1, 3, 2, 4):
            torch.set_num_threads(count)
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for a, b in zip(run(ours, call, [batches[0]]), expected[0], strict=True):
                torch.testing.assert_close(a, b)
    finally:
        torch.set_num_threads(before)
    for x, mine, serial in zip(batches, found, expected, strict=True):
        results = tensors(call(ours, x))
        gradient = torch.autograd.grad(results[0].sum(), x)
        for a, b in zip(mine, [*serial[: len(results)], *gradient], strict=True):
            torch.testing.assert_close(a, b)


FORK = """
import os, signal, sys, time, torch, fastlm
nn = fastlm.nn if sys.argv[1] == "ours" else torch.nn
fastlm.backend("native", "torch").__enter__()
x = torch.randn(16, 16, 64, requires_grad=True)
for threads, cells in ((1, ("RNN", "GRU", "LSTM")), (2, ("LSTM",))):
    torch.set_num_threads(threads)
    for cell in cells:
        module = getattr(nn, cell)(64, 64)
        module(x)[0].sum().backward()
        child = os.fork()
        if child == 0:
            module(x)[0].sum().backward()
            os._exit(0)
        outcome, deadline = "hung", time.monotonic() + 4
        while outcome == "hung" and time.monotonic() < deadline:
            outcome = "ran" if os.waitpid(child, os.WNOHANG) == (child, 0) else outcome
            time.sleep(0.02)
        if outcome == "hung":
            os.kill(child, signal.SIGKILL)
        print(cell, threads, outcome)
"""


def test_fork_after_use_is_no_worse_than_stock():
    """A forked child can run the module where it can run stock's; after threads ran, neither may be able to."""
    runs = [subprocess.Popen([sys.executable, "-c", FORK, where], stdout=subprocess.PIPE, text=True)
            for where in ("stock", "ours")]
    stock, ours = (process.communicate(timeout=60)[0].splitlines() for process in runs)
    assert len(stock) == len(ours) == 4, (stock, ours)
    for a, b in zip(stock, ours, strict=True):
        assert b == a or b.endswith("ran"), (stock, ours)
