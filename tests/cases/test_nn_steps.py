"""One step at a time: RNNCell, GRUCell and LSTMCell, and streams through RNN, GRU and LSTM, beside torch.nn's."""

import copy
import pickle

import pytest
import torch
from parity import CELLS, DTYPES, combinations, hold, leaf, pair, run, tensors
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastlm

native = pytest.mark.skipif(fastlm.dispatch.build_report()["error"] is not None,
                            reason="needs the compiled extension")


@pytest.fixture(autouse=True)
def kernels():
    """Use our kernels wherever they can run, also where stock is known to be faster."""
    with fastlm.backend("native", "torch"):
        yield


# --- cells -----------------------------------------------------------------------------------------------------

CELL_OPTIONS = [("bias", False), ("nonlinearity", "relu"), ("hx", True), ("unbatched", True), ("frozen", True)]
STEPS = [f"{cell}Cell" for cell in CELLS]


def cell_case(cell, options, device, dtype, inputs=4, hidden=70, batch=3):
    """Return (stock, ours, call, leaves)."""
    options = dict(options)
    with_hx, unbatched, frozen = (options.pop(k, None) for k in ("hx", "unbatched", "frozen"))
    theirs, ours = pair(cell, inputs, hidden, device=device, dtype=dtype, **options)
    for module in (theirs, ours):
        module.weight_ih.requires_grad_(not frozen)
    batch = () if unbatched else (batch,)
    leaves = [leaf(*batch, inputs, device=device, dtype=dtype)]
    if with_hx:
        leaves += [leaf(*batch, hidden, device=device, dtype=dtype) for _ in range(2 if cell == "LSTMCell" else 1)]
    return theirs, ours, lambda m, x, *hx: m(x, None if not hx else hx if cell == "LSTMCell" else hx[0]), leaves


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize(("cell", "options"), [
    pytest.param(cell, *case.values, id=f"{cell}-{case.id}") for cell in STEPS
    for case in combinations([o for o in CELL_OPTIONS if o[0] != "nonlinearity" or cell == "RNNCell"])])
def test_cell(cell, options, dtype, device):
    hold(*cell_case(cell, options, device, dtype))


@pytest.mark.parametrize("cell", STEPS)
@pytest.mark.parametrize(("inputs", "hidden", "batch"), [
    (1, 1, 1), (5, 7, 0), (33, 130, 13), (70, 65, 1), (9, 650, 2)])
