"""Attention's kernel for Hopper: the calls it takes, its numbers on a GPU and emulated, and when it is chosen."""

import os

import pytest
import torch

import fastlm
from fastlm import measure
from fastlm.ops.attention import op, reference
from fastlm.ops.attention_common import Options
from tests.parity import keep_error_rule

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Gluon is not interpreted", allow_module_level=True)

from fastlm.ops import attention_hopper_launch_triton as hopper
from fastlm.ops import attention_launch_triton as launch
from fastlm.ops import attention_triton
from tests import gluon_emulation

# name -> (rows of the batch, heads, heads of keys, queries, keys), options
SHAPES = {
    "dense": ((1, 2, 2, 256, 256), {}),
    "odd lengths": ((2, 3, 3, 333, 200), {}),
    "causal": ((1, 2, 2, 400, 400), dict(is_causal=True)),
    "causal, more keys": ((2, 2, 2, 200, 333), dict(is_causal=True)),
    "causal, more queries": ((1, 3, 3, 517, 129), dict(is_causal=True)),
    "causal at the last key": ((1, 2, 2, 150, 470), dict(right=0)),
    "queries that see nothing": ((1, 2, 2, 470, 150), dict(right=0)),
    "window": ((2, 2, 2, 500, 500), dict(left=100, right=50)),
    "window, more keys": ((1, 2, 2, 200, 700), dict(left=60, right=0)),
    "window, more queries": ((1, 2, 2, 700, 200), dict(left=60, right=3)),
    "left window": ((1, 2, 2, 513, 513), dict(left=70)),
    "causal and window": ((1, 2, 2, 300, 420), dict(is_causal=True, left=200)),
    "grouped": ((2, 6, 2, 300, 300), dict(is_causal=True)),
    "one key head": ((2, 4, 1, 130, 260), {}),
    "alibi": ((2, 3, 3, 333, 200), dict(alibi=True)),
    "steep alibi": ((1, 2, 2, 500, 516), dict(alibi=24)),
    "steep alibi, causal, grouped": ((1, 4, 2, 700, 700), dict(alibi=24, is_causal=True)),
    "steep alibi, causal, more keys": ((1, 2, 2, 300, 700), dict(alibi=24, is_causal=True)),
    "steep alibi, more queries": ((1, 2, 2, 500, 300), dict(alibi=24)),
    "alibi, causal, grouped": ((2, 6, 2, 300, 300), dict(alibi=True, is_causal=True)),
    "dropout": ((2, 2, 2, 300, 260), dict(dropout_p=0.3)),
    "dropout, alibi, window": ((1, 2, 2, 400, 470), dict(dropout_p=0.1, alibi=True, left=100, right=0)),
}
# As many tiles as 132 programs take in several turns: on a GPU only.
LARGE = {
    "many turns": ((3, 16, 16, 1500, 1500), {}),
    "many turns, causal": ((3, 16, 4, 1500, 1500), dict(is_causal=True)),
    "many turns, window": ((3, 16, 16, 1500, 1500), dict(left=300, right=0)),
    "groups of heads": ((9, 8, 8, 700, 700), dict(is_causal=True)),
}


# What the backward kernel takes: of these those without a window, and masks.
MASKED = {
    "mask": ((2, 4, 2, 300, 264), dict(mask=(1, 4))),
    "mask of all heads, causal": ((2, 2, 2, 200, 200), dict(mask=(2, 1), is_causal=True)),
}
BACKWARD = [*[name for name, (_, options) in SHAPES.items() if "left" not in options], *MASKED]


def arguments(name, dim, dtype, layout, device="cpu"):
    """Return the canonical arguments of the op."""
    (batch, heads, kv_heads, queries, keys), options = (SHAPES | LARGE | MASKED)[name]
    tensors = []
    for h, s in ((heads, queries), (kv_heads, keys), (kv_heads, keys)):
        shape = (batch, h, s, dim) if layout == "heads first" else (batch, s, h, dim)
        x = torch.randn(shape, device=device).to(dtype)
        tensors.append(x if layout == "heads first" else x.transpose(1, 2))
    options = dict(options)
    slopes = torch.rand(batch, heads, device=device) / 8 * options.pop("alibi") if "alibi" in options else None
    mask = torch.randn(*options.pop("mask"), queries, keys, device=device).to(dtype) if "mask" in options else None
    return (*tensors, mask, None, slopes, *[None] * 3, Options(scale=dim**-0.5, return_lse=True, **options))


