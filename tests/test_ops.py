"""Every op × implementation × sample × dtype: numbers, refusals, memory, and how autograd and the compiler see it."""

import itertools

import pytest
import torch

import fastlm
from fastlm import measure
from fastlm.ops import ALL
from tests.parity import INTERPRETED, absent, keep_error_rule, skip_misinterpreted

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def matrix():
    """Yield (op, implementation, dtype, index of the sample, its name)."""
    for op in ALL:
        for name, dtype in itertools.product(op.implementations, DTYPES):
            if name in ("torch", "reference"):
                continue
            for i, sample in enumerate(op.samples("test", dtype, "meta")):
                label = f"{op.name}-{name}-{str(dtype)[6:]}-{sample.name.replace(' ', '_')}"
                yield pytest.param(op, name, dtype, i, id=label)


def args_of(op, dtype, index, device, draw=0):
    torch.manual_seed(index + 1000 * draw)
    return next(itertools.islice(op.samples("test", dtype, device), index, None))


@pytest.mark.parametrize(("op", "name", "dtype", "index"), list(matrix()))
def test_error_rule(op, name, dtype, index, device, poisoned):
    sample = args_of(op, dtype, index, device)
    reason = op.implementations[name].cannot(*sample.args)
    if reason:
        pytest.skip(reason)
    skip_misinterpreted(dtype)
    keep_error_rule(lambda draw: measure.errors(op, name, args_of(op, dtype, index, device, draw).args))


FAST = [(op, name) for op in ALL for name in op.implementations if name not in ("torch", "reference")]


@pytest.mark.parametrize(("op", "name"), FAST, ids=lambda x: getattr(x, "name", x))
def test_accepts_what_it_promises(op, name, device):
    implementation = op.implementations[name]
    if reason := absent(op, name, device):
        pytest.skip(reason)
    assert implementation.accepts, "an implementation lists the samples that it must take"
    family = [o for o in ALL if name in o.implementations and o.implementations[name].run is implementation.run]
    names = {s.name for o in family for s in o.samples("test", torch.float32, "meta")}
    assert implementation.accepts <= names, "a promise about a sample that no op of the family has"
    for dtype in implementation.dtypes:
        samples = [s for s in op.samples("test", dtype, device) if s.name in implementation.accepts]
        assert samples
        for sample in samples:
            assert implementation.cannot(*sample.args) is None, (sample.name, dtype)


@pytest.mark.parametrize("op", ALL, ids=lambda op: op.name)
def test_stock_agrees_with_the_reference(op, device):
    """The oracle itself: in float64, stock PyTorch and the readable definition are the same function."""
    for sample in op.samples("test", torch.float64, device):
        if device == "cuda" and op.name in ("lstm", "gru", "rnn") and ("dropout" in sample.name or
                                                                         sample.name == "not contiguous"):
            continue  # cuDNN draws from a generator of its own, and trains in training mode only
        stock, upstream, stock_grads = measure.differentiate(
            op.implementations["torch"].run, sample.args, constants=op.constants)
        exact, _, grads = measure.differentiate(
            op.implementations["reference"].run, sample.args, upstream, constants=op.constants)
        for a, b in zip(stock + stock_grads, exact + grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True,
                                       msg=lambda m, s=sample: f"{s.name}: {m}")


@pytest.mark.parametrize("op", ALL, ids=lambda op: op.name)
def test_cost_is_positive(op, device):
    for sample in op.samples("test", torch.float32, device):
        flops, moved = op.cost(*sample.args)
        if all(x.numel() for x in measure.floating(sample.args)):
            assert flops > 0
            assert moved > 0


@pytest.mark.parametrize(("op", "name"), FAST, ids=lambda x: getattr(x, "name", x))
def test_frozen_inputs_and_no_grad(op, name, device):
    """Freezing any one input leaves the other gradients as they are; under no_grad the results are the same."""
    implementation = op.implementations[name]
    sample = next((s for s in op.samples("test", torch.float32, device) if s.name in implementation.accepts), None)
    if implementation.run is None or implementation.cannot(*sample.args):
        pytest.skip("not available here")
    with fastlm.backend(name):
        results, upstream, grads = measure.differentiate(op, sample.args, constants=op.constants)
        torch.manual_seed(0)
        with torch.no_grad():
            for a, b in zip(measure.floating(op(*sample.args)), results, strict=True):
                torch.testing.assert_close(a, b)
        for frozen in range(len(grads)):
            leaves = measure.floating([a for i, a in enumerate(sample.args) if i not in op.constants])
            inputs = [x.detach().requires_grad_(i != frozen) for i, x in enumerate(leaves)]
            out = measure.floating(op(*_replace(sample.args, leaves, inputs)))
            found = measure.pull_back(out, upstream, [x for x in inputs if x.requires_grad])
            for a, b in zip(found, grads[:frozen] + grads[frozen + 1:], strict=True):
                torch.testing.assert_close(a, b)


