"""Hold a module to torch.nn's: the same parameters, numbers and gradients."""

import copy
import itertools
import os
import warnings

import pytest
import torch
from torch import Tensor, nn

import fastlm
from fastlm import measure
from fastlm.ops import ALL

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
CELLS = ("RNN", "GRU", "LSTM")
OPS = {op.name: op for op in ALL}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def absent(op, name, device):
    """Return why an implementation of an op has nothing to do with tensors on `device` in this process, or None."""
    if op.implementations[name].run is None:
        return op.implementations[name].cannot()
    if name == "triton" and device == "cpu" and not INTERPRETED:
        return "needs a GPU or TRITON_INTERPRET=1"
    if device == "cuda" and (name == "blocked" or (name == "native" and op.name not in ("lstm", "gru", "rnn"))):
        return "computes on the CPU"
    return None


def forced(op, *names):
    """Make a fixture that forces each of the named implementations of an op, where there is one for the device."""
    @pytest.fixture(params=names)
    def implementation(request):
        if reason := absent(OPS[op], request.param, request.config.getoption("--device")):
            pytest.skip(reason)
        with fastlm.backend(request.param):
            yield request.param
    return implementation


def skip_misinterpreted(dtype):
    """Skip what Triton's interpreter computes wrongly without a word."""
    if INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("the interpreter computes bf16 wrongly: products (triton issue 11584), and it rounds towards 0")


def keep_error_rule(errors, draws=5):
    """Assert the error rule for the errors of the first draw, or else of several draws together.

    The largest error of a result of few numbers is chance, for stock as for us: one draw in thirty of a layer with one
    unit breaks the rule with equal medians. Over several draws the largest errors are compared.

    Args:
        errors: `errors(i)` returns the list of `measure.Error` of draw i.
    """
    found = errors(0)
    if not all(e.ok for e in found):
        rows = zip(found, *map(errors, range(1, draws)), strict=True)
        found = [measure.Error(row[0].what, *(max(getattr(e, key) for e in row) for key in ("ours", "stock", "bound")))
                 for row in rows]
    assert all(e.ok for e in found), [e for e in found if not e.ok]


def pair(name, *args, device="cpu", dtype=torch.float32, stock=None, **options):
    """Make stock's module and ours with the same parameters; both load the other's state_dict strictly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = (stock or getattr(nn, name))(*args, device=device, dtype=dtype, **options)
        ours = getattr(fastlm.nn, name)(*args, device=device, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def tensors(nest):
    """Return the floating-point tensors of a result, packed sequences included."""
    if isinstance(nest, Tensor):
        return [nest] if nest.is_floating_point() else []
    return [t for part in nest for t in tensors(part)] if isinstance(nest, tuple | list) else []


def run(module, call, leaves, draw=0):
    """Return the results of `call(module, *leaves)`, then the gradients of leaves and parameters."""
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in leaves]
    torch.manual_seed(3)
    results = tensors(call(module, *leaves))
    generator = torch.Generator().manual_seed(4 + draw)
    upstream = [torch.randn(r.shape, generator=generator).to(r) for r in results]
    wanted = [p for p in (*leaves, *module.parameters()) if p.requires_grad]
    live = [(r, g) for r, g in zip(results, upstream, strict=True) if r.requires_grad]
    if not live or not wanted:
        return results
    results, upstream = zip(*live, strict=True)
    grads = torch.autograd.grad(results, wanted, upstream, allow_unused=True, materialize_grads=True)
    return [r.detach() for r in results] + list(grads)


def hold(theirs, ours, call, leaves):
    """Hold our results and gradients to the error rule of DESIGN.md, with stock in float64 as the judge."""
    judge = copy.deepcopy(theirs).double()

    def errors(draw):
        found, stock = run(ours, call, leaves, draw), run(theirs, call, leaves, draw)
        exact = run(judge, call, [x.double() for x in leaves], draw)
        assert len(found) == len(stock) == len(exact)
        if any(x.dtype is torch.float64 for x in found):
            for i, (a, b) in enumerate(zip(found, stock, strict=True)):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, i=i: f"{i}: {m}")
            return []
        return measure.compare(range(len(found)), found, stock, exact)

    keep_error_rule(errors)


def combinations(settings, most=2):
    """List no setting, each alone and every pair as pytest parameters; settings of one key exclude each other."""
    found = []
    for size in range(most + 1):
        for chosen in itertools.combinations(settings, size):
            if len({key for key, _ in chosen}) == size:
                name = "+".join(key if value is True else f"{key}={getattr(value, '__name__', value)}"
                                for key, value in chosen)
                found.append(pytest.param(dict(chosen), id=name or "plain"))
    return found


def leaf(*shape, device, dtype, grad=True):
    return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)
