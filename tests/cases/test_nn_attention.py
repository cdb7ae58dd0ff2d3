"""Decoder layer, self-attention and its cache: beside torch.nn's, beside the whole sequence, and their errors."""

import itertools

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastlm
from fastlm.models.transformer import TransformerConfig, TransformerLM
from fastlm.nn import KVCache, SelfAttention
from tests.parity import combinations, hold, leaf, pair

DECODER = [("norm_first", True), ("activation", "gelu"), ("batch_first", True), ("bias", False), ("dropout", 0.0),
           ("masks", True), ("causal", True), ("padding", True), ("eval", True)]


@pytest.mark.parametrize("options", combinations(DECODER))
def test_decoder_layer(options, device):
    options = dict(options)
    masks, causal, padding, eval_mode = (options.pop(name, False) for name in ("masks", "causal", "padding", "eval"))
    if device == "cuda" and not eval_mode:
        options["dropout"] = 0.0
    theirs, ours = pair("TransformerDecoderLayer", 8, 2, 16, device=device, **options)
    theirs.train(not eval_mode), ours.train(not eval_mode)
    assert type(ours.self_attn) is type(ours.multihead_attn) is fastlm.nn.MultiheadAttention
    shapes = ((4, 3, 8), (5, 3, 8))
    if options.get("batch_first"):
        shapes = ((3, 4, 8), (3, 5, 8))
    leaves = [leaf(*shape, device=device, dtype=torch.float32) for shape in shapes]
    given = {}
    if masks or causal:
        given["tgt_mask"] = torch.ones(4, 4, device=device).triu(1).bool()
        given["tgt_is_causal"] = causal
    if masks:
        given["memory_mask"] = torch.tensor([False, True, False, False, True], device=device).expand(4, 5)
    if padding:
        lengths = torch.tensor([[5], [3], [4]], device=device)
        given["memory_key_padding_mask"] = torch.arange(5, device=device) >= lengths
    hold(theirs, ours, lambda module, tgt, memory: module(tgt, memory, **given), leaves)


def test_inside_torchs_decoder(device):
    stock = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True, device=device), 2)
    ours = nn.TransformerDecoder(
        fastlm.nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True, device=device), 2)
    ours.load_state_dict(stock.state_dict())
    tgt, memory = torch.randn(3, 4, 8, device=device), torch.randn(3, 6, 8, device=device)
    causal = nn.Transformer.generate_square_subsequent_mask(4, device=device)
    for given in ({}, {"tgt_mask": causal}, {"tgt_mask": causal, "tgt_is_causal": True}):
        torch.testing.assert_close(ours(tgt, memory, **given), stock(tgt, memory, **given))
    to_itself, to_memory = ["linear", "attention", "linear"], [*["linear"] * 3, "attention", "linear"]
    ops = [call.op for call in fastlm.explain(ours, tgt, memory)]
    assert ops == [*to_itself, *to_memory, "linear", "linear"] * 2


OPTIONS = [("num_kv_heads", 2), ("rope", True), ("window", 3), ("softcap", 2.0), ("sinks", True), ("head_dim", 6),
           ("bias", True)]


def make(**options):
    module = SelfAttention(16, 4, **options)
    if module.sinks is not None:
        nn.init.normal_(module.sinks)
    return module


def test_dropout_in_training_alone():
    module, x = make(dropout=0.5), torch.randn(2, 5, 16)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("options", combinations(OPTIONS))
def test_a_cache_gives_what_the_whole_sequence_gives(options, device):
    module, x = make(device=device, **options), torch.randn(2, 11, 16, device=device)
    cache = module.make_cache(2, 12)
    with torch.no_grad():
        whole = module(x)
        for chunks in ([11], [5, 1, 1, 4], [1] * 11):
            parts = torch.cat([module(part, cache) for part in x.split(chunks, 1)], 1)
            torch.testing.assert_close(parts, whole)
            assert cache.length == 11
            cache.reset()