STOCK = [(op, "torch") for op in ALL if op.name not in ("lstm", "gru", "rnn")]  # of which vmap knows nothing


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("op", "name"), FAST + STOCK, ids=lambda x: getattr(x, "name", x))
def test_mapped_over_a_batch(op, name, device):
    """torch.func.vmap over the first argument, and over its gradient: so gradients of each sample are made."""
    implementation = op.implementations[name]
    sample = next(s for s in op.samples("test", torch.float32, device) if name == "torch" or
                  s.name in implementation.accepts or implementation.run is None)
    if implementation.run is None or implementation.cannot(*sample.args):
        pytest.skip("not available here")
    if (op.name, name) == ("dropout_add", "triton"):
        pytest.skip("vmap refuses what draws a seed, as it does stock's dropout")
    x, *rest = sample.args
    upstream = [torch.randn_like(r) for r in measure.floating(op(*sample.args))]

    def results(x):
        return tuple(measure.floating(op(x, *rest)))

    def loss(x):
        return sum((r * g).sum() for r, g in zip(results(x), upstream, strict=True))

    samples = torch.stack([x, x.flip(0)])
    with fastlm.backend(name):
        for fn in (results, torch.func.grad(loss)):
            found, each = torch.func.vmap(fn)(samples), [fn(x) for x in samples]
            expected = torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *each)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("op", "name"), FAST, ids=lambda x: getattr(x, "name", x))
def test_batched_upstream_gradients(op, name, device):
    """As torch.autograd.functional.jacobian(vectorize=True) asks for them, by a vmap of its own."""
    implementation = op.implementations[name]
    sample = next(s for s in op.samples("test", torch.float32, device) if s.name in implementation.accepts or
                  implementation.run is None)
    if implementation.run is None or implementation.cannot(*sample.args):
        pytest.skip("not available here")
    args, inputs = measure.leaves(sample.args, op.constants)
    with fastlm.backend(name):
        results = [r for r in measure.floating(op(*args)) if r.requires_grad]
        upstream = [torch.randn(3, *r.shape, dtype=r.dtype, device=device) for r in results]
        found = torch.autograd.grad(results, inputs, upstream, is_grads_batched=True, retain_graph=True,
                                    allow_unused=True)
        for i in range(3):
            each = torch.autograd.grad(results, inputs, [g[i] for g in upstream], retain_graph=True, allow_unused=True)
            for a, b in zip(found, each, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("op", ALL, ids=lambda op: op.name)
def test_transforms_inside_a_compiled_graph(op, device):
    """There kernels would have no gradient, or tangents that are zero without a word: they decline."""
    torch._dynamo.reset()
    x, *rest = next(s.args for s in op.samples("test", torch.float32, device) if s.args[0].numel() > 50)

    def loss(x):
        return sum(r.square().sum() for r in measure.floating(op(x, *rest)))

    def of_graph(x, v):
        return torch.func.grad(loss)(x), torch.func.jvp(loss, (x,), (v,))[1]
    v = torch.randn_like(x)
    with fastlm.backend("reference"):
        expected = of_graph(x, v)
    with fastlm.backend(*op.fast, "reference"):
        found = torch.compile(of_graph, backend="aot_eager")(x, v)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert expected[1] != 0


@pytest.mark.parametrize("op", ALL, ids=lambda op: op.name)
def test_dual_numbers_come_to_a_compiled_graph(op, device):
    """A graph made without them has kernels that would lose their tangents: the compiler makes another."""
    torch._dynamo.reset()
    x, *rest = next(s.args for s in op.samples("test", torch.float32, device) if s.args[0].numel() > 50)
    call = torch.compile(lambda x: measure.floating(op(x, *rest))[0], backend="aot_eager")

    def tangent(x, v):
        with torch.autograd.forward_ad.dual_level():
            dual = call(torch.autograd.forward_ad.make_dual(x, v))
            return torch.autograd.forward_ad.unpack_dual(dual).tangent
    v = torch.randn_like(x)
    with fastlm.backend("reference"):
        expected = tangent(x, v)
    torch._dynamo.reset()
    with fastlm.backend(*op.fast, "reference"):
        call(x)
        found = tangent(x, v)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert found.any()


@pytest.mark.parametrize(("op", "name"), FAST + STOCK, ids=lambda x: getattr(x, "name", x))
def test_torchs_defaults_are_not_those_of_buffers(op, name, device):
    """What a kernel makes for itself is neither of the default dtype nor on the default device."""
    implementation = op.implementations[name]
    if implementation.run is None or (name == "torch" and device == "cuda"):  # which refuses some samples
        pytest.skip("not available here")
    default, most = torch.get_default_dtype(), 12_000 if INTERPRETED else 200_000
    for dtype in (torch.float32,) if INTERPRETED else (torch.float32, torch.bfloat16):  # which it cannot compute
        for sample in op.samples("test", dtype, device):
            if sum(t.numel() for t in measure.floating(sample.args)) > most or implementation.cannot(*sample.args):
                continue
            with fastlm.backend(name):
                results, upstream, grads = measure.differentiate(op, sample.args, constants=op.constants)
                try:
                    torch.set_default_dtype(torch.bfloat16)
                    with torch.device("meta"):
                        found = measure.differentiate(op, sample.args, upstream, constants=op.constants)
                finally:
                    torch.set_default_dtype(default)
            for a, b in zip(found[0] + found[2], results + grads, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True, msg=lambda m, s=sample: f"{s.name}: {m}")


@pytest.mark.parametrize(("op", "name"), FAST, ids=lambda x: getattr(x, "name", x))
def test_results_may_be_changed_in_place(op, name, device):
    """As stock's may, by a ReLU or a dropout in place; where backward needs them it says so."""
    implementation = op.implementations[name]
    for sample in op.samples("test", torch.float32, device):
        if sample.name not in implementation.accepts or implementation.run is None:
            continue
        if implementation.cannot(*sample.args):
            continue
        args, _ = measure.leaves(sample.args, op.constants)
        with fastlm.backend(name):
            for result in measure.floating(op(*args)):
                result.mul_(2)


def _lay(t, form):
    """Return the numbers of `t` in another place or order in memory."""
    if form == "lazily negated":
        return torch._neg_view(-t) if t.is_floating_point() else t
    if form == "behind others":
        return torch.cat([t.new_ones(3), t.reshape(-1)])[3:].view(t.shape)
    if t.dim() == 0:
        return t
    if form == "columns last":
        return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    return torch.stack([t, torch.ones_like(t)], -1).flatten(-2)[..., ::2]  # every other one


@pytest.mark.parametrize("form", ["lazily negated", "behind others", "columns last", "every other one"])
@pytest.mark.parametrize(("op", "name"), FAST, ids=lambda x: getattr(x, "name", x))
def test_numbers_may_lie_anywhere(op, name, form, device):
    """Of results and gradients, wherever and however arguments and upstream gradients lie in memory."""
    implementation = op.implementations[name]
    for sample in op.samples("test", torch.float32, device):
        if implementation.run is None or sum(t.numel() for t in measure.floating(sample.args)) > 2000 or (
                implementation.cannot(*sample.args)):
            continue
        args = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: _lay(t, form), sample.args)
        with fastlm.backend(name):
            results, upstream, grads = measure.differentiate(op, sample.args, constants=op.constants)
            found = measure.differentiate(op, args, [_lay(g, form) for g in upstream], constants=op.constants)
        for a, b in zip(found[0] + found[2], results + grads, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5,
                                       msg=lambda m, s=sample: f"{s.name}: {m}")


