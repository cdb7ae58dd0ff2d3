"""Attention on the CPU: which implementation runs on which, lanes and threads."""

import sys

import pytest
import torch

import fastlm
from fastlm import measure
from fastlm.ops import attention_tiles
from fastlm.ops import scaled_dot_product_attention as attention
from fastlm.ops.attention import op as OP
from fastlm.ops.attention_common import Options
from tests.parity import keep_error_rule


def leaves(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def on_cpu(name, monkeypatch, amx=False):
    """Let the rules of `loses` believe that this is another CPU; the extension may be missing."""
    if native := sys.modules.get("fastlm._native"):
        monkeypatch.setattr(native, "cpu", name)
        monkeypatch.setattr(native, "amx", amx)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("cpu", ["zen5", "intel", "avx2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sdpa_takes_at_once_what_the_rule_of_the_kernel_leaves_to_it(dtype, cpu, amx, monkeypatch):
    pytest.importorskip("fastlm._native")
    on_cpu(cpu, monkeypatch, amx)
    chosen = []
    monkeypatch.setattr(OP, "choose", lambda args: chosen.append(args) or ("torch", {}))
    for queries in (1, 4, 16, 200, 500):
        q, k = (torch.zeros(2, 4, n, 64, dtype=dtype) for n in (queries, 500))
        many = 2 * q.numel() * 500 >= 1 << 22
        ours = OP.implementations["native"].loses(q, k, k, *[None] * 6, Options()) is None
        chosen.clear()
        attention(q, k, k)
        assert bool(chosen) == (many and ours), queries


def test_what_runs_on_zen_5(monkeypatch):
    """The kernel in C++, but where dropout is drawn, and where SDPA is done before Python is."""
    pytest.importorskip("fastlm._native")
    on_cpu("zen5", monkeypatch)
    q, k, v = leaves(*[(1, 8, 64, 64)] * 3)
    few = leaves(*[(1, 8, 16, 64)] * 3)
    cases = [((q, k, v), {}, "native"), ((q, k, v), {"is_causal": True}, "native"), (few, {}, "torch"),
             (few, {"window_size": (2, 0)}, "native"), (few, {"softcap": 2.0}, "native"),
             ((q, k, v), {"dropout_p": 0.1, "return_lse": True}, "blocked"),
             ([t.repeat(1, 1, 1, 5) for t in (q, k, v)], {"softcap": 2.0}, "blocked")]
    for tensors, options, expected in cases:
        assert fastlm.explain(attention, *tensors, **options)[0].ran == expected, options


def test_what_runs_on_intel(monkeypatch):
    """The kernel in C++ for what SDPA lacks and for learned biases, with gradients; it was not timed beside SDPA."""
    pytest.importorskip("fastlm._native")
    on_cpu("intel", monkeypatch)
    q, k, v = leaves(*[(1, 8, 1024, 8)] * 3)
    bias = torch.zeros(1024, 1024, requires_grad=True)
    cases = [({}, "torch"), ({"is_causal": True}, "torch"), ({"attn_mask": bias.detach()}, "torch"),
             ({"softcap": 2.0}, "native"), ({"window_size": (5, 0)}, "native"), ({"attn_mask": bias}, "native")]
    for options, expected in cases:
        assert fastlm.explain(attention, q, k, v, **options)[0].ran == expected, options
    with torch.no_grad():
        assert fastlm.explain(attention, q, k, v, attn_mask=bias)[0].ran != "native"


def test_what_runs_on_intel_with_amx(monkeypatch):
    """What was timed there: the kernel in C++ in float32 wherever it takes more than a moment, in bfloat16 of few
    queries, but not with a bias to learn."""
    pytest.importorskip("fastlm._native")
    on_cpu("intel", monkeypatch, amx=True)
    q, k, v = leaves(*[(1, 8, 1024, 8)] * 3)
    few = leaves(*[(1, 8, 64, 64)] * 3)
    half = [t.detach().bfloat16() for t in (q, k, v)]
    for tensors, expected in (((q, k, v), "native"), (few, "torch"), (half, "torch")):
        assert fastlm.explain(attention, *tensors, is_causal=True)[0].ran == expected
    token = [half[0][:, :, :1].repeat(1, 4, 1, 1), *(t.repeat(1, 1, 64, 1) for t in half[1:])]
    assert fastlm.explain(attention, *token, enable_gqa=True)[0].ran == "native"
    bias = torch.zeros(1024, 1024, dtype=torch.bfloat16, requires_grad=True)
    assert fastlm.explain(attention, *half, attn_mask=bias)[0].ran == "blocked"


def test_what_runs_on_the_cpu(monkeypatch):
    """SDPA's flash kernel where it takes the call; tiles where it would build all scores or lacks the feature."""
    on_cpu("generic", monkeypatch)
    q, k, v = leaves(*[(1, 8, 1024, 8)] * 3)
    mask = torch.zeros(1024, 1024)
    stock = [{}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask > 0}, {"scale": 2.0},
             {"window_size": (2000, 1023)}, {"window_size": (-1, 0)}]
    few = q[:, :, :4]
    tiled = [{"window_size": (5, 0)}, {"softcap": 2.0}, {"alibi_slopes": torch.ones(8)}, {"sinks": torch.ones(8)},
             {"key_lengths": torch.tensor([5])}, {"document_ids": torch.zeros(1, 1024, dtype=torch.int64)},
             {"return_lse": True}, {"dropout_p": 0.1}, {"attn_mask": mask, "is_causal": True},
             {"attn_mask": torch.zeros(1024, 1024, requires_grad=True)}]
    for expected, cases in (("torch", stock), ("blocked", tiled)):
        for options in cases:
            call, = fastlm.explain(attention, q, k, v, **options)
            assert call.ran == expected, options
    for options, expected in (({"window_size": (-1, 0)}, "torch"), ({"window_size": (5, 0)}, "blocked")):
        assert fastlm.explain(attention, few, k, v, **options)[0].ran == expected
    for tensors in ([t[0] for t in (q, k, v)], [t.mT.contiguous().mT for t in (q, k, v)]):
        with torch.profiler.profile() as profile, torch.no_grad():
            attention(*tensors)
        assert any("flash" in event.name for event in profile.events())


@pytest.mark.parametrize("options", [
    {"window_size": (9, 0)}, {"softcap": 2.0}, {"sinks": torch.randn(4)}, {"key_lengths": torch.tensor([20, 0, 7])},
    *({"attn_mask": torch.randn(shape)} for shape in ((20, 20), (1, 4, 20, 20), (3, 1, 1, 20), (3, 4, 20, 20)))],
    ids=["window", "softcap", "sinks", "lengths", "mask", "mask for heads", "mask for rows", "mask for both"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_lanes_are_parts_of_a_call(kv_heads, options, monkeypatch):
    """Heads or rows of the batch in threads of their own give what one thread gives, gradients included."""
    tensors = leaves((3, 4, 20, 8), (3, kv_heads, 20, 8), (3, kv_heads, 20, 8))
    wanted = [*tensors, *(x.detach().requires_grad_() for x in options.values()
                          if isinstance(x, torch.Tensor) and x.is_floating_point())]
    options = dict(zip(options, wanted[3:], strict=True)) if wanted[3:] else options
    found, threads = [], torch.get_num_threads()
    for few in (1 << 20, 0):
        monkeypatch.setattr(fastlm.ops.attention_lanes, "LANE_SCORES", few)
        torch.set_num_threads(3)
        with fastlm.backend("blocked"):
            out = attention(*tensors, enable_gqa=True, **options)
            found.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
        assert torch.get_num_threads() == 3
        torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_lanes_in_inference_mode(monkeypatch):
    monkeypatch.setattr(fastlm.ops.attention_lanes, "LANE_SCORES", 0)
    q, k, v = (t.detach() for t in leaves(*[(1, 2, 9, 8)] * 3))
    for options in ({"softcap": 2.0}, {"window_size": (3, 0)}):
        with torch.inference_mode():
            with fastlm.backend("blocked"):
                found = attention(q, k, v, **options)
            assert found.is_inference()
            with fastlm.backend("reference"):
                torch.testing.assert_close(found, attention(q, k, v, **options))


# batch, heads, heads of keys, queries, keys, head size: keys split among the threads; many tiles and blocks; more heads
# than a tile has rows
LARGE = {"few queries": (2, 4, 2, 3, 3000, 16), "many blocks": (2, 4, 2, 250, 300, 20),
         "many heads": (1, 130, 1, 5, 700, 8)}
LARGE_OPTIONS = {
    "plain": {}, "causal": dict(right=0), "window": dict(left=170, right=3), "softcap": dict(softcap=3.0),
    "sinks and lse": dict(sinks=True, return_lse=True), "lengths": dict(lengths=True), "documents": dict(documents=3),
    **{f"bias {shape}": dict(bias=shape) for shape in ("BHQK", "1HQK", "B1QK", "11QK", "BH1K", "BHQ1", "1111")},
    "bias of queries with sinks": dict(bias="1HQ1", sinks=True, return_lse=True)}


@pytest.mark.parametrize("options", LARGE_OPTIONS)
@pytest.mark.parametrize("shape", LARGE)
def test_the_kernel_on_several_threads(shape, options, monkeypatch):
    """The error rule where threads share a call, and the same bits again."""
    op = next(op for op in fastlm.ops.ALL if op.name == "attention")
    args = _large(LARGE[shape], dict(LARGE_OPTIONS[options]))
    if op.implementations["native"].run is None:
        pytest.skip("no extension")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        keep_error_rule(lambda draw: measure.errors(
            op, "native", _large(LARGE[shape], dict(LARGE_OPTIONS[options]), draw)))
        with fastlm.backend("native"):
            upstream = measure.differentiate(op, args, constants=op.constants)[1]
            first, again = (measure.differentiate(op, args, upstream, constants=op.constants) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(first[0] + first[2], again[0] + again[2], strict=True):
        assert torch.equal(a, b)


def _large(shape, options, seed=0):
    batch, heads, kv_heads, queries, keys, dim = shape
    torch.manual_seed(seed)
    tensors = [torch.randn(batch, *s, dim) for s in ((heads, queries), (kv_heads, keys), (kv_heads, keys))]
    sizes = dict(zip("BHQK1", (batch, heads, queries, keys, 1), strict=True))
    bias = torch.randn([sizes[c] for c in options.pop("bias")]) if "bias" in options else None
    sinks = torch.randn(heads) if options.pop("sinks", False) else None
    lengths = torch.tensor([keys // 2, 0])[:batch] if options.pop("lengths", False) else None
    documents, ids = options.pop("documents", 0), (None, None)
    if documents:
        ids = tuple((torch.arange(n) * documents // n).expand(batch, n) for n in (queries, keys))
    return *tensors, bias, sinks, None, lengths, *ids, Options(scale=dim**-0.5, **options)


BEYOND = {"heads": {"key": (2, 3, 5, 8), "value": (2, 3, 5, 8)},
          "no heads": {"key": (2, 0, 5, 8), "value": (2, 0, 5, 8)},
          "head size": {"key": (2, 4, 5, 7)}, "values": {"value": (2, 4, 4, 8)}, "mask": {"mask": (2, 4, 5, 4)},
          "mask of one row": {"mask": (2, 4, 2, 5)}, "sinks": {"sinks": (3,)}, "slopes": {"slopes": (1, 3)},
          "slopes of rows": {"slopes": (3, 4)}, "ids of queries": {"query_ids": (2, 4), "key_ids": (2, 5)},
          "ids of keys": {"query_ids": (2, 5), "key_ids": (1, 5)}, "lengths": {"lengths": (3,)}}


@pytest.mark.parametrize("shapes", BEYOND.values(), ids=BEYOND)
def test_operators_refuse_what_the_kernel_would_read_beyond(shapes):
    pytest.importorskip("fastlm._native")
    names = ("query", "key", "value", "mask", "sinks", "slopes", "lengths", "query_ids", "key_ids")
    shapes = dict.fromkeys(names[:3], (2, 4, 5, 8)) | shapes
    tensors = [torch.ones(shapes[name]) for name in names if name in shapes]
    with pytest.raises(RuntimeError, match="no call that the kernel can take"):
        torch.ops.fastlm.attention_native.default(tensors, [0 if n in shapes else -1 for n in names], *Options())


@pytest.mark.parametrize("offsets", [[0, 3, 900], [-4, 3, 5], [0, 6, 5]], ids=str)
def test_a_compiled_call_refuses_sequences_beyond_the_tokens(offsets):
    """A graph does not know the numbers; who runs it does."""
    pytest.importorskip("fastlm._native")
    x, places = torch.randn(5, 4, 8), torch.tensor([0, 3, 5])
    torch._dynamo.reset()
    compiled = torch.compile(fastlm.ops.varlen_attn, fullgraph=True, backend="aot_eager")
    with fastlm.backend("native"):
        compiled(x, x, x, places, places, 5, 5)
        with pytest.raises(RuntimeError, match="no call that the kernel can take"):
            compiled(x, x, x, places, torch.tensor(offsets), 5, 5)


def agree(tensors, options, upstream=None, name="native"):
    """Hold output, log-sum-exp and gradients of all that requires one to those of the reference."""
    leaves = [t for t in (*tensors, *options.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    found = []
    for backend in (name, "reference"):
        with fastlm.backend(backend):
            results = attention(*tensors, **options)
        results = results if isinstance(results, tuple) else (results,)
        torch.manual_seed(1)
        grads = torch.autograd.grad(results, leaves, [torch.randn_like(r) for r in results])
        found.append([*results, *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", ["mask", "documents"])
def test_tiles_of_a_window_that_differ_in_more_than_their_place(option):
    """The mask of one tile serves another only where nothing but the window bars keys."""
    options = {"mask": {"attn_mask": torch.rand(600, 600) > 0.3},
               "documents": {"document_ids": torch.randint(2, (1, 600))}}[option]
    agree(leaves(*[(1, 2, 600, 8)] * 3), dict(window_size=(40, 0), **options), name="blocked")


@pytest.mark.parametrize("options", [{"document_ids": torch.arange(600)[None] // 200},
                                     {"key_lengths": torch.tensor([250])}], ids=["documents", "lengths"])
def test_a_learned_mask_of_which_part_is_never_seen(options, poisoned):
    """The kernel passes over what no query sees, where the gradient is 0."""
    pytest.importorskip("fastlm._native")
    *tensors, mask = leaves(*[(1, 2, 600, 8)] * 3, (1, 2, 600, 600))
    agree(tensors, dict(attn_mask=mask, **options))


def test_a_learned_mask_of_queries_beside_sinks_and_the_log_sum_exp():
    pytest.importorskip("fastlm._native")
    *tensors, mask, sinks = leaves(*[(2, 4, 20, 8)] * 3, (2, 4, 20, 1), (4,))
    agree(tensors, dict(attn_mask=mask, sinks=sinks, return_lse=True))


def test_lanes_draw_dropout_of_their_own(monkeypatch):
    monkeypatch.setattr(fastlm.ops.attention_lanes, "LANE_SCORES", 0)
    q, k, v = (t.detach() for t in leaves(*[(1, 2, 30, 8)] * 3))
    call = attention_tiles.Call(q, k, v, *[None] * 6, torch.tensor(5), Options(scale=1.0, dropout_p=0.5))
    first, second = attention_tiles.dropped(call)[0]
    assert 0 < first.count_nonzero() < first.numel()
    assert not torch.equal(first, second)


def test_threads_between_forward_and_backward_leave_dropout_as_it_is(monkeypatch):
    monkeypatch.setattr(fastlm.ops.attention_lanes, "LANE_SCORES", 0)
    tensors, found, threads = leaves(*[(1, 4, 20, 8)] * 3), [], torch.get_num_threads()
    for later in (1, 3):
        torch.manual_seed(0)
        torch.set_num_threads(1)
        with fastlm.backend("blocked"):
            out = attention(*tensors, dropout_p=0.5)
        torch.set_num_threads(later)
        found.append(torch.autograd.grad(out.sum(), tensors))
        torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