def test_cell_sizes(cell, inputs, hidden, batch, device):
    theirs, ours, call, leaves = cell_case(cell, {"hx": True}, device, torch.float32, inputs, hidden, batch)
    hold(theirs, ours, call, leaves)
    with torch.no_grad():  # the step that stores nothing
        for a, b in zip(tensors(call(ours, *leaves)), tensors(call(theirs, *leaves)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cell", STEPS)
def test_cell_is_stock_s(cell):
    """The same seed gives the same parameters; both print alike, and ours is an instance of stock's."""
    made = []
    for module in (nn, fastlm.nn):
        torch.manual_seed(5)
        made.append(getattr(module, cell)(4, 6, bias=cell != "GRUCell"))
    theirs, ours = made
    assert repr(theirs) == repr(ours)
    assert isinstance(ours, type(theirs))
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    copied = pickle.loads(pickle.dumps(ours))
    assert torch.equal(tensors(copied(torch.ones(1, 4)))[0], tensors(ours(torch.ones(1, 4)))[0])


@pytest.mark.parametrize("cell", STEPS)
def test_cell_second_order(cell, device):
    _, ours, call, leaves = cell_case(cell, {"hx": True}, device, torch.float64, batch=2)
    assert torch.autograd.gradgradcheck(lambda *leaves: tensors(call(ours, *leaves)), leaves, fast_mode=True)


@pytest.mark.parametrize("implementation", ["native", "torch"])
@pytest.mark.parametrize("cell", STEPS)
def test_cell_compiled(cell, implementation, device):
    torch._dynamo.reset()
    _, ours, call, leaves = cell_case(cell, {"hx": True}, device, torch.float32)
    with fastlm.backend(implementation):
        expected = run(ours, call, leaves)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        for a, b in zip(run(compiled, call, leaves), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cell", STEPS)
def test_cell_autocast(cell):
    theirs, ours, call, leaves = cell_case(cell, {"hx": True}, "cpu", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(tensors(call(ours, *leaves)), tensors(call(theirs, *leaves)), strict=True):
            assert a.dtype is b.dtype
            torch.testing.assert_close(a, b)
        explained, = fastlm.explain(lambda: call(ours, *leaves))
        assert (explained.ran, explained.declined["native"]) == ("torch", "a cell under autocast")
        with fastlm.backend("native"), pytest.raises(fastlm.dispatch.CannotRun, match="a cell under autocast"):
            call(ours, *leaves)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)], ids=str)
def test_an_lstm_cell_promotes_as_stocks(dtypes):
    theirs, ours = pair("LSTMCell", 4, 70, dtype=dtypes[0])
    x, h, c = torch.randn(3, 4, dtype=dtypes[0]), *(torch.randn(3, 70, dtype=dtype) for dtype in dtypes)
    for train in (True, False):
        with torch.set_grad_enabled(train), fastlm.backend("native", "torch"):
            for expected, found in zip(theirs(x, (h, c)), ours(x, (h, c)), strict=True):
                assert found.dtype is dtypes[1]
                assert torch.equal(found, expected)
    explained, = fastlm.explain(ours, x, (h, c))
    assert explained.declined["native"] == f"h is {dtypes[0]}, c is {dtypes[1]}"


@pytest.mark.parametrize("cell", ["RNNCell", "GRUCell"])
def test_a_sparse_input_is_stocks(cell):
    theirs, ours = pair(cell, 64, 64)
    x, h = torch.randn(3, 64).relu().to_sparse(), torch.randn(3, 64)
    for train in (True, False):
        with torch.set_grad_enabled(train):
            assert torch.equal(ours(x, h), theirs(x, h))
    assert fastlm.explain(ours, x, h)[0].declined["native"] == "input is torch.sparse_coo"


@pytest.mark.parametrize("cell", STEPS)
def test_cell_bad_inputs(cell):
    theirs, ours = pair(cell, 4, 6)
    x, h = torch.randn(3, 4), torch.randn(3, 6)
    state = (lambda h: (h, h)) if cell == "LSTMCell" else (lambda h: h)
    bad = {"features": (x[:, :3], None), "three dimensions": (x[None], None), "no dimension": (x[0, 0], None),
           "batch of hx": (x, state(h[:2])), "width of hx": (x, state(h[:, :5])), "dtype of hx": (x, state(h.double())),
           "dtype": (x.double(), None), "three dimensions of hx": (x, state(h[None])), "unbatched hx": (x, state(h[0])),
           "integers": (x.long(), None)}
    for what, (x, hx) in bad.items():
        with pytest.raises(Exception) as stock:
            theirs(x, hx)
        with pytest.raises(stock.type) as caught:
            ours(x, hx)
        assert ("hx" if "hx" in what else "input") in str(caught.value), (what, caught.value)


# --- streaming -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_stream(cell, options, dtype, device):
    """Token by token without gradients, the state handed on, each call gives what stock's gives in float64."""
    theirs, ours = pair(cell, 33, 67, device=device, dtype=dtype, **options)
    exact = copy.deepcopy(theirs).double()
    state, stock, judge = None, None, None
    with torch.no_grad():
        for x in torch.randn(4, 1, 2, 33, device=device).to(dtype):
            (a, state), (b, stock), (e, judge) = ours(x, state), theirs(x, stock), exact(x.double(), judge)
            for found, near, true in zip(tensors((a, state)), tensors((b, stock)), tensors((e, judge)), strict=True):
                assert (found.shape, found.dtype) == (near.shape, near.dtype)
                bound = 2 * (near.double() - true).abs().max() + 4 * torch.finfo(dtype).eps * true.abs().max()
                assert (found.double() - true).abs().max() <= bound


@pytest.mark.parametrize("cell", CELLS)
def test_stream_of_awkward_tensors(cell):
    """Expanded, transposed and strided inputs, states and weights; a NaN stays in its own sequence."""
    theirs, ours = pair(cell, 6, 66)
    for module in (theirs, ours):
        module.weight_hh_l0 = nn.Parameter(theirs.weight_hh_l0.detach().t().contiguous().t())
    inputs = {"expanded": torch.randn(6).expand(1, 3, 6), "transposed": torch.randn(6, 3, 1).permute(2, 1, 0),
              "strided": torch.randn(1, 3, 12)[..., ::2], "not a number": torch.randn(1, 3, 6)}
    inputs["not a number"][0, 1, 2] = torch.nan
    h = torch.randn(66, 3, 1).permute(2, 1, 0)
    for what, x in inputs.items():
        with torch.no_grad():
            found, stock = (tensors(m(x, (h, h) if cell == "LSTM" else h)) for m in (ours, theirs))
        for a, b in zip(found, stock, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, msg=lambda m, what=what: f"{what}: {m}")


@native
@pytest.mark.parametrize("cell", CELLS)
def test_stream_goes_through_dispatch(cell):
    """The short way of a stream is chosen, refused and reported like every other."""
    theirs, ours = pair(cell, 5, 64, batch_first=True)
    x, h = torch.randn(3, 1, 5), torch.randn(1, 3, 64)
    state = (h, h.flip(1)) if cell == "LSTM" else h
    with torch.no_grad():
        expected = tensors(theirs(x, state))
        for name in ("native", "torch", "reference"):
            with fastlm.backend(name):
                assert [call.ran for call in fastlm.explain(ours, x, state)] == [name]
                for found, near in zip(tensors(ours(x, state)), expected, strict=True):
                    torch.testing.assert_close(found, near)
        with fastlm.backend("native"), torch.profiler.profile() as profile:
            seen = tensors(ours(x, state))
        assert any(event.key.startswith("fastlm::") for event in profile.key_averages())
        for found, near in zip(seen, expected, strict=True):
            torch.testing.assert_close(found, near)
        with fastlm.backend("native"), FlopCounterMode(display=False):
            ours(x, state)  # what watches tensors gets the operator, not the memory
        with torch.autocast("cpu", torch.bfloat16):
            assert [t.dtype for t in tensors(ours(x, state))] == [t.dtype for t in tensors(theirs(x, state))]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("spoilt", ["input", "features", "hx", "many hx", "state", "dtype", "params", "bias", "dropout",
                                    "layers", "counts", "no tensor"])
def test_stream_refuses_what_does_not_fit(cell, spoilt):
    """The short way of a stream, which nobody asked for by name, raises what the long way raises."""
    rows, states = {"LSTM": 4, "GRU": 3, "RNN": 1}[cell] * 64, 2 if cell == "LSTM" else 1
    x, hx = torch.randn(1, 3, 5), [torch.randn(1, 3, 64) for _ in range(states)]
    params = [torch.randn(rows, 5), torch.randn(rows, 64), torch.randn(rows), torch.randn(rows)]
    options = [True, 1, 0.0, False, False, False]
    if spoilt == "input":
        x = x[0]
    elif spoilt == "features":
        x = x[..., 1:]
    elif spoilt == "hx":
        hx = [h[:, :2] for h in hx]
    elif spoilt == "many hx":
        hx.append(hx[0])
    elif spoilt == "state":
        hx[-1] = torch.randn(1, 3, 65)
    elif spoilt == "dtype":
        hx[-1] = hx[-1].double()
    elif spoilt == "params":
        params[1] = params[1][1:]
    elif spoilt == "bias":
        params[3] = params[3][:-1]
    elif spoilt == "dropout":
        options[2] = 1.5
    elif spoilt == "layers":
        options[1] = 0
    elif spoilt == "counts":
        params.pop()
    else:
        params[0] = params[0].tolist()
    op = getattr(fastlm.ops, cell.lower())
    with torch.no_grad():
        with fastlm.backend("torch"), pytest.raises(Exception) as long:
            op(x, tuple(hx), params, *options)
        with pytest.raises(long.type) as short:
            op(x, tuple(hx), params, *options)
    assert str(short.value) == str(long.value)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_to_do_is_stock_s(cell, steps, batch):
    """No steps and no sequences: what stock returns, or an error of the same type."""
    theirs, ours = pair(cell, 5, 64)
    x = torch.randn(steps, batch, 5)
    with torch.no_grad():
        try:
            expected = tensors(theirs(x))
        except Exception as stock:
            with pytest.raises(type(stock)):
                ours(x)
        else:
            for found, near in zip(tensors(ours(x)), expected, strict=True):
                torch.testing.assert_close(found, near)


@pytest.mark.parametrize("steps", [1, 3, 130])
@pytest.mark.parametrize("features", [1, 4, 6, 40000])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_another_number_of_features_is_refused(kind, features, steps):
    """By the shortcut too: oneDNN's LSTM, which it calls, reads past the input's end."""
    with pytest.raises(RuntimeError, match=f"input has {features} features, expected 5"):
        getattr(fastlm.nn, kind)(5, 8)(torch.randn(steps, 2, features))