def call_of(args):
    torch.manual_seed(1)
    return launch.Call(*args[:-1], launch.draws(args[0]) if args[-1].dropout_p else None, args[-1])


def keep(found, args):
    """Hold the output and the log-sum-exp to the error rule."""
    dropped = launch.dropped(call_of(args)) if args[-1].dropout_p else None
    stock, exact = reference(*args, dropped), reference(*measure.cast(args, torch.float64), dropped)
    errors = measure.compare(("output", "log-sum-exp"), found, stock, exact)
    assert all(e.ok for e in errors), errors


def kind(name):
    """Return a dtype and a layout for a shape, each with half of them."""
    index = [*SHAPES, *LARGE, *MASKED].index(name)
    return (torch.bfloat16, torch.float16)[index % 2], ("heads first", "lengths first")[index // 2 % 2]


@pytest.fixture
def drawn(device, poisoned, monkeypatch):
    """Draw arguments that the kernels for Hopper take, or skip."""
    monkeypatch.setattr(launch, "_splits", lambda call: 1)  # the plain kernel would have more of so few queries
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)  # which `poisoned` enables
    monkeypatch.setattr(hopper, "pays", lambda call: True)
    monkeypatch.setattr(hopper, "narrow", lambda *args: False)

    def draw(name, dim, seed=0):
        torch.manual_seed(seed)
        args = arguments(name, dim, *kind(name), device)
        if device != "cuda" or not hopper.takes(call_of(args)._replace(mask=None)):
            pytest.skip("needs a Hopper GPU")
        return args
    return draw


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", [*SHAPES, *LARGE])
def test_results(name, dim, drawn):
    args = drawn(name, dim)
    torch.manual_seed(1)
    with torch.no_grad(), fastlm.backend("triton"):
        found = op(*args)
    keep(found, args)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", [*BACKWARD, "window"])
def test_gradients(name, dim, drawn):
    """With a window the two plain kernels read the output and log-sum-exp of the forward pass."""
    keep_error_rule(lambda i: measure.errors(op, "triton", drawn(name, dim, i)))