def test_self_attention_by_hand():
    """Rotary positions, shared heads and a softmax, written out; and gradients for every parameter."""
    module, x = SelfAttention(8, 4, 2, rope=True, bias=True).double(), torch.randn(1, 5, 8, dtype=torch.float64)
    q, k, v = module.qkv_proj(x)[0].split([8, 4, 4], -1)
    out = torch.zeros(5, 8, dtype=torch.float64)
    for i, h in itertools.product(range(5), range(4)):
        def turned(row, position):
            angle = torch.tensor(float(position), dtype=torch.float64)  # one pair a head: frequency 1
            a, b = row
            return torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])
        query, shared = turned(q[i, 2 * h: 2 * h + 2], i), slice(2 * (h // 2), 2 * (h // 2) + 2)
        scores = torch.stack([query @ turned(k[j, shared], j) / 2**0.5 for j in range(i + 1)])
        out[i, 2 * h: 2 * h + 2] = scores.softmax(0) @ v[: i + 1, shared]
    torch.testing.assert_close(module(x)[0], module.out_proj(out), rtol=1e-5, atol=1e-6)
    module(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("window", [0, 2])
def test_a_window_counts_the_tokens_before_the_own_one(window):
    attend, x = fastlm.nn.SelfAttention(8, 2, window=window), torch.randn(1, 6, 8, requires_grad=True)
    (seen,) = torch.autograd.grad(attend(x)[0, -1].sum(), x)
    assert (seen[0].abs().sum(1) > 0).tolist() == [i >= 5 - window for i in range(6)]


def test_reorder_lets_a_row_continue_another():
    module, x = make(rope=True), torch.randn(3, 6, 16)
    rows = torch.tensor([2, 2, 0])
    with torch.no_grad():
        cache, other = module.make_cache(3, 8), module.make_cache(3, 8)
        module(x[:, :5], cache)
        cache.reorder(rows)
        module(x[rows, :5], other)
        torch.testing.assert_close(module(x[:, 5:], cache), module(x[:, 5:], other))


def test_bad_caches_and_sizes():
    cache, x = KVCache(2, 4, 3, 8), torch.zeros(2, 3, 2, 8)
    with pytest.raises(ValueError, match="key has shape"):
        cache.update(x[:, :2], x)
    with pytest.raises(ValueError, match="value has 1 tokens, key has 2"):
        cache.update(x, x[:, :, :1])
    with pytest.raises(RuntimeError, match=r"value is torch\.float64"):
        cache.update(x, x.double())
    with pytest.raises(RuntimeError, match="requires a gradient"):
        cache.update(x.clone().requires_grad_(), x)
    assert cache.length == 0
    cache.update(x, x)
    cache.update(x, x)
    with pytest.raises(ValueError, match="6 tokens, expected at most max_len, 4"):
        cache.update(x, x)
    with pytest.raises(ValueError, match="rows is"):
        cache.reorder(torch.zeros(3, dtype=torch.int64))
    for call, name in ((lambda: cache.reorder([0, 1]), "rows"), (lambda: cache.update(x.numpy(), x), "key")):
        with pytest.raises(TypeError, match=f"KVCache: {name} must be a Tensor"):
            call()
    for options, message in (({"num_kv_heads": 3}, "num_heads is 4"), ({"window": -1}, "window is -1"),
                             ({"window": 2, "is_causal": False}, "window is 2"), ({"dropout": 2.0}, "dropout is 2.0"),
                             ({"head_dim": 3, "rope": True}, "expected an even one")):
        with pytest.raises(ValueError, match=message):
            SelfAttention(16, 4, **options)
    with pytest.raises(ValueError, match="embed_dim is 15"):
        SelfAttention(15, 4)
    with pytest.raises(ValueError, match="num_heads is 0"):
        SelfAttention(16, 0, 1)
    with pytest.raises(ValueError, match="x has shape"):
        make()(torch.zeros(2, 3, 15))


def test_decoding_compiles_whole_and_does_not_recompile_for_each_token():
    torch._dynamo.reset()
    module, x = make(num_kv_heads=2, rope=True), torch.randn(1, 24, 16)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with torch.no_grad():
        cache, own = module.make_cache(1, 24), module.make_cache(1, 24)
        module(x[:, :8], cache), module(x[:, :8], own)
        for t in range(8, 24):
            torch.testing.assert_close(compiled(x[:, t:t + 1], cache), module(x[:, t:t + 1], own))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("layers", ["fastlm", "stock"])
def test_generation_reads_each_token_once_while_all_fit(layers):
    model = TransformerLM(TransformerConfig(23, 16, 2, 4, 12, layers=layers)).eval()
    lengths = []
    model.norm.register_forward_hook(lambda module, args, out: lengths.append(args[0].size(1)))
    found = model.generate(torch.randint(23, (2, 5)), 10, temperature=0)
    assert lengths == [5, 1, 1, 1, 1, 1, 1, 1, 12, 12]
    for t in range(5, 15):
        assert torch.equal(model.logits(found[:, max(0, t - 12):t])[:, -1].argmax(-1), found[:, t])