def _replace(args, old, new):
    """Return `args` with each tensor of `old` replaced by the one of `new` at its place."""
    table = {id(a): b for a, b in zip(old, new, strict=True)}
    return torch.utils._pytree.tree_map(lambda x: table.get(id(x), x), args)


@pytest.mark.parametrize(("op", "name"), FAST, ids=lambda x: getattr(x, "name", x))
@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs inside opaque operators only")
def test_compiled_whole(op, name, device):
    """torch.compile(fullgraph=True) traces the op, forward and backward, and the numbers stay."""
    implementation = op.implementations[name]
    sample = next((s for s in op.samples("test", torch.float32, device) if s.name in implementation.accepts), None)
    if implementation.run is None or implementation.cannot(*sample.args):
        pytest.skip("not available here")
    torch._dynamo.reset()
    with fastlm.backend(name):
        eager = measure.differentiate(op, sample.args, constants=op.constants)
        compiled = measure.differentiate(torch.compile(op, fullgraph=True), sample.args, eager[1],
                                         constants=op.constants)
    for a, b in zip(compiled[0] + compiled[2], eager[0] + eager[2], strict=True):
        torch.testing.assert_close(a, b)


ROWS = torch.randn(3, 8)
SIZED = {
    "swiglu": (ROWS, ROWS), "geglu": (ROWS, ROWS), "dropout_add": (ROWS, ROWS, 0.1, True),
    "add_rms_norm": (ROWS, ROWS, (8,)), "add_layer_norm": (ROWS, ROWS, (8,)), "linear": (ROWS, ROWS),
    "cross_entropy": (ROWS, torch.tensor([0, 1, 2])), "linear_cross_entropy": (ROWS, ROWS, torch.tensor([0, 1, 2])),
    "scaled_dot_product_attention": (torch.randn(1, 2, 3, 8),) * 3,
    "varlen_attn": (*(torch.randn(3, 2, 8),) * 3, *(torch.tensor([0, 3], dtype=torch.int32),) * 2, 3, 3),
    "rotary_embedding": (torch.randn(1, 2, 3, 8), torch.randn(3, 4), torch.randn(3, 4)),
}


@pytest.mark.parametrize("name", SIZED)
def test_tensors_on_two_devices_are_named(name):
    args = SIZED[name]
    getattr(fastlm.ops, name)(*args)
    for i, arg in enumerate(args):
        if i and isinstance(arg, torch.Tensor):
            with pytest.raises((RuntimeError, ValueError), match=r"on meta|on the CPU"):
                getattr(fastlm.ops, name)(*args[:i], arg.to("meta"), *args[i + 1:])