@pytest.mark.parametrize("dim", [64, 128])
def test_results_are_the_same_each_time(dim, drawn):
    args = drawn("many turns, causal", dim)
    with torch.no_grad(), fastlm.backend("triton"):
        first = op(*args)
        for _ in range(5):
            for a, b in zip(first, op(*args), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("deterministic", [True, False])
def test_gradients_are_the_same_each_time_where_it_is_asked_for(deterministic, drawn, monkeypatch):
    """Else those of keys and values are, and the others nearly."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    args = drawn("many turns, causal", 128)
    leaves = [x.requires_grad_() for x in args[:3]]

    def gradients():
        with fastlm.backend("triton"):
            out, lse = op(*leaves, *args[3:])
        return torch.autograd.grad(out.float().square().sum() + lse.sum(), leaves)

    first = gradients()
    for _ in range(3):
        for i, (a, b) in enumerate(zip(first, gradients(), strict=True)):
            assert torch.equal(a, b) or (i == 0 and not deterministic and (a - b).abs().max() < a.abs().max() / 100)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", SHAPES)
def test_emulated(name, dim, monkeypatch):
    """Three programs, so that each takes several tiles, and not all as many."""
    args = arguments(name, dim, *kind(name))
    keep(gluon_emulation.forward(call_of(args), 3, longest(args), monkeypatch), args)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", BACKWARD)
def test_backward_emulated(name, dim, monkeypatch):
    args = arguments(name, dim, *kind(name))
    call = call_of(args)
    queries = call.query.size(2)
    dropped = launch.dropped(call) if call.draws is not None else None
    leaves = [x.double().requires_grad_() for x in args[:3]]
    out, lse = reference(*leaves, *measure.cast(args[3:], torch.float64), dropped)
    dout = torch.randn_like(args[0])
    dlse = torch.randn(lse.shape)
    want = torch.autograd.grad((out, lse), leaves, (dout.double(), dlse.double()))
    stock = [x.detach().requires_grad_() for x in args[:3]]
    stock_out, stock_lse = reference(*stock, *args[3:], dropped)
    stock = torch.autograd.grad((stock_out, stock_lse), stock, (dout, dlse.to(stock_lse.dtype)))

    share = hopper.share(call.options.dropout_p)
    shape = hopper.padded(call)
    delta = torch.zeros(shape)
    delta[:, :, :queries] = ((out.detach() * dout.double()).sum(-1) - dlse) * share
    sums = torch.full((3, *shape), torch.inf)
    sums[:, :, :, :queries] = lse.detach().where(lse != -torch.inf, torch.inf) * hopper.LOG2_E
    if call.slopes is not None:
        bias = call.slopes[..., None] * hopper.LOG2_E * (torch.arange(shape[2]) % hopper.BACKWARD_ROWS[dim])
        sums[1] += bias
        sums[2] -= bias
    total = torch.zeros(*shape, dim)
    dk, dv = gluon_emulation.backward(call, sums, delta, dout, total, longest(args), monkeypatch)
    dq = (unfold(total)[:, :, :queries] * (call.options.scale / share)).to(dk.dtype)
    errors = measure.compare(("query", "key", "value"), (dq, dk, dv), stock, want)
    assert all(e.ok for e in errors), errors


def longest(args):
    return [x.float().square().sum(-1).amax(-1) for x in args[:2]]


def unfold(total):
    """Return the gradient of the queries from the blocks of the backward kernel."""
    blocks = total.view(-1, 2, 8, 4, 8, 4, 2, 2)  # half, 8 columns, warp, row, 2 columns, 8 rows, column
    order = (0, 3, 6, 4, 1, 2, 5, 7) if total.size(3) == 128 else (0, 1, 3, 6, 4, 2, 5, 7)
    return blocks.permute(order).reshape(total.shape)


@pytest.fixture
def on_hopper(monkeypatch):
    """Take tensors on meta for those of a Hopper GPU."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(hopper, "capability", lambda device: (9, 0))
    monkeypatch.setattr(attention_triton, "loses_here", lambda query: None)


def meta(batch=16, heads=16, length=1024, dim=128, dtype=torch.bfloat16, **options):
    q = torch.empty(batch, heads, length, dim, dtype=dtype, device="meta")
    return (q, q, q, *[None] * 6, Options(scale=0.1, **options))


def test_what_it_takes(on_hopper, monkeypatch):
    assert hopper.takes(call_of(meta()))
    assert hopper.takes(call_of(meta(dim=64, dtype=torch.float16, is_causal=True, left=3, right=9, return_lse=True)))
    for declined in (meta(dtype=torch.float32), meta(dim=96), meta(dim=256), meta(length=127), meta(softcap=1.0),
                     (*meta()[:-1], Options(scale=-0.1)), (*meta()[:-1], Options(scale=0.0))):
        assert not hopper.takes(call_of(declined))
    call = call_of(meta())
    for field in ("mask", "sinks", "lengths", "query_ids", "cu_q", "cu_k", "table"):
        assert not hopper.takes(call._replace(**{field: torch.empty(1)}))
    assert not hopper.takes(call._replace(value=call.value[..., :64]))
    monkeypatch.setattr(hopper, "capability", lambda device: (10, 0))
    assert not hopper.takes(call)


def test_what_backward_takes(on_hopper, monkeypatch):
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)
    call = call_of(meta())
    dout, lengths_first = call.query, torch.empty(16, 1024, 16, 128, dtype=torch.bfloat16, device="meta")
    assert hopper.takes_backward(call, dout) and hopper.takes_backward(call, lengths_first.transpose(1, 2))
    assert not hopper.takes_backward(call, dout.sum().expand(dout.shape))
    assert not hopper.takes_backward(call_of(meta(left=300, right=0)), dout)
    mask = torch.empty(1, 16, 1024, 1024, dtype=torch.float16, device="meta")
    assert hopper.takes_backward(call._replace(mask=mask), dout)
    for other in (mask.float(), mask > 0, mask[:, :, :1], mask[..., :1], mask[:, :, :1].expand(mask.shape), mask.mT):
        assert not hopper.takes_backward(call._replace(mask=other), dout)
    dropout = call_of(meta(dropout_p=0.1))
    assert hopper.takes_backward(dropout, dout) and not hopper.takes_backward(dropout._replace(mask=mask), dout)
    odd = call_of(meta(length=1023, dropout_p=0.1))
    assert hopper.takes(odd) and not hopper.takes_backward(odd, odd.query)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not hopper.takes_backward(call, dout)
    assert hopper.pays(call) and not hopper.pays(call_of(meta(1, 8, 512)))


def test_backward_hands_over_what_it_takes(on_hopper, monkeypatch):
    seen = []
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(launch, "launch", lambda plan, *args: seen.append(plan.__name__))
    monkeypatch.setattr(launch, "generation", lambda device: 90)
    args = meta()
    q, lse = args[0], torch.empty(args[0].shape[:3], device="meta")
    gluon = ["plan_prepare", "plan_backward", "plan_unfold"]
    for mask, all_needed, expected in (
            (None, True, gluon), (None, False, ["plan_queries"]),
            (torch.empty(1, 16, 1024, 1024, dtype=q.dtype, device="meta"), True, [*gluon, "plan_mask"])):
        needs = [True, all_needed, all_needed, mask is not None, False]
        launch.backward(call_of(args)._replace(mask=mask), q, lse, q, lse, needs, (q, q, q, mask, None))
        assert seen == expected
        seen.clear()


def test_what_the_copy_engine_reads():
    x = torch.empty(2, 300, 4, 128, dtype=torch.bfloat16, device="meta")
    assert hopper.reachable(x.transpose(1, 2))
    assert hopper.reachable(x.transpose(1, 2)[..., :64])
    assert hopper.reachable(x.unflatten(2, (1, 4)).transpose(1, 2)[:, 0].transpose(1, 2)[:1])
    assert hopper.reachable(torch.empty(1, 1, 300, 64, device="meta").as_strided((1, 1, 300, 64), (7, 3, 64, 1)))
    assert not hopper.reachable(x.transpose(2, 3))
    assert not hopper.reachable(x[..., ::2].transpose(1, 2))
    assert not hopper.reachable(x[:1].expand(2, -1, -1, -1).transpose(1, 2))
    assert not hopper.reachable(torch.empty(2, 4, 300, 132, device="meta")[..., :128])


def test_addresses_are_multiples_of_16(on_hopper, monkeypatch):
    call = call_of(meta())
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: 8)
    assert not hopper.takes(call)


def test_when_it_is_chosen(on_hopper):
    """Dense attention is SDPA's but where the kernel was measured to be as fast, and no gradient is wanted."""
    sdpas = "dense attention is SDPA's"
    assert attention_triton.loses(*meta()) is None
    assert attention_triton.loses(*meta(is_causal=True)) is None
    assert attention_triton.loses(*meta(4, length=4096, dim=64)) is None
    assert attention_triton.loses(*meta(32, length=512)) == sdpas
    assert attention_triton.loses(*meta(dim=64)) == sdpas
    assert attention_triton.loses(*meta(batch=1)) == sdpas
    query, *rest = meta()
    query.requires_grad_()
    assert attention_triton.loses(query, *rest) == sdpas
    with torch.no_grad():
        assert attention_triton.loses(query, *rest) is None
    found = []
    torch.func.vmap(lambda x: found.append(attention_triton.loses(*meta())) or x)(torch.ones(2))
    assert found == [sdpas]


def test_the_choice_can_be_compiled(on_hopper):
    def choose(query):
        return query.size(0) + (attention_triton.loses(query, query, query, *[None] * 6, Options(scale=0.1)) is None)

    compiled = torch.compile(choose, backend="eager", fullgraph=True)
    assert compiled(meta()[0]) == choose(meta()[0]) == 17


def test_forward_hands_over_what_it_takes(on_hopper, monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(launch, "launch", lambda plan, *args: seen.append(plan))
    narrow = [meta(dim=dim, left=left, right=0) for dim, left in ((128, 256), (128, 255), (64, 1024), (64, 256))]
    for args in (meta(), meta(dim=80), *narrow):
        launch.forward(call_of(args), torch.empty_like(args[0]), torch.empty(args[0].shape[:3], device="meta"))
    assert seen == [hopper.plan, launch.plan_forward] * 3


def test_slopes_are_float32_and_contiguous(on_hopper, monkeypatch):
    """ALiBi's may be float64, and have any strides."""
    seen = []
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(launch, "launch", lambda plan, call, *args: seen.append((plan, getattr(call, "slopes", None))))
    q, *rest = meta()
    for slopes in (torch.rand(1, 32)[:, ::2], torch.rand(1, 16).double(), torch.rand(1).expand(1, 16)):
        call = call_of((q, *rest))._replace(slopes=slopes)
        launch.forward(call, torch.empty_like(q), torch.empty(q.shape[:3], device="meta"))
        plan, found = seen.pop()
        assert plan is hopper.plan and found.dtype is torch.float32 and found.is_contiguous()
        assert torch.equal(found, slopes.float())
